// The fused kernels of a decoder layer in bfloat16, as plain C functions; `reference.py` says what each computes.
// Rows are contiguous and their length is a multiple of 16. Sums are float32, and every order of summation is fixed, so
// that a run repeats bit for bit.

#include <vector>

#include "attention.hpp"

static thread_local Scratch scratch;

// A counter's random bits (the finaliser of MurmurHash3 over a Weyl sequence), for dropout that needs no saved mask.
static inline __m512i random16(uint32_t seed, uint32_t at) {
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32(at),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    x = _mm512_add_epi32(_mm512_mullo_epi32(x, _mm512_set1_epi32(0x9e3779b9)), _mm512_set1_epi32(seed));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x85ebca6b));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 13));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0xc2b2ae35));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

extern "C" {

// out = weight · x / rms(x); inverse[row] = 1 / rms(x)
void rms_norm(const bf16* x, const bf16* weight, bf16* out, float* inverse, long rows, long d, float eps) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) {
        const bf16* row = x + i * d;
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < d; c += 16) {
            const __m512 v = load16(row + c);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        const float scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / d + eps);
        inverse[i] = scale;
        for (long c = 0; c < d; c += 16)
            store16(out + i * d + c,
                    _mm512_mul_ps(_mm512_mul_ps(load16(row + c), _mm512_set1_ps(scale)), load16(weight + c)));
    }
}

// dx = residual + (the norm's gradient); residual may be null. grad_weight [64][d] float32, or null: sums by 64ths.
void rms_norm_backward(const bf16* grad, const bf16* x, const bf16* weight, const float* inverse, const bf16* residual,
                       bf16* dx, float* grad_weight, long rows, long d) {
    const long share = (rows + 63) / 64;
#pragma omp parallel for schedule(static)
    for (long part = 0; part < 64; part++) {
        float* sums = grad_weight ? grad_weight + part * d : nullptr;
        if (sums) std::memset(sums, 0, sizeof(float) * d);
        for (long i = part * share; i < std::min(rows, (part + 1) * share); i++) {
            const bf16 *g = grad + i * d, *row = x + i * d;
            const __m512 scale = _mm512_set1_ps(inverse[i]);
            __m512 dot = _mm512_setzero_ps();
            for (long c = 0; c < d; c += 16) {
                const __m512 gv = load16(g + c), xv = load16(row + c);
                dot = _mm512_fmadd_ps(_mm512_mul_ps(gv, load16(weight + c)), xv, dot);
                if (sums) {
                    const __m512 normed = _mm512_mul_ps(xv, scale);
                    _mm512_storeu_ps(sums + c, _mm512_fmadd_ps(gv, normed, _mm512_loadu_ps(sums + c)));
                }
            }
            const __m512 shift = _mm512_set1_ps(_mm512_reduce_add_ps(dot) * inverse[i] * inverse[i] / d);
            for (long c = 0; c < d; c += 16) {
                __m512 v = _mm512_mul_ps(load16(g + c), load16(weight + c));
                v = _mm512_mul_ps(_mm512_fnmadd_ps(load16(row + c), shift, v), scale);
                if (residual) v = _mm512_add_ps(v, load16(residual + i * d + c));
                store16(dx + i * d + c, v);
            }
        }
    }
}

// In place: x [rows][heads][d] turned by the angles of cos, sin [rows][d] float32; sign -1 turns back.
void rotate(bf16* x, const float* cosine, const float* sine, long rows, long heads, long d, float sign) {
    const long half = d / 2;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++)
        for (long h = 0; h < heads; h++) {
            bf16* p = x + (i * heads + h) * d;
            for (long c = 0; c < half; c += 16) {
                const __m512 a = load16(p + c), b = load16(p + half + c);
                const __m512 ca = _mm512_loadu_ps(cosine + i * d + c), cb = _mm512_loadu_ps(cosine + i * d + half + c);
                __m512 sa = _mm512_loadu_ps(sine + i * d + c), sb = _mm512_loadu_ps(sine + i * d + half + c);
                sa = _mm512_mul_ps(sa, _mm512_set1_ps(sign));
                sb = _mm512_mul_ps(sb, _mm512_set1_ps(sign));
                const __m512 first = _mm512_fnmadd_ps(b, sign > 0 ? sa : sb, _mm512_mul_ps(a, ca));
                const __m512 second = _mm512_fmadd_ps(a, sign > 0 ? sb : sa, _mm512_mul_ps(b, cb));
                store16(p + c, first);
                store16(p + half + c, second);
            }
        }
}

// out = silu(gate) · up, over `count` values
void swiglu(const bf16* gate, const bf16* up_, bf16* out, long count) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count / 16; i++) {
        const __m512 g = load16(gate + 16 * i);
        store16(out + 16 * i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid16(g)), load16(up_ + 16 * i)));
    }
}

// In place: gate and up become their gradients, grad becomes silu(gate) · up.
void swiglu_backward(bf16* grad, bf16* gate, bf16* up_, long count) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count / 16; i++) {
        const __m512 dy = load16(grad + 16 * i), g = load16(gate + 16 * i), u = load16(up_ + 16 * i);
        const __m512 s = sigmoid16(g), y = _mm512_mul_ps(g, s);
        // d silu(g) / dg = s + g·s·(1 − s)
        const __m512 slope = _mm512_fmadd_ps(y, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
        store16(gate + 16 * i, _mm512_mul_ps(_mm512_mul_ps(dy, u), slope));
        store16(up_ + 16 * i, _mm512_mul_ps(dy, y));
        store16(grad + 16 * i, _mm512_mul_ps(y, u));
    }
}

// out = x / keep where the counter's random number is below keep, else 0
void dropout(const bf16* x, bf16* out, long count, uint32_t seed, float keep) {
    const __m512i limit = _mm512_set1_epi32((int)(keep * 16777216.0f));
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count / 16; i++) {
        const __m512i bits = _mm512_srli_epi32(random16(seed, (uint32_t)(16 * i)), 8);
        const __mmask16 kept = _mm512_cmplt_epi32_mask(bits, limit);
        store16(out + 16 * i, _mm512_maskz_mul_ps(kept, load16(x + 16 * i), _mm512_set1_ps(1.0f / keep)));
    }
}

// losses[row] = logsumexp(row) − row[target]; with `gradient`, rows become softmax − one-hot.
void cross_entropy(bf16* logits, const int64_t* targets, float* losses, long rows, long vocabulary, int gradient) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) {
        bf16* row = logits + i * vocabulary;
        const long whole = vocabulary / 16 * 16;
        const auto value = [&](long c) {
            const uint32_t bits = (uint32_t)row[c] << 16;
            float v;
            std::memcpy(&v, &bits, 4);
            return v;
        };
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (long c = 0; c < whole; c += 16) top = _mm512_max_ps(top, load16(row + c));
        float most = _mm512_reduce_max_ps(top);
        for (long c = whole; c < vocabulary; c++) most = std::max(most, value(c));
        __m512 sum = _mm512_setzero_ps();
        for (long c = 0; c < whole; c += 16)
            sum = _mm512_add_ps(sum, exp16(_mm512_sub_ps(load16(row + c), _mm512_set1_ps(most))));
        float total = _mm512_reduce_add_ps(sum);
        for (long c = whole; c < vocabulary; c++) total += std::exp(value(c) - most);
        const float normaliser = most + std::log(total), at_target = value(targets[i]);
        losses[i] = normaliser - at_target;
        if (!gradient) continue;
        const auto narrow = [](float v) { return (bf16)_mm256_extract_epi16((__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(v)), 0); };
        for (long c = 0; c < whole; c += 16)
            store16(row + c, exp16(_mm512_sub_ps(load16(row + c), _mm512_set1_ps(normaliser))));
        for (long c = whole; c < vocabulary; c++) row[c] = narrow(std::exp(value(c) - normaliser));
        row[targets[i]] = narrow(std::exp(at_target - normaliser) - 1.0f);
    }
}

// One step of AdamW over `count` values: master, mean and variance in place, and `copy` their bfloat16 rounding where it
// is not null. The gradient is bfloat16 where `half`, and is multiplied by `times`. correction1 = 1 − β1^t.
void adamw(float* master, float* mean, float* variance, const void* gradient, long half, bf16* copy, long count, float lr,
           float beta1, float beta2, float eps, float decay, float times, float correction1, float correction2) {
    const float step = lr / correction1, root = 1.0f / std::sqrt(correction2);
    const auto part = [&](long i, __mmask16 mask) __attribute__((always_inline)) {
        const __m512 g = _mm512_mul_ps(
            half ? _mm512_castsi512_ps(_mm512_slli_epi32(
                       _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const bf16*)gradient + i)), 16))
                 : _mm512_maskz_loadu_ps(mask, (const float*)gradient + i),
            _mm512_set1_ps(times));
        __m512 m = _mm512_maskz_loadu_ps(mask, mean + i), v = _mm512_maskz_loadu_ps(mask, variance + i);
        m = _mm512_fmadd_ps(_mm512_set1_ps(1 - beta1), _mm512_sub_ps(g, m), m);
        v = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(1 - beta2), g), g, _mm512_mul_ps(_mm512_set1_ps(beta2), v));
        const __m512 spread = _mm512_fmadd_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(root), _mm512_set1_ps(eps));
        __m512 w = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, master + i), _mm512_set1_ps(1 - lr * decay));
        w = _mm512_fnmadd_ps(_mm512_set1_ps(step), _mm512_div_ps(m, spread), w);
        _mm512_mask_storeu_ps(master + i, mask, w);
        _mm512_mask_storeu_ps(mean + i, mask, m);
        _mm512_mask_storeu_ps(variance + i, mask, v);
        if (copy) _mm256_mask_storeu_epi16(copy + i, mask, (__m256i)_mm512_cvtneps_pbh(w));
    };
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count / 16; i++) part(16 * i, 0xffff);
    if (count % 16) part(count / 16 * 16, (1u << count % 16) - 1);
}

// segments [count][4] int32: begin, end, prefix, shared. lse [heads][tokens] float32.
void attention(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, const int32_t* segments, long count,
               long tokens, long heads, long kv_heads, long d, long window, float scale, long split) {
    const Shape shape{(int)heads, (int)kv_heads, (int)d, (int)window, scale, tokens};
    const long group = heads / kv_heads, tasks = split ? heads : kv_heads, size = split ? 1 : group;
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (long s = 0; s < count; s++)
        for (long t = 0; t < tasks; t++) {
            const Segment g{segments[4 * s], segments[4 * s + 1], segments[4 * s + 2], segments[4 * s + 3]};
            const long kv = t * size / group;
            const long padded = up(g.keys(), PANEL);
            uint32_t* kt = scratch.get<uint32_t>(0, padded * d / 2);
            uint32_t* vp = scratch.get<uint32_t>(1, padded * d / 2);
            pack_columns([&](int i) { return k + ((long)g.token(i) * kv_heads + kv) * d; }, g.keys(), d, kt);
            pack_rows([&](int i) { return v + ((long)g.token(i) * kv_heads + kv) * d; }, g.keys(), d, vp);
            for (long h = t * size; h < (t + 1) * size; h++)
                forward_head(shape, g, h, q, out, lse, kt, vp, scratch);
        }
}

// dk and dv of a key head are summed from `partial`, float32, where each task (segment and head or group of heads) has
// 2 · keys · d values, from `offsets[segment] · tasks + task · 2 · keys · d` on.
void attention_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const bf16* grad, const float* lse,
                        bf16* dq, bf16* dk, bf16* dv, float* partial, float* sums, const int32_t* segments, long count,
                        long tokens, long heads, long kv_heads, long d, long window, float scale, long split) {
    const Shape shape{(int)heads, (int)kv_heads, (int)d, (int)window, scale, tokens};
    const long group = heads / kv_heads, tasks = split ? heads : kv_heads, size = split ? 1 : group;
    std::vector<long> offsets(count);
    long offset = 0;
    const auto segment = [&](long s) {
        return Segment{segments[4 * s], segments[4 * s + 1], segments[4 * s + 2], segments[4 * s + 3]};
    };
    for (long s = 0; s < count; s++) {
        offsets[s] = offset;
        offset += 2 * d * tasks * segment(s).keys();
    }
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (long s = 0; s < count; s++)
        for (long t = 0; t < tasks; t++) {
            const Segment g = segment(s);
            const long kv = t * size / group, keys = g.keys(), stride = up(keys, 2) + BACK_KEYS;
            float* own = partial + offsets[s] + t * 2 * keys * d;
            std::memset(own, 0, sizeof(float) * 2 * keys * d);
            bf16* columns = scratch.get<bf16>(0, d * stride);
            uint32_t* kt = scratch.get<uint32_t>(1, (long)up(keys, PANEL) * d / 2);
            pack_columns([&](int i) { return k + ((long)g.token(i) * kv_heads + kv) * d; }, keys, d, kt);
            std::memset(columns, 0, sizeof(bf16) * d * stride);
            for (long first = 0; first < keys; first += PANEL)
                for (long c = 0; c < d / 2; c++)
                    for (long j = 0; j < PANEL && first + j < stride - 1; j += 16) {
                        const __m512i pairs = _mm512_loadu_si512(kt + (first * d / 2) + c * PANEL + j);
                        const __mmask16 room = between(first + j, 0, stride);
                        _mm512_mask_cvtepi32_storeu_epi16(columns + 2 * c * stride + first + j, room, pairs);
                        _mm512_mask_cvtepi32_storeu_epi16(columns + (2 * c + 1) * stride + first + j, room,
                                                          _mm512_srli_epi32(pairs, 16));
                    }
            for (long h = t * size; h < (t + 1) * size; h++)
                backward_head(shape, g, h, q, k, v, out, grad, lse, dq, own, own + keys * d, columns, stride, scratch);
        }
    const long width = kv_heads * d;
#pragma omp parallel for schedule(static)
    for (long task = 0; task < 2 * kv_heads; task++) {
        const long kv = task / 2, which = task % 2;
        for (long i = 0; i < tokens; i++) std::memset(sums + which * tokens * width + i * width + kv * d, 0, sizeof(float) * d);
        for (long s = 0; s < count; s++) {
            const Segment g = segment(s);
            const long keys = g.keys();
            for (long t = kv * group / size; t < (kv + 1) * group / size; t++) {
                const float* own = partial + offsets[s] + (t * 2 + which) * keys * d;
                for (long j = 0; j < keys; j++) {
                    float* sum = sums + which * tokens * width + (long)g.token(j) * width + kv * d;
                    for (long c = 0; c < d; c += 16)
                        _mm512_storeu_ps(sum + c, _mm512_add_ps(_mm512_loadu_ps(sum + c), _mm512_loadu_ps(own + j * d + c)));
                }
            }
        }
        bf16* to = which ? dv : dk;
        for (long i = 0; i < tokens; i++)
            for (long c = 0; c < d; c += 16)
                store16(to + i * width + kv * d + c, _mm512_loadu_ps(sums + which * tokens * width + i * width + kv * d + c));
    }
}

}  // extern "C"

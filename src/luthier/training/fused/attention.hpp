// Causal attention within the segments of a packed row, in bfloat16 with float32 sums, forward and backward.
//
// A segment is a run of queries; its keys are an optional shared prefix (a run of tokens elsewhere in the row, seen
// whole) followed by its own tokens (seen causally). Scores live in blocks of six rows, so memory grows with the length
// and not with its square; the backward pass makes them again (Dao et al., 2022, arXiv:2205.14135).
//
// Every product is a tile of 6 rows by 16·NZ columns: rows are read as pairs of neighbouring bfloat16 values and
// broadcast, columns come from panels packed so that the two values of a pair lie together (VDPBF16PS's operand).

#pragma once
#include "simd.hpp"

constexpr int ROWS = 6;         // rows of a tile
constexpr int PANEL = 64;       // columns of a packed panel
constexpr int KEY_BLOCK = 96;   // keys whose score gradients exist at one time; a multiple of ROWS and of 2

// c[6][NZ·16] = a[6][2·pairs] · b[pairs][NZ·16]; b's rows are `stride` pairs apart.
template <int NZ>
static inline void tile(const bf16* const* a, const uint32_t* b, long stride, long pairs, __m512 c[ROWS][NZ]) {
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int z = 0; z < NZ; z++) c[i][z] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++, b += stride) {
        __m512bh panel[NZ];
#pragma GCC unroll 4
        for (int z = 0; z < NZ; z++) panel[z] = (__m512bh)_mm512_loadu_si512(b + 16 * z);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(reinterpret_cast<const int32_t*>(a[i])[k]);
#pragma GCC unroll 4
            for (int z = 0; z < NZ; z++) c[i][z] = _mm512_dpbf16_ps(c[i][z], pair, panel[z]);
        }
    }
}

// The widest tiles that cover `columns` (a multiple of 16): calls done(first column, NZ, tile).
template <class Done>
static inline void columns_of(const bf16* const* a, const uint32_t* b, long stride, long pairs, int columns, Done done) {
    switch (columns / 16) {
        case 1: { __m512 c[ROWS][1]; tile<1>(a, b, stride, pairs, c); done(&c[0][0], 1); break; }
        case 2: { __m512 c[ROWS][2]; tile<2>(a, b, stride, pairs, c); done(&c[0][0], 2); break; }
        case 3: { __m512 c[ROWS][3]; tile<3>(a, b, stride, pairs, c); done(&c[0][0], 3); break; }
        default: { __m512 c[ROWS][4]; tile<4>(a, b, stride, pairs, c); done(&c[0][0], 4); break; }
    }
}

struct Segment {
    int begin, end;        // its queries and own keys, as positions in the row
    int prefix, shared;    // where its shared prefix begins, and how long that is (0: none)
    int queries() const { return end - begin; }
    int keys() const { return shared + end - begin; }
    int token(int key) const { return key < shared ? prefix + key : begin + key - shared; }
};

static inline int up(int n, int to) { return (n + to - 1) / to * to; }

// Rows of x as columns: out[panel][d/2][64] pairs along d; columns beyond n are zero.
template <class Row>
static void pack_columns(Row row, int n, int d, uint32_t* out) {
    for (int first = 0; first < n; first += PANEL, out += (long)d / 2 * PANEL)
        for (int j = 0; j < PANEL; j += 16)
            for (int k = 0; k < d / 2; k += 16) {
                __m512i block[16];
                const int width = d / 2 - k;  // 8 or at least 16: d is a multiple of 16
                const __mmask16 mask = width >= 16 ? 0xffff : (1u << width) - 1;
                for (int i = 0; i < 16; i++)
                    block[i] = first + j + i < n ? _mm512_maskz_loadu_epi32(mask, (const uint32_t*)row(first + j + i) + k)
                                                 : _mm512_setzero_si512();
                transpose16(block);
                for (int i = 0; i < std::min(16, width); i++)
                    _mm512_storeu_si512(out + (long)(k + i) * PANEL + j, block[i]);
            }
}

// Rows of x two by two: out[panel of d][up(n, 64)/2][columns of the panel], pairs along rows; rows beyond n are zero.
template <class Row>
static void pack_rows(Row row, int n, int d, uint32_t* out) {
    const int padded = up(n, PANEL);
    for (int c0 = 0; c0 < d; c0 += PANEL) {
        const int width = std::min(PANEL, d - c0);
        for (int j = 0; j < padded; j += 2, out += width)
            for (int c = 0; c < width; c += 16) {
                const __m512i zero = _mm512_setzero_si512();
                const __m512i low = j < n ? wide16(row(j) + c0 + c) : zero;
                const __m512i high = j + 1 < n ? wide16(row(j + 1) + c0 + c) : zero;
                _mm512_storeu_si512(out + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
    }
}

struct Shape {
    int heads, kv_heads, d, window;  // window: how many tokens back a token sees, itself included; 0: all
    float scale;
    long tokens;                     // N: tokens of the whole row
};

// One query head of one segment: out[token][head] and lse[head][token].
static void forward_head(const Shape& s, const Segment& g, int head, const bf16* q, bf16* out, float* lse,
                         const uint32_t* kt, const uint32_t* vp, Scratch& scratch) {
    const int n = g.queries(), keys = g.keys(), padded = up(keys, PANEL), d = s.d;
    float* scores = scratch.get<float>(2, (long)ROWS * padded);
    bf16* weights = scratch.get<bf16>(3, (long)ROWS * padded);
    for (int i0 = 0; i0 < n; i0 += ROWS) {
        const int rows = std::min(ROWS, n - i0);
        const bf16* a[ROWS];
        for (int r = 0; r < ROWS; r++)
            a[r] = q + ((long)(g.begin + std::min(i0 + r, n - 1)) * s.heads + head) * d;
        const int limit = g.shared + i0 + rows;
        const int low = s.window ? std::max(0, g.shared + i0 + 1 - s.window) / PANEL : 0;
        const int high = up(limit, PANEL) / PANEL;
        for (int p = low; p < high; p++) {
            __m512 c[ROWS][4];
            tile<4>(a, kt + (long)p * PANEL * d / 2, PANEL, d / 2, c);
            for (int r = 0; r < rows; r++)
                for (int z = 0; z < 4; z++)
                    _mm512_storeu_ps(scores + (long)r * padded + p * PANEL + 16 * z,
                                     _mm512_mul_ps(c[r][z], _mm512_set1_ps(s.scale)));
        }
        float scaled[ROWS];
        for (int r = 0; r < rows; r++) {
            const int last = g.shared + i0 + r + 1;
            const int first = s.window ? std::max(0, last - s.window) : 0;
            float* row = scores + (long)r * padded;
            bf16* weight = weights + (long)r * padded;
            __m512 top = _mm512_set1_ps(-INFINITY);
            for (int j = low * PANEL; j < last; j += 16)
                top = _mm512_mask_max_ps(top, between(j, first, last), top, _mm512_loadu_ps(row + j));
            const float most = _mm512_reduce_max_ps(top);
            __m512 sum = _mm512_setzero_ps();
            for (int j = low * PANEL; j < high * PANEL; j += 16) {
                const __mmask16 seen = between(j, first, last);
                __m512 e = _mm512_setzero_ps();
                if (seen) e = _mm512_maskz_mov_ps(seen, exp16(_mm512_sub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(most))));
                sum = _mm512_add_ps(sum, e);
                store16(weight + j, e);
            }
            const float total = _mm512_reduce_add_ps(sum);
            scaled[r] = 1.0f / total;
            lse[(long)head * s.tokens + g.begin + i0 + r] = most + std::log(total);
        }
        const bf16* w[ROWS];
        for (int r = 0; r < ROWS; r++) w[r] = weights + (long)std::min(r, rows - 1) * padded + low * PANEL;
        const uint32_t* panel = vp;
        for (int c0 = 0; c0 < d; c0 += PANEL) {
            const int width = std::min(PANEL, d - c0);
            columns_of(w, panel + (long)low * PANEL / 2 * width, width, (long)(high - low) * PANEL / 2, width,
                       [&](const __m512* c, int nz) {
                           for (int r = 0; r < rows; r++)
                               for (int z = 0; z < nz; z++)
                                   store16(out + ((long)(g.begin + i0 + r) * s.heads + head) * d + c0 + 16 * z,
                                           _mm512_mul_ps(c[r * nz + z], _mm512_set1_ps(scaled[r])));
                       });
            panel += (long)padded / 2 * width;
        }
    }
}

// One query head of one segment, backward: dq[token][head]; dk and dv [keys][d] float32 are added to.
static void backward_head(const Shape& s, const Segment& g, int head, const bf16* q, const bf16* k, const bf16* v,
                          const bf16* out, const bf16* grad, const float* lse, bf16* dq, float* dk, float* dv,
                          const bf16* key_columns, Scratch& scratch) {
    const int n = g.queries(), keys = g.keys(), d = s.d, padded = up(n, PANEL), panels = padded / PANEL;
    const int kv = head / (s.heads / s.kv_heads), key_stride = up(keys, KEY_BLOCK) + 2;
    const auto at = [&](const bf16* x, int i) { return x + ((long)(g.begin + i) * s.heads + head) * d; };
    uint32_t* qt = scratch.get<uint32_t>(4, (long)padded * d / 2);
    uint32_t* qp = scratch.get<uint32_t>(5, (long)padded * d / 2);
    uint32_t* gt = scratch.get<uint32_t>(6, (long)padded * d / 2);
    uint32_t* gp = scratch.get<uint32_t>(7, (long)padded * d / 2);
    pack_columns([&](int i) { return at(q, i); }, n, d, qt);
    pack_rows([&](int i) { return at(q, i); }, n, d, qp);
    pack_columns([&](int i) { return at(grad, i); }, n, d, gt);
    pack_rows([&](int i) { return at(grad, i); }, n, d, gp);
    float* norm = scratch.get<float>(8, padded);   // log-sum-exp of each query's scores
    float* delta = scratch.get<float>(9, padded);  // rowsum(dO · O)
    for (int i = 0; i < padded; i++) {
        norm[i] = i < n ? lse[(long)head * s.tokens + g.begin + i] : 0;
        __m512 sum = _mm512_setzero_ps();
        for (int c = 0; c < d && i < n; c += 16)
            sum = _mm512_fmadd_ps(load16(at(out, i) + c), load16(at(grad, i) + c), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
    }
    bf16* pt = scratch.get<bf16>(10, (long)ROWS * padded);
    bf16* st = scratch.get<bf16>(11, (long)ROWS * padded);
    uint32_t* sp = scratch.get<uint32_t>(12, (long)KEY_BLOCK / 2 * padded);
    float* dqt = scratch.get<float>(13, (long)up(d, ROWS) * padded);
    std::memset(dqt, 0, sizeof(float) * up(d, ROWS) * padded);
    const __m512 scale = _mm512_set1_ps(s.scale);

    for (int b0 = 0; b0 < keys; b0 += KEY_BLOCK) {
        const int b1 = std::min(keys, b0 + KEY_BLOCK);
        const int low = std::max(0, b0 - g.shared) / PANEL;
        // With a window, queries far behind a key do not see it.
        const auto last_panel = [&](int key) {
            return s.window ? std::min(panels, std::max(0, up(key - g.shared + s.window, PANEL) / PANEL)) : panels;
        };
        const int high = last_panel(b1 - 1);
        if (low >= high) continue;
        for (int k0 = b0; k0 < b1; k0 += ROWS) {
            const bf16 *kr[ROWS], *vr[ROWS];
            for (int r = 0; r < ROWS; r++) {
                const long token = g.token(std::min(k0 + r, keys - 1));
                kr[r] = k + (token * s.kv_heads + kv) * d;
                vr[r] = v + (token * s.kv_heads + kv) * d;
            }
            const int begin = std::max(low, std::max(0, k0 - g.shared) / PANEL);
            uint32_t* pairs = sp + (long)(k0 - b0) / 2 * padded;
            for (int r = 0; r < ROWS / 2; r++)
                std::memset(pairs + (long)r * padded + low * PANEL, 0, sizeof(uint32_t) * (begin - low) * PANEL);
            for (int p = begin; p < high; p++) {
                __m512 c[ROWS][4];
                float scores[ROWS][PANEL];
                tile<4>(kr, qt + (long)p * PANEL * d / 2, PANEL, d / 2, c);
                for (int r = 0; r < ROWS; r++)
                    for (int z = 0; z < 4; z++) _mm512_storeu_ps(scores[r] + 16 * z, c[r][z]);
                tile<4>(vr, gt + (long)p * PANEL * d / 2, PANEL, d / 2, c);
                for (int z = 0; z < 4; z++) {
                    const int i = p * PANEL + 16 * z;
                    const __m512 base = _mm512_loadu_ps(norm + i), row = _mm512_loadu_ps(delta + i);
                    __m512i half[ROWS];
                    for (int r = 0; r < ROWS; r++) {
                        const int key = k0 + r - g.shared;  // the query at the same place
                        const int end = key + g.shared >= keys ? 0 : s.window ? std::min(n, key + s.window) : n;
                        const __mmask16 seen = between(i, std::max(0, key), end);
                        __m512 w = exp16(_mm512_fmsub_ps(_mm512_loadu_ps(scores[r] + 16 * z), scale, base));
                        w = _mm512_maskz_mov_ps(seen, w);
                        const __m512 ds = _mm512_mul_ps(_mm512_mul_ps(w, _mm512_sub_ps(c[r][z], row)), scale);
                        store16(pt + (long)r * padded + i, w);
                        const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(seen, ds));
                        _mm256_storeu_si256((__m256i*)(st + (long)r * padded + i), narrow);
                        half[r] = _mm512_cvtepu16_epi32(narrow);
                    }
                    for (int r = 0; r < ROWS; r += 2)
                        _mm512_storeu_si512(pairs + (long)r / 2 * padded + i,
                                            _mm512_or_si512(half[r], _mm512_slli_epi32(half[r + 1], 16)));
                }
            }
            if (begin >= high) continue;
            const bf16 *pr[ROWS], *sr[ROWS];
            for (int r = 0; r < ROWS; r++) {
                pr[r] = pt + (long)r * padded + begin * PANEL;
                sr[r] = st + (long)r * padded + begin * PANEL;
            }
            const int rows = std::min(ROWS, keys - k0);
            long offset = 0;
            for (int c0 = 0; c0 < d; c0 += PANEL) {
                const int width = std::min(PANEL, d - c0);
                const long first = offset + (long)begin * PANEL / 2 * width, count = (long)(high - begin) * PANEL / 2;
                const auto add = [&](float* to) {
                    return [=](const __m512* c, int nz) {
                        for (int r = 0; r < rows; r++)
                            for (int z = 0; z < nz; z++) {
                                float* place = to + (long)(k0 + r) * d + c0 + 16 * z;
                                _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), c[r * nz + z]));
                            }
                    };
                };
                columns_of(pr, gp + first, width, count, width, add(dv));
                columns_of(sr, qp + first, width, count, width, add(dk));
                offset += (long)padded / 2 * width;
            }
        }
        for (int d0 = 0; d0 < d; d0 += ROWS) {
            const bf16* a[ROWS];
            for (int r = 0; r < ROWS; r++) a[r] = key_columns + (long)std::min(d0 + r, d - 1) * key_stride + b0;
            for (int p = low; p < high; p++) {
                __m512 c[ROWS][4];
                tile<4>(a, sp + p * PANEL, padded, up(b1 - b0, ROWS) / 2, c);
                for (int r = 0; r < ROWS; r++)
                    for (int z = 0; z < 4; z++) {
                        float* place = dqt + (long)(d0 + r) * padded + p * PANEL + 16 * z;
                        _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), c[r][z]));
                    }
            }
        }
    }
    for (int i0 = 0; i0 < n; i0 += 16)
        for (int c = 0; c < d; c += 16) {
            __m512i block[16];
            for (int r = 0; r < 16; r++) block[r] = _mm512_loadu_si512(dqt + (long)(c + r) * padded + i0);
            transpose16(block);
            for (int r = 0; r < std::min(16, n - i0); r++)
                store16(dq + ((long)(g.begin + i0 + r) * s.heads + head) * d + c, _mm512_castsi512_ps(block[r]));
        }
}

// Causal attention within the segments of a packed row, in bfloat16 with float32 sums, forward and backward.
//
// A segment is a run of queries; its keys are an optional shared prefix (a run of tokens elsewhere in the row, seen
// whole) followed by its own tokens (seen causally). Scores live in blocks that fit the caches, so memory grows with the
// length and not with its square; the backward pass makes them again (Dao et al., 2022, arXiv:2205.14135).
//
// Every product is a tile of 6 rows by 16·NZ columns: rows are read as pairs of neighbouring bfloat16 values and
// broadcast, columns come from panels packed so that the two values of a pair lie together (VDPBF16PS's operand). Blocks
// are walked so that a packed panel stays in the first-level cache while all rows of a block use it.

#pragma once
#include <type_traits>

#include "simd.hpp"

constexpr int ROWS = 6;         // rows of a tile
constexpr int PANEL = 64;       // columns of a packed panel
constexpr int QUERIES = 24;     // forward: queries of a block, a multiple of ROWS
constexpr int KEYS = 256;       // forward: keys of a block, a multiple of PANEL
constexpr int BACK_QUERIES = 512, BACK_KEYS = 96;  // backward: multiples of PANEL, and of ROWS and 2

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

// The tile that covers `columns` (a multiple of 16, at most 64): calls done(NZ, tile), so that it can leave the registers
// for its place without a detour.
template <class Done>
static inline void columns_of(const bf16* const* a, const uint32_t* b, long stride, long pairs, int columns, Done done) {
    const auto run = [&](auto nz) __attribute__((always_inline)) {
        __m512 c[ROWS][nz()];
        tile<nz()>(a, b, stride, pairs, c);
        done(nz, c);
    };
    switch (columns / 16) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        default: return run(std::integral_constant<int, 4>());
    }
}

// Every value of a tile: body(row, vector, value).
template <int NZ, class Body>
static inline __attribute__((always_inline)) void each(const __m512 (&c)[ROWS][NZ], Body body) {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int z = 0; z < NZ; z++) body(r, z, c[r][z]);
}

struct Segment {
    int begin, end;        // its queries and own keys, as positions in the row
    int prefix, shared;    // where its shared prefix begins, and how long that is (0: none)
    int queries() const { return end - begin; }
    int keys() const { return shared + end - begin; }
    int token(int key) const { return key < shared ? prefix + key : begin + key - shared; }
};

static inline int up(int n, int to) { return (n + to - 1) / to * to; }

// Panel `p` of the columns [first, last), both multiples of 16: calls done(first column, NZ, tile) for those it holds.
template <class Done>
static inline void panel_of(const bf16* const* a, const uint32_t* panel, long stride, long pairs, int p, int first, int last,
                            Done done) {
    const int begin = std::max(first, p * PANEL), end = std::min(last, (p + 1) * PANEL);
    columns_of(a, panel + begin - p * PANEL, stride, pairs, end - begin,
               [&](auto nz, const auto& c) __attribute__((always_inline)) { done(begin, nz, c); });
}

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

// Six rows of x as a tile's operand; rows beyond `last` repeat it.
template <class Row>
static inline void rows_of(Row row, int first, int last, const bf16* a[ROWS]) {
    for (int r = 0; r < ROWS; r++) a[r] = row(std::min(first + r, last));
}

// One query head of one segment: out[token][head] and lse[head][token]. Softmax over blocks of keys, rescaled where a
// later block holds a larger score (Milakov & Gimelshein, 2018, arXiv:1805.02867).
static void forward_head(const Shape& s, const Segment& g, int head, const bf16* q, bf16* out, float* lse,
                         const uint32_t* kt, const uint32_t* vp, Scratch& scratch) {
    const int n = g.queries(), padded = up(g.keys(), PANEL), d = s.d;
    const float scale = s.scale * LOG2E;  // softmax in powers of two
    const __m512 factor = _mm512_set1_ps(scale);
    float* scores = scratch.get<float>(2, QUERIES * KEYS);
    bf16* weights = scratch.get<bf16>(3, QUERIES * KEYS);
    float* sums = scratch.get<float>(4, (long)QUERIES * d);
    for (int i0 = 0; i0 < n; i0 += QUERIES) {
        const int rows = std::min(QUERIES, n - i0), seen = g.shared + i0;  // query i0 sees `seen` keys before its own
        float most[QUERIES], total[QUERIES];
        std::fill(most, most + QUERIES, -INFINITY);
        std::fill(total, total + QUERIES, 0.0f);
        std::memset(sums, 0, sizeof(float) * QUERIES * d);
        const int start = s.window ? std::max(0, seen + 1 - s.window) / PANEL * PANEL : 0, stop = up(seen + rows, 16);
        for (int j0 = start; j0 < stop; j0 += KEYS) {
            const int j1 = std::min(stop, j0 + KEYS);
            for (int p = j0 / PANEL; p * PANEL < j1; p++)
                for (int r0 = 0; r0 < rows; r0 += ROWS) {
                    const bf16* a[ROWS];
                    rows_of([&](int i) { return q + ((long)(g.begin + i) * s.heads + head) * d; }, i0 + r0, n - 1, a);
                    panel_of(a, kt + (long)p * PANEL * d / 2, PANEL, d / 2, p, j0, j1, [&](int j, auto, const auto& c) {
                        float* place = scores + r0 * KEYS + j - j0;
                        each(c, [&](int r, int z, __m512 x) { _mm512_storeu_ps(place + r * KEYS + 16 * z, x); });
                    });
                }
            for (int r = 0; r < rows; r++) {
                const int last = seen + r + 1, first = s.window ? last - s.window : 0;
                const float* row = scores + r * KEYS - j0;
                bf16* weight = weights + r * KEYS - j0;
                __m512 top = _mm512_set1_ps(most[r]);
                const bool whole = j1 <= last && first <= j0;
                for (int j = j0; j < j1; j += 16)
                    top = _mm512_mask_max_ps(top, whole ? 0xffff : between(j, first, last), top,
                                             _mm512_mul_ps(_mm512_loadu_ps(row + j), factor));
                const float now = _mm512_reduce_max_ps(top);
                // A block that the query does not see at all leaves zeros.
                const __m512 shift = _mm512_set1_ps(now == -INFINITY ? 0 : now);
                __m512 sum = _mm512_setzero_ps();
                for (int j = j0; j < j1; j += 16) {
                    __m512 e = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), factor, shift));
                    if (!whole) e = _mm512_maskz_mov_ps(between(j, first, last), e);
                    sum = _mm512_add_ps(sum, e);
                    store16(weight + j, e);
                }
                const float rescale = most[r] == -INFINITY ? 0 : std::exp2(most[r] - now);
                if (rescale != 1)
                    for (int c = 0; c < d; c += 16)
                        _mm512_storeu_ps(sums + r * d + c,
                                         _mm512_mul_ps(_mm512_loadu_ps(sums + r * d + c), _mm512_set1_ps(rescale)));
                total[r] = total[r] * rescale + _mm512_reduce_add_ps(sum);
                most[r] = now;
            }
            const uint32_t* panel = vp;
            for (int c0 = 0; c0 < d; c0 += PANEL) {
                const int width = std::min(PANEL, d - c0);
                for (int r0 = 0; r0 < rows; r0 += ROWS) {
                    const bf16* a[ROWS];
                    rows_of([&](int r) { return weights + r * KEYS; }, r0, rows - 1, a);
                    columns_of(a, panel + (long)j0 / 2 * width, width, (j1 - j0) / 2, width, [&](auto, const auto& c) {
                        float* place = sums + r0 * d + c0;
                        each(c, [&](int r, int z, __m512 x) {
                            float* sum = place + r * d + 16 * z;
                            _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), x));
                        });
                    });
                }
                panel += (long)padded / 2 * width;
            }
        }
        for (int r = 0; r < rows; r++) {
            const long token = g.begin + i0 + r;
            for (int c = 0; c < d; c += 16)
                store16(out + (token * s.heads + head) * d + c,
                        _mm512_div_ps(_mm512_loadu_ps(sums + r * d + c), _mm512_set1_ps(total[r])));
            lse[head * s.tokens + token] = most[r] / LOG2E + std::log(total[r]);
        }
    }
}

// The backward pass of one query head over a block of queries, with everything that it reads.
struct BackwardBlock {
    const Shape& s;
    const Segment& g;
    int head, kv;
    int first, n;       // the block's queries, counted from the segment's first one
    int ahead;          // query i of the block sees ahead + i + 1 keys
    int padded, width;  // n in whole panels, and in whole vectors
    const bf16 *k, *v;
    uint32_t *qt, *qp, *gt, *gp;  // queries and gradients of the output, packed both ways
    float *norm, *delta;          // log2-sum-exp2 of each query's scores; rowsum(dO · O)
    bf16 *pt, *st;                // [BACK_KEYS][padded]: softmax weights and gradients of the scores, transposed
    uint32_t* sp;                 // [BACK_KEYS/2][padded]: the latter as pairs of keys
    float* dqt;                   // [d][padded]: gradient of the queries, transposed

    // Weights and score gradients of the six keys from k0 on and of the queries [begin, end) of panel p.
    void scores(int p, int b0, int k0, int begin, int end) {
        const int d = s.d, keys = ahead + n;
        const bf16 *kr[ROWS], *vr[ROWS];
        const auto row = [&](const bf16* x) {
            return [=](int key) { return x + ((long)g.token(key) * s.kv_heads + kv) * d; };
        };
        rows_of(row(k), k0, keys - 1, kr);
        rows_of(row(v), k0, keys - 1, vr);
        float products[ROWS][PANEL], slopes[ROWS][PANEL];  // K Qᵀ and V dOᵀ
        panel_of(kr, qt + (long)p * PANEL * d / 2, PANEL, d / 2, p, begin, end, [&](int, auto, const auto& c) {
            each(c, [&](int r, int z, __m512 x) { _mm512_storeu_ps(products[r] + 16 * z, x); });
        });
        panel_of(vr, gt + (long)p * PANEL * d / 2, PANEL, d / 2, p, begin, end, [&](int, auto, const auto& c) {
            each(c, [&](int r, int z, __m512 x) { _mm512_storeu_ps(slopes[r] + 16 * z, x); });
        });
        const __m512 factor = _mm512_set1_ps(s.scale * LOG2E);
        for (int i = begin; i < end; i += 16) {
            // Where all these queries see all these keys, nothing is masked.
            const bool whole = !s.window && i >= k0 + ROWS - 1 - ahead && i + 16 <= n && k0 + ROWS <= keys;
            const __m512 base = _mm512_loadu_ps(norm + i), mean = _mm512_loadu_ps(delta + i);
            __m512i half[ROWS];
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const int key = k0 + r - ahead;  // the query at the same place
                const int last = key + ahead >= keys ? 0 : s.window ? std::min(n, key + s.window) : n;
                const __mmask16 seen = whole ? 0xffff : between(i, std::max(0, key), last);
                const long at = (long)(k0 - b0 + r) * padded + i;
                __m512 w = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(products[r] + i - begin), factor, base));
                w = _mm512_maskz_mov_ps(seen, w);
                store16(pt + at, w);
                // Times the scale at the end, where dq and dk are written.
                const __m512 ds = _mm512_maskz_mul_ps(seen, w, _mm512_sub_ps(_mm512_loadu_ps(slopes[r] + i - begin), mean));
                const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(ds);
                _mm256_storeu_si256((__m256i*)(st + at), narrow);
                half[r] = _mm512_cvtepu16_epi32(narrow);
            }
            for (int r = 0; r < ROWS; r += 2)
                _mm512_storeu_si512(sp + (long)(k0 - b0 + r) / 2 * padded + i,
                                    _mm512_or_si512(half[r], _mm512_slli_epi32(half[r + 1], 16)));
        }
    }

    // to[key][d] += times · (rows of x, [BACK_KEYS][padded]) · (packed rows of the queries), queries from `begin` on
    void into_keys(const bf16* x, const uint32_t* packed, float* to, float times, int b0, int b1, int low, int high) {
        const int d = s.d;
        for (int c0 = 0; c0 < d; c0 += PANEL) {
            const int columns = std::min(PANEL, d - c0);
            for (int k0 = b0; k0 < b1; k0 += ROWS) {
                const int begin = std::max(low, (k0 - ahead) / 16 * 16);
                if (begin >= high) continue;
                const bf16* a[ROWS];
                rows_of([&](int r) { return x + (long)r * padded + begin; }, k0 - b0, BACK_KEYS - 1, a);
                columns_of(a, packed + (long)begin / 2 * columns, columns, (high - begin) / 2, columns,
                           [&](auto, const auto& c) {
                               each(c, [&](int r, int z, __m512 x) {
                                   if (k0 + r >= b1) return;
                                   float* place = to + (long)(k0 + r) * d + c0 + 16 * z;
                                   x = _mm512_fmadd_ps(x, _mm512_set1_ps(times), _mm512_loadu_ps(place));
                                   _mm512_storeu_ps(place, x);
                               });
                           });
            }
            packed += (long)padded / 2 * columns;
        }
    }

    // dqt += (columns of the keys) · (score gradients as pairs of keys)
    void into_queries(const bf16* key_columns, long stride, int b0, int b1, int low, int high) {
        for (int p = low / PANEL; p * PANEL < high; p++)
            for (int d0 = 0; d0 < s.d; d0 += ROWS) {
                const bf16* a[ROWS];
                rows_of([&](int c) { return key_columns + c * stride + b0; }, d0, s.d - 1, a);
                panel_of(a, sp + p * PANEL, padded, up(b1 - b0, ROWS) / 2, p, low, high, [&](int i, auto, const auto& c) {
                    each(c, [&](int r, int z, __m512 x) {
                        if (d0 + r >= s.d) return;
                        float* place = dqt + (long)(d0 + r) * padded + i + 16 * z;
                        _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), x));
                    });
                });
            }
    }
};

// One query head of one segment, backward: dq[token][head]; dk and dv [keys][d] float32 are added to.
static void backward_head(const Shape& s, const Segment& g, int head, const bf16* q, const bf16* k, const bf16* v,
                          const bf16* out, const bf16* grad, const float* lse, bf16* dq, float* dk, float* dv,
                          const bf16* key_columns, long stride, Scratch& scratch) {
    const int d = s.d;
    for (int first = 0; first < g.queries(); first += BACK_QUERIES) {
        const int n = std::min(BACK_QUERIES, g.queries() - first), padded = up(n, PANEL);
        const auto at = [&](const bf16* x, int i) { return x + ((long)(g.begin + first + i) * s.heads + head) * d; };
        const auto packed = [&](int number) { return scratch.get<uint32_t>(number, (long)padded * d / 2); };
        BackwardBlock b{s, g, head, head / (s.heads / s.kv_heads), first, n, g.shared + first, padded, up(n, 16), k, v,
                        packed(4), packed(5), packed(6), packed(7), scratch.get<float>(8, padded),
                        scratch.get<float>(9, padded), scratch.get<bf16>(10, (long)BACK_KEYS * padded),
                        scratch.get<bf16>(11, (long)BACK_KEYS * padded),
                        scratch.get<uint32_t>(12, (long)BACK_KEYS / 2 * padded), scratch.get<float>(13, (long)d * padded)};
        pack_columns([&](int i) { return at(q, i); }, n, d, b.qt);
        pack_rows([&](int i) { return at(q, i); }, n, d, b.qp);
        pack_columns([&](int i) { return at(grad, i); }, n, d, b.gt);
        pack_rows([&](int i) { return at(grad, i); }, n, d, b.gp);
        for (int i = 0; i < padded; i++) {
            b.norm[i] = i < n ? lse[(long)head * s.tokens + g.begin + first + i] * LOG2E : 0;
            __m512 sum = _mm512_setzero_ps();
            for (int c = 0; c < d && i < n; c += 16)
                sum = _mm512_fmadd_ps(load16(at(out, i) + c), load16(at(grad, i) + c), sum);
            b.delta[i] = _mm512_reduce_add_ps(sum);
        }
        std::memset(b.dqt, 0, sizeof(float) * d * padded);
        const int keys = b.ahead + n, start = s.window ? std::max(0, b.ahead + 1 - s.window) / 2 * 2 : 0;
        for (int b0 = start; b0 < keys; b0 += BACK_KEYS) {
            const int b1 = std::min(keys, b0 + BACK_KEYS);
            // The queries [low, high) that see some of the block's keys: with a window, none far behind them.
            const int low = std::max(0, b0 - b.ahead) / 16 * 16;
            const int high = s.window ? std::min(b.width, up(std::max(0, b1 - 1 - b.ahead + s.window), 16)) : b.width;
            if (low >= high) continue;
            for (int p = low / PANEL; p * PANEL < high; p++)
                for (int k0 = b0; k0 < b1; k0 += ROWS) {
                    // Queries before the first key of the six see none of them.
                    const int from = std::max(low, p * PANEL), to = std::min(high, (p + 1) * PANEL);
                    const int begin = std::min(to, std::max(from, (k0 - b.ahead) / 16 * 16));
                    for (int r = 0; r < ROWS / 2; r++)
                        std::memset(b.sp + (long)((k0 - b0) / 2 + r) * padded + from, 0, sizeof(uint32_t) * (begin - from));
                    if (begin < to) b.scores(p, b0, k0, begin, to);
                }
            b.into_keys(b.pt, b.gp, dv, 1.0f, b0, b1, low, high);
            b.into_keys(b.st, b.qp, dk, s.scale, b0, b1, low, high);
            b.into_queries(key_columns, stride, b0, b1, low, high);
        }
        for (int i0 = 0; i0 < n; i0 += 16)
            for (int c = 0; c < d; c += 16) {
                __m512i block[16];
                for (int r = 0; r < 16; r++) block[r] = _mm512_loadu_si512(b.dqt + (long)(c + r) * padded + i0);
                transpose16(block);
                for (int r = 0; r < std::min(16, n - i0); r++)
                    store16(dq + ((long)(g.begin + first + i0 + r) * s.heads + head) * d + c,
                            _mm512_mul_ps(_mm512_castsi512_ps(block[r]), _mm512_set1_ps(s.scale)));
            }
    }
}

// Helpers over AVX-512 vectors of sixteen values.

#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef uint16_t bf16;

static inline __m512i wide16(const bf16* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m512 load16(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(wide16(p), 16)); }
static inline void store16(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// Lanes i of sixteen with first <= at + i < last.
static inline __mmask16 between(int at, int first, int last) {
    const int low = std::min(16, std::max(0, first - at)), high = std::min(16, std::max(0, last - at));
    return low >= high ? 0 : (__mmask16)(((1u << high) - 1) & ~((1u << low) - 1));
}

// 2^x within 1e-7 of it, 0 where x is far below zero: x = n + f, and a polynomial in f fitted over [-1/2, 1/2] to the
// least largest relative error.
static inline __m512 exp2_16(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, 0);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(1.3264730805531144e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.671512991189957e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.550733581185341e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022242426872253e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.931470036506653e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

constexpr float LOG2E = 1.44269504088896341f;

static inline __m512 exp16(__m512 x) { return exp2_16(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E))); }

// 1 / (1 + exp(-x))
static inline __m512 sigmoid16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// A 16 × 16 block of 32-bit values, rows to columns.
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// A thread's working memory: numbered blocks that only grow.
struct Scratch {
    void* block[16] = {};
    size_t size[16] = {};
    template <class T>
    T* get(int number, long count) {
        const size_t bytes = ((size_t)count * sizeof(T) + 127) / 64 * 64;
        if (bytes > size[number]) {
            std::free(block[number]);
            block[number] = std::aligned_alloc(64, bytes);
            size[number] = bytes;
        }
        return (T*)block[number];
    }
    ~Scratch() {
        for (void* b : block) std::free(b);
    }
};

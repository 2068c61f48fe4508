/* Stores of float32 vectors as bfloat16, rounded to nearest even. */
#ifndef TW_NARROW_H
#define TW_NARROW_H

#include "tw_half.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/* to[0..count) = from[0..count). AVX-512 BF16 takes subnormal numbers as zeros. */
static inline void tw_store_bf16(uint16_t *restrict to, const float *restrict from, int64_t count) {
#if defined(__AVX512BF16__)
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
    }
    if (i < count) {
        const __mmask16 mask = (__mmask16)((1u << (count - i)) - 1);
        _mm256_mask_storeu_epi16(to + i, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from + i)));
    }
#else
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        to[i] = tw_f32_to_bf16(from[i]);
    }
#endif
}

#endif

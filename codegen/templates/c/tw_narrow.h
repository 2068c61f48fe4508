/* Stores of float32 vectors as bfloat16, rounded to nearest even. */
#ifndef TW_NARROW_H
#define TW_NARROW_H

#include "tw_half.h"

#if defined(__AVX512BF16__)
#include "tw_intrinsics.h"
#endif

/* to[0..count) = from[0..count). AVX-512 BF16 takes subnormal numbers as zeros.
 *
 * A few are taken in vectors of 8: compilers write `from` in such where bfloat16 is read beside, and what was just written
 * in two parts cannot be handed on to a load of both. The first ones of a long row have been in the cache for a while. */
static inline void tw_store_bf16(uint16_t *restrict to, const float *restrict from, int64_t count) {
#if defined(__AVX512BF16__)
    int64_t i = 0;
    if (count >= 64) {
        for (; i + 32 <= count; i += 32) {
            const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + 16);
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
    for (; i + 8 <= count; i += 8) {
        _mm_storeu_si128((__m128i *)(to + i), (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(from + i)));
    }
    if (i < count) {
        const __mmask8 mask = (__mmask8)((1u << (count - i)) - 1);
        _mm_mask_storeu_epi16(to + i, mask, (__m128i)_mm256_cvtneps_pbh(_mm256_maskz_loadu_ps(mask, from + i)));
    }
#else
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        to[i] = tw_f32_to_bf16(from[i]);
    }
#endif
}

#endif

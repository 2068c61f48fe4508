/* Sums of long rows: four vectors side by side, so that no addition waits for the one before it, and their lanes at the
 * end as a tree. Compilers would add up the lanes of a vector one after another.
 */
#ifndef TW_SUMS_H
#define TW_SUMS_H

#include "tw_intrinsics.h"
#include "tw_simd.h"

#define TW_TERMS 256 /* terms that are computed before they are added */

/* Reduce the lanes of a vector with OP, always in the same order: halves first. */
#if TW_LANES == 16
#define TW_HALVES(v, OP) \
    OP(_mm512_castps512_ps256((__m512)(v)), \
       _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)(v)), 1)))
#else
#define TW_HALVES(v, OP) ((__m256)(v))
#endif
#define TW_REDUCE(v, OP) \
    const __m256 eight = TW_HALVES(v, _mm256_##OP##_ps); \
    const __m128 four = _mm_##OP##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    const __m128 two = _mm_##OP##_ps(four, _mm_movehl_ps(four, four)); \
    return _mm_cvtss_f32(_mm_##OP##_ss(two, _mm_movehdup_ps(two)));
static inline float tw_lanes_max(tw_vec v) { TW_REDUCE(v, max) }
static inline float tw_lanes_sum(tw_vec v) { TW_REDUCE(v, add) }

typedef struct {
    tw_vec of[4];
} tw_sums;

/* Adds `count` floats, each to the same sum wherever they are cut at a multiple of TW_TERMS. */
static inline void tw_add_row(tw_sums *sums, const float *from, int64_t count) {
    enum { STEP = 4 * TW_LANES };
    tw_vec a = sums->of[0], b = sums->of[1], c = sums->of[2], d = sums->of[3];
    int64_t at = 0;
    for (; at + STEP <= count; at += STEP) {
        a += tw_load(from + at), b += tw_load(from + at + TW_LANES);
        c += tw_load(from + at + 2 * TW_LANES), d += tw_load(from + at + 3 * TW_LANES);
    }
    if (at < count) {
        float rest[STEP] = {0};
        memcpy(rest, from + at, (count - at) * sizeof *rest);
        a += tw_load(rest), b += tw_load(rest + TW_LANES);
        c += tw_load(rest + 2 * TW_LANES), d += tw_load(rest + 3 * TW_LANES);
    }
    sums->of[0] = a, sums->of[1] = b, sums->of[2] = c, sums->of[3] = d;
}

static inline float tw_total(const tw_sums *sums) {
    return tw_lanes_sum((sums->of[0] + sums->of[1]) + (sums->of[2] + sums->of[3]));
}

#endif

/* What the attention kernel does between its two matrix products: transposing keys, the running softmax of a row.
 *
 * The softmax is the streaming one (M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018;
 * T. Dao et al., "FlashAttention", 2022): a row keeps its maximum and the sum of exponentials so far, and what it has
 * accumulated is scaled when the maximum grows.
 */
#ifndef TW_ATTENTION_H
#define TW_ATTENTION_H

#include <immintrin.h>

#include "tw_math.h"
#include "tw_simd.h"

typedef int32_t tw_ivec __attribute__((vector_size(TW_LANES * 4)));

/* The second operand where either is NaN. */
#if TW_LANES == 16
#define TW_MAX(a, b) ((tw_vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#else
#define TW_MAX(a, b) ((tw_vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#endif

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

/* tw_exp_nonpositive_f32 on a vector; NaN stays NaN. */
static inline tw_vec tw_exp_nonpositive_vec(tw_vec x) {
    const tw_vec zero = {0}, bound = zero - 87.3f;
    const tw_vec low = TW_MAX(bound, x);
    const tw_vec shifted = low * TW_LOG2E_HIGH + TW_SHIFT, n = shifted - TW_SHIFT;
    const tw_vec r = n * -TW_LN2_LOW + (n * -TW_LN2_HIGH + low);
    tw_vec p = r * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
    p = r * p + 0x1.5558f2p-5f;
    p = r * p + 0x1.555492p-3f;
    p = r * p + 0x1.fffffcp-2f;
    p = (r * r) * p + r + 1.0f;
    p *= (tw_vec)(((tw_ivec)shifted << 23) + 0x3f800000);
    return (tw_vec)((tw_ivec)p & ~(x < bound));
}

/* to[c * 32 + r] = row r's element c, for 8 rows and 8 elements */
static inline void tw_transpose_8x8(const float *const *rows, int64_t at, float *to) {
    for (int half = 0; half < 8; half += 4) {
        __m256 v[4];
        for (int r = 0; r < 4; r++) {
            v[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[r] + at + half)),
                                        _mm_loadu_ps(rows[r + 4] + at + half), 1);
        }
        const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
        const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
        _mm256_storeu_ps(to + (half + 0) * TW_PANEL, _mm256_shuffle_ps(a, c, 0x44));
        _mm256_storeu_ps(to + (half + 1) * TW_PANEL, _mm256_shuffle_ps(a, c, 0xee));
        _mm256_storeu_ps(to + (half + 2) * TW_PANEL, _mm256_shuffle_ps(b, d, 0x44));
        _mm256_storeu_ps(to + (half + 3) * TW_PANEL, _mm256_shuffle_ps(b, d, 0xee));
    }
}

/* panel[d][32] = 32 rows of `length` floats, transposed */
static inline void tw_pack_transposed(float *panel, const float *const *rows, int64_t length) {
    for (int64_t row = 0; row < TW_PANEL; row += 8) {
        if (length < 8) {
            for (int64_t d = 0; d < length; d++) {
                for (int64_t r = row; r < row + 8; r++) {
                    panel[d * TW_PANEL + r] = rows[r][d];
                }
            }
            continue;
        }
        /* The last step overlaps the one before it where 8 does not divide the length. */
        for (int64_t d = 0; d < length; d += 8) {
            const int64_t at = tw_smaller(d, length - 8);
            tw_transpose_8x8(rows + row, at, panel + at * TW_PANEL + row);
        }
    }
}

/* Turns `panels` groups of 32 scores (`step` floats apart) of one row into exponentials against the running maximum and
   adds them to the running sum. Returns the factor for what the row has accumulated so far. A row that has met only
   -infinity keeps the sum 0. */
static inline float tw_softmax_block(float *row, int64_t step, int64_t panels, float *maximum, float *sum) {
    tw_vec best = tw_load(row);
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t at = 0; at < TW_PANEL; at += TW_LANES) {
            best = TW_MAX(best, tw_load(row + p * step + at));
        }
    }
    const float before = *maximum, block = tw_lanes_max(best);
    const float now = block > before ? block : before;
    const float shift = now == -INFINITY ? 0.0f : now;
    const float factor = now == before ? 1.0f : tw_exp_nonpositive_f32(before - shift);
    tw_vec total = {0};
    for (int64_t p = 0; p < panels; p++) {
        for (int64_t at = 0; at < TW_PANEL; at += TW_LANES) {
            float *const scores = row + p * step + at;
            const tw_vec e = tw_exp_nonpositive_vec(tw_load(scores) - shift);
            tw_store(scores, e);
            total += e;
        }
    }
    *maximum = now;
    *sum = *sum * factor + tw_lanes_sum(total);
    return factor;
}

#endif

/* Products of one quantized row: on AVX2, several panels at once, step by step.
 *
 * One row does so little with a weight that memory alone counts, and a core reads several streams faster than one: where one
 * comes to the end of a page and its prefetcher begins anew, the others go on. docs/speed.md has the measurements.
 *
 * The sums of a step are exact and are added up as in tw_quantized_products.h, so a row gives the same bits either way.
 */
#ifndef TW_QUANTIZED_STREAMS_H
#define TW_QUANTIZED_STREAMS_H

#include "tw_quantized_products.h"

#if TW_LANES == 8
#define TW_STREAMS_Q 4 /* panels that are read at once */

/* A word of 8 terms with 8 columns at `at`. */
#define TW_STREAM_WORD_int4(sum, at) \
    { \
        const tw_q w = TW_LOAD_Q(at); \
        sum = TW_ADD16_Q(sum, TW_PAIRS_Q(TW_AND_Q(w, TW_BYTES_Q(15)), low)); \
        sum = TW_ADD16_Q(sum, TW_PAIRS_Q(TW_HIGH_Q(w), high)); \
    }
/* Half a step: 16 columns. */
#define TW_STREAM_HALF_int4(a, b, half) \
    _Pragma("GCC unroll 4") for (int64_t p = 0; p < 4; p++) { \
        const tw_q low = TW_WORD_Q(codes + p * 8), high = TW_WORD_Q(codes + p * 8 + 4); \
        TW_STREAM_WORD_int4(a, (half) + p * 64) \
        TW_STREAM_WORD_int4(b, (half) + p * 64 + 32) \
        TW_KEEP_Q(a, b); \
    }

/* 8 bits as in tw_quantized_signed.h, but the halves of a step one after the other, as they lie. */
#define TW_STREAM_HALF_int8(a, b, half) \
    _Pragma("GCC unroll 8") for (int64_t word = 0; word < 8; word++) { \
        const __m256i sizes = TW_WORD_Q(codes + word * 8), signs = TW_WORD_Q(codes + word * 8 + 4); \
        a = tw_signed_sum(a, tw_signed_word(sizes, signs, (half) + word * 64)); \
        b = tw_signed_sum(b, tw_signed_word(sizes, signs, (half) + word * 64 + 32)); \
        TW_KEEP_Q(a, b); \
    }

/* sums[n..n+8) += (sum - zero point * sum of the row's codes) * (weight's scale * row's scale). */
static inline void tw_stream_add_int4(
    tw_q sum, const uint8_t *header, int zeros, float scale, float less, int64_t n, float *sums) {
    tw_vec value = TW_FLOAT_Q(TW_SUM_int4(sum));
    if (zeros) {
        const __m128i points = _mm_loadl_epi64((const __m128i *)(header + TW_SCALES_int4 + n));
        value -= TW_FLOAT_Q(_mm256_cvtepu8_epi32(points)) * less;
    }
    const tw_vec scales = (tw_vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(header + 2 * n)));
    tw_store(sums + n, tw_load(sums + n) + value * (scales * scale));
}

/* A step of a panel: header and step are where these lie. */
static inline void tw_stream_int4(
    const int8_t *codes, float scale, int32_t row_sum, const uint8_t *header, const uint8_t *step, int zeros, float *sums) {
    tw_q a = zeros ? TW_BYTES_Q(0) : _mm256_set1_epi32(row_sum), b = a, c = a, d = a;
    const float less = (float)row_sum;
    TW_STREAM_HALF_int4(a, b, step)
    TW_STREAM_HALF_int4(c, d, step + TW_HALF_int4)
    TW_ADD_COLUMNS_Q(tw_stream_add_int4)
}
static inline void tw_stream_int8(
    const int8_t *codes, float scale, int32_t row_sum, const uint8_t *header, const uint8_t *step, int zeros, float *sums) {
    tw_q a = _mm256_set1_epi32(row_sum >> 16), b = a, c = a, d = a;
    const float less = (float)(int16_t)row_sum;
    TW_STREAM_HALF_int8(a, b, step)
    TW_STREAM_HALF_int8(c, d, step + TW_HALF_int8)
    TW_ADD_COLUMNS_Q(tw_signed_add)
}

/* sums[panels][32] += the products of a row with some panels, `apart` bytes apart. */
#define TW_DEFINE_STREAMS(KIND) \
    static inline void tw_streams_##KIND( \
        const tw_quantized *x, const uint8_t *first, int64_t apart, int64_t panels, int64_t per, int zeros, float *sums) { \
        for (int64_t s = 0; s < x->steps; s++) { \
            const int64_t group = s / per, header = TW_GROUPS_BYTES(KIND, zeros, group, per); \
            const int64_t step = header + TW_HEADER_BYTES(KIND, zeros) + (s - group * per) * TW_STEP_BYTES(KIND); \
            const int8_t *const codes = x->codes + s * TW_STEP_K * TW_CODE_BYTES_##KIND; \
            for (int64_t i = 0; i < panels; i++) { \
                const uint8_t *const panel = first + i * apart; \
                tw_stream_##KIND( \
                    codes, x->scales[s], x->sums[s], panel + header, panel + step, zeros, sums + i * TW_PANEL); \
            } \
        } \
    }
TW_DEFINE_STREAMS(int4)
TW_DEFINE_STREAMS(int8)

static inline void tw_streams_whole_int8(
    const tw_quantized *x, const uint8_t *first, int64_t apart, int64_t panels, int32_t *totals) {
    for (int64_t s = 0; s < x->steps; s++) {
        const int8_t *const codes = x->codes + s * TW_STEP_K * TW_CODE_BYTES_int8;
        for (int64_t i = 0; i < panels; i++) {
            const uint8_t *const step = first + i * apart + TW_HEADER_BYTES(int8, 0) + s * TW_STEP_BYTES(int8);
            TW_SIGNED_RESUME(totals + i * TW_PANEL)
            TW_STREAM_HALF_int8(a, b, step)
            TW_STREAM_HALF_int8(c, d, step + TW_HALF_int8)
            TW_SIGNED_LEAVE
        }
    }
}
#define TW_IF_ONE_ROW(product, ...) \
    if (x->rows == 1) { \
        product(x, first, apart, panels, __VA_ARGS__); \
        return; \
    }
#else
#define TW_STREAMS_Q 1
#define TW_IF_ONE_ROW(product, ...)
#endif

/* How many of the panels that are left are multiplied at once. */
static inline int64_t tw_together_q(int64_t rows, int64_t left) {
    return rows == 1 ? tw_smaller(TW_STREAMS_Q, left) : 1;
}

/* sums[panels][rows][32] += the products with some panels, `apart` bytes apart. */
#define TW_DEFINE_PRODUCTS_Q(KIND) \
    static inline void tw_products_##KIND( \
        const tw_quantized *x, const uint8_t *first, int64_t apart, int64_t panels, int64_t per, int zeros, float *sums) { \
        TW_IF_ONE_ROW(tw_streams_##KIND, per, zeros, sums) \
        for (int64_t i = 0; i < panels; i++) { \
            tw_product_##KIND(x, first + i * apart, per, zeros, sums + i * x->rows * TW_PANEL); \
        } \
    }
TW_DEFINE_PRODUCTS_Q(int4)
TW_DEFINE_PRODUCTS_Q(int8)

/* totals[panels][rows][32] += the products with panels that are one group each, as integers. */
static inline void tw_products_whole_int8(
    const tw_quantized *x, const uint8_t *first, int64_t apart, int64_t panels, int32_t *totals) {
    TW_IF_ONE_ROW(tw_streams_whole_int8, totals)
    for (int64_t i = 0; i < panels; i++) {
        tw_product_whole_int8(x, first + i * apart, totals + i * x->rows * TW_PANEL);
    }
}

#endif

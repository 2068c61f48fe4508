/* Products of quantized rows and a panel of quantized weights (tw_quantized.h says how both lie).
 *
 * A step's products are summed exactly; the sums of steps are added up in float32 in the order of k, as
 * (sum of code * x - zero * sum of x) * (weight's scale * row's scale). What a row gives depends neither on the rows beside
 * it nor on where a chunk of steps ends.
 *
 * Codes of 4 bits are multiplied unsigned (vpmaddubsw): 8 products of two fit 16 bits, 8 * 2 * 15 * 127 < 2^15. Of 8 bits,
 * AVX-512 changes the signs of activations, |w| * (sign(w) * x), and one product of two fits, 2 * 127 * 127 < 2^15. VNNI
 * sums four products in 32 bits at once; there codes of 8 bits are offset by 128 and the zero point with them. What AVX2
 * does is in tw_quantized_signed.h.
 *
 * A few rows meet the panel as it lies, at the memory's speed. With more, tiles of rows go over it chunk by chunk: AVX2
 * spreads a chunk of weights of 4 bits out first, once for all rows (tw_quantized_tiles.h); AVX-512 keeps sums in registers
 * (tw_quantized_held.h).
 */
#ifndef TW_QUANTIZED_PRODUCTS_H
#define TW_QUANTIZED_PRODUCTS_H

#include "tw_quantized.h"

#if TW_LANES == 16
#define TW_HALVES 1 /* passes over a step */
typedef __m512i tw_q;
#define TW_APART_Q(half) (half) /* bytes between the two vectors that go together */
#define TW_LOAD_Q(p) _mm512_loadu_si512(p)
#define TW_WORD_Q(p) _mm512_set1_epi32(tw_word_q(p))
#define TW_BYTES_Q(b) _mm512_set1_epi8(b)
#define TW_AND_Q(a, b) _mm512_and_si512(a, b)
#define TW_HIGH_Q(a) _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15))
#define TW_ADD16_Q(a, b) _mm512_add_epi16(a, b)
#define TW_ADD32_Q(a, b) _mm512_add_epi32(a, b)
#define TW_PAIRS_Q(a, b) _mm512_maddubs_epi16(a, b)
#define TW_WIDEN_Q(a) _mm512_madd_epi16(a, _mm512_set1_epi16(1))
#define TW_ABS_Q(a) _mm512_abs_epi8(a)
#define TW_SIGN_Q(a, sign) _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), a)
#define TW_FLOAT_Q(a) ((tw_vec)_mm512_cvtepi32_ps(a))
#define TW_KEEP_Q(a, b) __asm__("" : "+v"(a), "+v"(b))
#define TW_NEAR_Q _MM_HINT_T1 /* the cache into which chunks of panels are fetched */
#else
#define TW_HALVES 2
typedef __m256i tw_q;
#define TW_APART_Q(half) 32
#define TW_LOAD_Q(p) _mm256_loadu_si256((const __m256i *)(p))
#define TW_WORD_Q(p) _mm256_set1_epi32(tw_word_q(p))
#define TW_BYTES_Q(b) _mm256_set1_epi8(b)
#define TW_AND_Q(a, b) _mm256_and_si256(a, b)
#define TW_HIGH_Q(a) _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15))
#define TW_ADD16_Q(a, b) _mm256_add_epi16(a, b)
#define TW_ADD32_Q(a, b) _mm256_add_epi32(a, b)
#define TW_PAIRS_Q(a, b) _mm256_maddubs_epi16(a, b)
#define TW_WIDEN_Q(a) _mm256_madd_epi16(a, _mm256_set1_epi16(1))
#define TW_FLOAT_Q(a) ((tw_vec)_mm256_cvtepi32_ps(a))
#define TW_KEEP_Q(a, b) __asm__("" : "+x"(a), "+x"(b))
#define TW_NEAR_Q _MM_HINT_T0
#endif

#define TW_FEW_ROWS_Q 4 /* rows that meet a panel as it lies */
#define TW_FOR_EACH_ROWS_Q(X, KIND) X(KIND, 1) X(KIND, 2) X(KIND, 3) X(KIND, 4)
#define TW_SWITCH_ROWS_Q(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) \
        TW_CASE(function, 3, __VA_ARGS__) TW_CASE(function, 4, __VA_ARGS__) \
    }

static inline int32_t tw_word_q(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* Memory that is fetched a few lines at a time. */
typedef struct {
    const uint8_t *at, *end;
    int64_t lines;
} tw_fetch;

/* A tile's part of what comes next, `bytes` from `next` on, when `tiles` go over `steps` steps. */
static inline tw_fetch tw_fetch_of(const uint8_t *next, int64_t bytes, int64_t steps, int64_t t, int64_t tiles) {
    const int64_t lines = tw_ceildiv(tw_ceildiv(bytes, 64), TW_HALVES * steps * tiles);
    return (tw_fetch){next + t * TW_HALVES * steps * lines * 64, next + bytes, lines};
}
static inline void tw_fetch_some(tw_fetch *fetch) {
    for (int64_t line = 0; line < fetch->lines && fetch->at < fetch->end; line++, fetch->at += 64) {
        _mm_prefetch((const char *)fetch->at, TW_NEAR_Q);
    }
}

/* Sums of row r: two vectors side by side. The barrier keeps compilers from adding products to each other first, which
 * takes more registers than there are. */
#define TW_TERMS_Q(r, word, DOT, i, j) \
    { \
        const tw_q one = TW_WORD_Q(codes + ((word) * tw_r + r) * 4); \
        x##r = DOT(x##r, one, i), y##r = DOT(y##r, one, j); \
        TW_KEEP_Q(x##r, y##r); \
    }
#define TW_ZERO_Q(r) tw_q x##r = TW_BYTES_Q(0), y##r = x##r;
/* Weights of 4 bits without zero points of their own: see tw_place_codes. */
#define TW_START_Q(r) tw_q x##r = zeros ? TW_BYTES_Q(0) : TW_WORD_Q((const int8_t *)(row_sums + r)), y##r = x##r;

#if defined(__AVX512VNNI__)
#define TW_DOT_int4(sum, x, i) _mm512_dpbusd_epi32(sum, u##i, x)
#define TW_SUM_int4(sum) sum
#define TW_DOT_int8(sum, x, i) _mm512_dpbusd_epi32(sum, u##i, x)
#define TW_UNSIGNED_int8(w) _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80))
#elif TW_LANES == 16
#define TW_DOT_int4(sum, x, i) TW_ADD16_Q(sum, TW_PAIRS_Q(u##i, x))
#define TW_SUM_int4(sum) TW_WIDEN_Q(sum)
#define TW_DOT_int8(sum, x, i) TW_ADD32_Q(sum, TW_WIDEN_Q(TW_PAIRS_Q(u##i, TW_SIGN_Q(x, w##i))))
#define TW_UNSIGNED_int8(w) TW_ABS_Q(w)
#else
#define TW_DOT_int4(sum, x, i) TW_ADD16_Q(sum, TW_PAIRS_Q(u##i, x))
#define TW_SUM_int4(sum) TW_WIDEN_Q(sum)
#endif
#define TW_SUM_int8(sum) sum
#define TW_FIRST_int4(r) TW_TERMS_Q(r, 0, TW_DOT_int4, 0, 1)
#define TW_SECOND_int4(r) TW_TERMS_Q(r, 1, TW_DOT_int4, 0, 1)
#define TW_FIRST_int8(r) TW_TERMS_Q(r, 0, TW_DOT_int8, 0, 1)

/* What a half at `at` (AVX-512: both) adds to the sums of ROWS rows, from `codes` on. */
#define TW_TERMS_int4(ROWS) \
    for (int64_t p = 0; p < 4; p++, at += 64, codes += 8 * ROWS) { \
        const tw_q w0 = TW_LOAD_Q(at), w1 = TW_LOAD_Q(at + TW_APART_Q(TW_HALF_int4)); \
        { \
            const tw_q u0 = TW_AND_Q(w0, TW_BYTES_Q(15)), u1 = TW_AND_Q(w1, TW_BYTES_Q(15)); \
            TW_REPEAT_##ROWS(TW_FIRST_int4) \
        } \
        { \
            const tw_q u0 = TW_HIGH_Q(w0), u1 = TW_HIGH_Q(w1); \
            TW_REPEAT_##ROWS(TW_SECOND_int4) \
        } \
    }
#if TW_LANES == 16
#define TW_TERMS_int8(ROWS) \
    for (int64_t p = 0; p < 8; p++, at += 64, codes += 4 * ROWS) { \
        const tw_q w0 = TW_LOAD_Q(at), w1 = TW_LOAD_Q(at + TW_APART_Q(TW_HALF_int8)); \
        const tw_q u0 = TW_UNSIGNED_int8(w0), u1 = TW_UNSIGNED_int8(w1); \
        TW_REPEAT_##ROWS(TW_FIRST_int8) \
    }
#endif

#if TW_LANES == 16
#include "tw_quantized_few.h"
#else

/* Fetches half a step 8 KB further, and the line before it, which may be a header. */
static inline void tw_prefetch_half(const uint8_t *half, int64_t bytes) {
    for (int64_t at = 8192 - 64; at < 8192 + bytes; at += 64) {
        _mm_prefetch((const char *)half + at, _MM_HINT_T0);
    }
}

/* sums[r][column] += both scales times (the step's sum - zero point * sum of the row's codes). */
#define TW_ADD_TO_int4(r) \
    { \
        float *const to = sums + r * TW_PANEL + n; \
        const float scale = row_scales[r], total = (float)(zeros ? row_sums[r] : 0); \
        tw_vec f0 = TW_FLOAT_Q(TW_SUM_int4(x##r)), f1 = TW_FLOAT_Q(TW_SUM_int4(y##r)); \
        if (zeros) f0 -= z0 * total, f1 -= z1 * total; \
        tw_store(to, tw_load(to) + f0 * (s0 * scale)), tw_store(to + TW_LANES, tw_load(to + TW_LANES) + f1 * (s1 * scale)); \
    }

/* A panel of `end` steps, in groups of `per`, with a tile of ROWS rows; sums[r][32] is added to. */
#define TW_DEFINE_Q(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_quantized_##KIND##_##ROWS( \
        const int8_t *tile, const float *row_scales, const int32_t *row_sums, const uint8_t *panel, int64_t end, \
        int64_t per, int zeros, float *sums) { \
        enum { tw_r = ROWS, from = 0 }; \
        TW_FOR_EACH_STEP(KIND) \
            for (int64_t half = 0; half < 2; half++) { \
                const uint8_t *at = step + half * TW_HALF_##KIND; \
                const int8_t *codes = tile; \
                const int64_t n = half * 16; \
                tw_prefetch_half(at, TW_HALF_##KIND); \
                TW_REPEAT_##ROWS(TW_START_Q) \
                TW_TERMS_##KIND(ROWS) \
                const tw_vec s0 = tw_load(scales + n), s1 = tw_load(scales + n + TW_LANES); \
                const tw_vec z0 = tw_load(points + n), z1 = tw_load(points + n + TW_LANES); \
                __asm__ volatile("" ::: "memory"); /* sums stay in memory */ \
                TW_REPEAT_##ROWS(TW_ADD_TO_##KIND) \
            } \
            tile += TW_STEP_K * TW_CODE_BYTES_##KIND * ROWS, row_scales += ROWS, row_sums += ROWS; \
        TW_END_OF_STEPS \
    }
TW_FOR_EACH_ROWS_Q(TW_DEFINE_Q, int4)

#include "tw_quantized_signed.h"
#include "tw_quantized_tiles.h"

/* sums[rows][32] += the products with a panel, for any number of rows. */
static inline void tw_product_int4(const tw_quantized *x, const uint8_t *panel, int64_t per, int zeros, float *sums) {
    if (x->rows > TW_FEW_ROWS_Q) {
        tw_spread_product_int4(x, panel, per, zeros, sums);
        return;
    }
    TW_SWITCH_ROWS_Q(
        tw_quantized_int4_, x->rows, x->codes, x->scales, x->sums, panel, x->steps, per, zeros, sums)
}
#endif

/* In place: totals of a row become floats, times both scales. */
static inline void tw_scale_whole_int8(const tw_quantized *x, int64_t row, const uint8_t *panel, int32_t *totals) {
    const float *const scales = (const float *)panel;
    const tw_tile_q tile = tw_tile_of_q(x->rows, TW_ROWS_int8, row);
    const int64_t at = tile.first * x->steps + row - tile.first;
    const float scale = x->scales[at];
    const int32_t lacking = x->lacking[row];
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        const float total = (float)(totals[n] + lacking) * (scales[n] * scale);
        memcpy(totals + n, &total, sizeof total);
    }
}

#endif

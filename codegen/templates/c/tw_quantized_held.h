/* Products of many quantized rows and a panel of quantized weights on AVX-512: sums stay in registers.
 *
 * On Zen 4, storing a vector takes as long as two products of a word, while loads, broadcasts, shifts, masks and
 * conversions run beside the products. So tiles of 6 rows hold their sums, 2 x 6 of integers and 2 x 6 of floats, for a
 * chunk of steps that stays in the first-level cache. Every tile takes weights of 4 bits apart anew, as that is free.
 * Multiplying floats takes turns with the products; so what a symmetric weight's zero point takes away is where a step's
 * sums start, -8 (or -128) times the sum of the row's codes, which is exact either way. Meanwhile the next chunk is
 * fetched from memory into the second-level cache, shared out between the tiles.
 *
 * Sums of steps are exact and are added up as in tw_quantized_products.h, so a row gives the same bits either way.
 */
#ifndef TW_QUANTIZED_HELD_H
#define TW_QUANTIZED_HELD_H

#include "tw_quantized_products.h"

#define TW_HELD_BYTES 16384 /* of a chunk */
#define TW_HELD_STEPS(KIND) (TW_HELD_BYTES / TW_STEP_BYTES(KIND))

/* Vectors of a header: scales and zero points of columns from n on. */
#define TW_SCALES_AT_int4(n) (tw_vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(header + 2 * (n))))
#define TW_SCALES_AT_int8(n) tw_load((const float *)header + (n))
#define TW_BYTES_AT(KIND, n) _mm_loadu_si128((const __m128i *)(header + TW_SCALES_##KIND + (n)))
#define TW_STORED_AT_int4(n) _mm512_cvtepu8_epi32(TW_BYTES_AT(int4, n))
#define TW_STORED_AT_int8(n) _mm512_cvtepi8_epi32(TW_BYTES_AT(int8, n))
#define TW_STORED_POINTS_Q(KIND, n) \
    TW_FLOAT_Q(_mm512_add_epi32(TW_STORED_AT_##KIND(n), _mm512_set1_epi32(TW_OFFSET_##KIND)))
#define TW_COMMON_POINTS_Q(KIND, n) ((tw_vec)_mm512_set1_ps(TW_SYMMETRIC_##KIND + TW_OFFSET_##KIND))

/* How a symmetric weight's zero point is taken away: without VNNI, sums of 16 bits leave no room for a start. */
#define TW_LESS_Q(r) t0 -= z0 * (float)row_sums[r], t1 -= z1 * (float)row_sums[r];
#define TW_LESS_NOTHING_Q(r)
#if defined(__AVX512VNNI__)
#define TW_BELOW_Q(r, bits) \
    tw_q x##r = _mm512_sub_epi32(TW_BYTES_Q(0), _mm512_slli_epi32(_mm512_set1_epi32(row_sums[r]), bits)), y##r = x##r;
#define TW_BEGIN_HELD_int4(r) TW_BELOW_Q(r, 3)
#define TW_BEGIN_HELD_int8(r) TW_BELOW_Q(r, 7)
#define TW_LESS_HELD_int4 TW_LESS_NOTHING_Q
#else
#define TW_BEGIN_HELD_int4 TW_ZERO_Q
#define TW_BEGIN_HELD_int8 TW_ZERO_Q
#define TW_LESS_HELD_int4 TW_LESS_Q
#endif
#define TW_LESS_HELD_int8 TW_LESS_NOTHING_Q

#define TW_HOLD_Q(r) tw_vec f##r = tw_load(sums + r * TW_PANEL), g##r = tw_load(sums + r * TW_PANEL + TW_LANES);
#define TW_LEAVE_Q(r) tw_store(sums + r * TW_PANEL, f##r), tw_store(sums + r * TW_PANEL + TW_LANES, g##r);
#define TW_ADD_HELD_Q(KIND, r, LESS) \
    { \
        const float scale = row_scales[r]; \
        tw_vec t0 = TW_FLOAT_Q(TW_SUM_##KIND(x##r)), t1 = TW_FLOAT_Q(TW_SUM_##KIND(y##r)); \
        LESS(r) \
        f##r += t0 * (s0 * scale), g##r += t1 * (s1 * scale); \
        TW_KEEP_Q(f##r, g##r); \
    }
#define TW_ADD_HELD_int4(r) TW_ADD_HELD_Q(int4, r, TW_LESS_HELD_int4)
#define TW_ADD_HELD_int8(r) TW_ADD_HELD_Q(int8, r, TW_LESS_HELD_int8)
#define TW_ADD_HELD_int4_zeros(r) TW_ADD_HELD_Q(int4, r, TW_LESS_Q)
#define TW_ADD_HELD_int8_zeros(r) TW_ADD_HELD_Q(int8, r, TW_LESS_Q)

/* Steps [from, end) of a panel, in groups of `per`, with a tile of ROWS rows, given from step `from` on; sums[r][32] is
 * added to. */
#define TW_DEFINE_HELD(NAME, KIND, ROWS, ZEROS, BEGIN, TERMS, POINTS, ADD) \
    static __attribute__((unused, noinline)) void NAME##ROWS( \
        const int8_t *codes, const float *row_scales, const int32_t *row_sums, const uint8_t *panel, int64_t from, \
        int64_t end, int64_t per, tw_fetch fetch, float *sums) { \
        enum { tw_r = ROWS }; \
        TW_REPEAT_##ROWS(TW_HOLD_Q) \
        for (int64_t s = from; s < end;) { \
            const int64_t group = s / per, last = tw_smaller((group + 1) * per, end); \
            const uint8_t *const header = panel + TW_GROUPS_BYTES(KIND, ZEROS, group, per); \
            const uint8_t *at = header + TW_HEADER_BYTES(KIND, ZEROS) + (s - group * per) * TW_STEP_BYTES(KIND); \
            for (; s < last; s++, at += TW_STEP_BYTES(KIND) - TW_HALF_##KIND, row_scales += ROWS, row_sums += ROWS) { \
                tw_fetch_some(&fetch); \
                TW_REPEAT_##ROWS(BEGIN) \
                TERMS(ROWS) \
                const tw_vec s0 = TW_SCALES_AT_##KIND(0), s1 = TW_SCALES_AT_##KIND(TW_LANES); \
                const tw_vec z0 = POINTS(KIND, 0), z1 = POINTS(KIND, TW_LANES); \
                (void)z0, (void)z1; \
                TW_REPEAT_##ROWS(ADD) \
            } \
        } \
        TW_REPEAT_##ROWS(TW_LEAVE_Q) \
    }
#define TW_DEFINE_HELD_SYMMETRIC(NAME, KIND, ROWS, TERMS) \
    TW_DEFINE_HELD(NAME, KIND, ROWS, 0, TW_BEGIN_HELD_##KIND, TERMS, TW_COMMON_POINTS_Q, TW_ADD_HELD_##KIND)
#define TW_DEFINE_HELD_ZEROS(NAME, KIND, ROWS, TERMS) \
    TW_DEFINE_HELD(NAME, KIND, ROWS, 1, TW_ZERO_Q, TERMS, TW_STORED_POINTS_Q, TW_ADD_HELD_##KIND##_zeros)

/* The same for one scale per column and row: totals[r][32] stay integers, with the offset of codes in them. */
#define TW_HOLD_WHOLE(r) \
    tw_q x##r = TW_LOAD_Q(totals + r * TW_PANEL), y##r = TW_LOAD_Q(totals + r * TW_PANEL + TW_LANES);
#define TW_LEAVE_WHOLE(r) \
    _mm512_storeu_si512(totals + r * TW_PANEL, x##r), _mm512_storeu_si512(totals + r * TW_PANEL + TW_LANES, y##r);
#define TW_DEFINE_HELD_WHOLE(NAME, KIND, ROWS, TERMS) \
    static __attribute__((unused, noinline)) void NAME##ROWS( \
        const int8_t *codes, const uint8_t *at, int64_t steps, tw_fetch fetch, int32_t *totals) { \
        enum { tw_r = ROWS }; \
        TW_REPEAT_##ROWS(TW_HOLD_WHOLE) \
        for (int64_t s = 0; s < steps; s++, at += TW_STEP_BYTES(KIND) - TW_HALF_##KIND) { \
            tw_fetch_some(&fetch); \
            TERMS(ROWS) \
        } \
        TW_REPEAT_##ROWS(TW_LEAVE_WHOLE) \
    }

/* Five rows and more make tiles of 3 to 6. */
#define TW_FOR_EACH_HELD(DEFINE, NAME, KIND) \
    DEFINE(NAME, KIND, 3, TW_TERMS_##KIND) DEFINE(NAME, KIND, 4, TW_TERMS_##KIND) \
    DEFINE(NAME, KIND, 5, TW_TERMS_##KIND) DEFINE(NAME, KIND, 6, TW_TERMS_##KIND)
#define TW_SWITCH_HELD(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 3, __VA_ARGS__) TW_CASE(function, 4, __VA_ARGS__) \
        TW_CASE(function, 5, __VA_ARGS__) TW_CASE(function, 6, __VA_ARGS__) \
    }
TW_FOR_EACH_HELD(TW_DEFINE_HELD_SYMMETRIC, tw_held_int4_, int4)
TW_FOR_EACH_HELD(TW_DEFINE_HELD_SYMMETRIC, tw_held_int8_, int8)
TW_FOR_EACH_HELD(TW_DEFINE_HELD_ZEROS, tw_held_zeros_int4_, int4)
TW_FOR_EACH_HELD(TW_DEFINE_HELD_ZEROS, tw_held_zeros_int8_, int8)
TW_FOR_EACH_HELD(TW_DEFINE_HELD_WHOLE, tw_held_whole_int8_, int8)

/* sums[rows][32] += the products with a panel. */
#define TW_DEFINE_HELD_PRODUCT(KIND) \
    static inline void tw_held_product_##KIND( \
        const tw_quantized *x, const uint8_t *panel, int64_t per, int zeros, float *sums) { \
        const int64_t tiles = tw_ceildiv(x->rows, TW_ROWS_##KIND); \
        for (int64_t from = 0, end; from < x->steps; from = end) { \
            end = tw_smaller(from + TW_HELD_STEPS(KIND), x->steps); \
            const uint8_t *const next = \
                panel + TW_GROUPS_BYTES(KIND, zeros, end / per, per) + end % per * TW_STEP_BYTES(KIND); \
            const int64_t bytes = TW_HELD_STEPS(KIND) * (TW_STEP_BYTES(KIND) + TW_HEADER_BYTES(KIND, zeros) / per); \
            for (int64_t t = 0; t < tiles; t++) { \
                const tw_tile_q tile = tw_tile_at_q(x->rows, TW_ROWS_##KIND, t); \
                const int64_t at = tile.first * x->steps + from * tile.rows; \
                const int8_t *const codes = x->codes + at * TW_STEP_K * TW_CODE_BYTES_##KIND; \
                const tw_fetch fetch = tw_fetch_of(next, bytes, end - from, t, tiles); \
                float *const to = sums + tile.first * TW_PANEL; \
                if (zeros) { \
                    TW_SWITCH_HELD( \
                        tw_held_zeros_##KIND##_, tile.rows, codes, x->scales + at, x->sums + at, panel, from, end, \
                        per, fetch, to) \
                } else { \
                    TW_SWITCH_HELD( \
                        tw_held_##KIND##_, tile.rows, codes, x->scales + at, x->sums + at, panel, from, end, per, \
                        fetch, to) \
                } \
            } \
        } \
    }
TW_DEFINE_HELD_PRODUCT(int4)
TW_DEFINE_HELD_PRODUCT(int8)

/* totals[rows][32] += the products with a panel that is one group, as integers. */
static inline void tw_held_product_whole_int8(const tw_quantized *x, const uint8_t *panel, int32_t *totals) {
    const int64_t tiles = tw_ceildiv(x->rows, TW_ROWS_int8);
    for (int64_t from = 0, end; from < x->steps; from = end) {
        end = tw_smaller(from + TW_HELD_STEPS(int8), x->steps);
        const uint8_t *const at = panel + TW_HEADER_BYTES(int8, 0) + from * TW_STEP_BYTES(int8);
        for (int64_t t = 0; t < tiles; t++) {
            const tw_tile_q tile = tw_tile_at_q(x->rows, TW_ROWS_int8, t);
            TW_SWITCH_HELD(
                tw_held_whole_int8_, tile.rows,
                x->codes + (tile.first * x->steps + from * tile.rows) * TW_STEP_K * TW_CODE_BYTES_int8, at, end - from,
                tw_fetch_of(at + TW_HELD_BYTES, TW_HELD_BYTES, end - from, t, tiles), totals + tile.first * TW_PANEL)
        }
    }
}

#endif

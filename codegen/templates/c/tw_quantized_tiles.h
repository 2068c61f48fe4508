/* Products of many quantized rows and weights of 4 bits on AVX2: a chunk of a panel is spread out once, and all tiles of
 * rows go over it.
 *
 * Spread out, weights are bytes in the order in which tiles take them, so that a tile does nothing but load, multiply and
 * add. A chunk lies in the first-level cache: two halves of 16 columns, each [steps][words][16][4 bytes], with scales and
 * zero points as floats. Six rows by 16 columns are summed in registers. Meanwhile the next chunk of the panel is fetched
 * from memory, shared out between the tiles.
 *
 * Sums of steps are exact and are added up as in tw_quantized_products.h, so a row gives the same bits either way.
 */
#ifndef TW_QUANTIZED_TILES_H
#define TW_QUANTIZED_TILES_H

#include "tw_quantized_products.h"

#define TW_SPREAD_HALF 8192 /* bytes of half a chunk */
#define TW_SPREAD_int4 512  /* bytes of half a step */
#define TW_SPREAD_STEPS(KIND) (TW_SPREAD_HALF / TW_SPREAD_##KIND)

typedef struct {
    uint8_t codes[2 * TW_SPREAD_HALF] TW_ALIGNED;
    float scales[TW_SPREAD_STEPS(int4) * TW_PANEL], points[TW_SPREAD_STEPS(int4) * TW_PANEL];
} tw_spread;

/* Half a step. */
static inline void tw_spread_half_int4(const uint8_t *from, uint8_t *to) {
    for (int64_t p = 0; p < 4; p++, from += 64, to += 128) {
        const tw_q w0 = TW_LOAD_Q(from), w1 = TW_LOAD_Q(from + 32);
        _mm256_store_si256((__m256i *)to, TW_AND_Q(w0, TW_BYTES_Q(15)));
        _mm256_store_si256((__m256i *)(to + 32), TW_AND_Q(w1, TW_BYTES_Q(15)));
        _mm256_store_si256((__m256i *)(to + 64), TW_HIGH_Q(w0));
        _mm256_store_si256((__m256i *)(to + 96), TW_HIGH_Q(w1));
    }
}

/* Steps [from, end) of a panel, spread out. */
#define TW_DEFINE_SPREAD(KIND) \
    static inline void tw_spread_##KIND( \
        const uint8_t *panel, int64_t from, int64_t end, int64_t per, int zeros, tw_spread *to) { \
        uint8_t *codes = to->codes; \
        int64_t at = 0; \
        TW_FOR_EACH_STEP(KIND) \
            memcpy(to->scales + at, scales, sizeof scales); \
            if (zeros) memcpy(to->points + at, points, sizeof points); \
            tw_spread_half_##KIND(step, codes); \
            tw_spread_half_##KIND(step + TW_HALF_##KIND, codes + TW_SPREAD_HALF); \
            codes += TW_SPREAD_##KIND, at += TW_PANEL; \
        TW_END_OF_STEPS \
    }
TW_DEFINE_SPREAD(int4)

#define TW_ROW_AT_int4(r) TW_TERMS_Q(r, word, TW_DOT_int4, 0, 1)

/* The sums of a step's half. */
#define TW_SPREAD_TERMS(KIND, ROWS) \
    for (int64_t word = 0; word < TW_SPREAD_##KIND / 64; word++) { \
        const tw_q u0 = TW_LOAD_Q(at + word * 64), u1 = TW_LOAD_Q(at + word * 64 + 32); \
        TW_REPEAT_##ROWS(TW_ROW_AT_##KIND) \
    }

/* A chunk's steps with a tile of ROWS rows, given from its first step on; sums[r][32] is added to. */
#define TW_DEFINE_TILE(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_tile_##KIND##_##ROWS( \
        const int8_t *tile, const float *tile_scales, const int32_t *tile_sums, const tw_spread *chunk, int64_t steps, \
        int zeros, tw_fetch fetch, float *sums) { \
        enum { tw_r = ROWS }; \
        for (int64_t n = 0; n < TW_PANEL; n += 16) { \
            const uint8_t *at = chunk->codes + n / 16 * TW_SPREAD_HALF; \
            const float *scales = chunk->scales + n, *points = chunk->points + n; \
            const int8_t *codes = tile; \
            const float *row_scales = tile_scales; \
            const int32_t *row_sums = tile_sums; \
            for (int64_t s = 0; s < steps; s++) { \
                tw_fetch_some(&fetch); \
                TW_REPEAT_##ROWS(TW_START_Q) \
                TW_SPREAD_TERMS(KIND, ROWS) \
                const tw_vec s0 = tw_load(scales), s1 = tw_load(scales + TW_LANES); \
                const tw_vec z0 = tw_load(points), z1 = tw_load(points + TW_LANES); \
                __asm__ volatile("" ::: "memory"); /* sums stay in memory */ \
                TW_REPEAT_##ROWS(TW_ADD_TO_##KIND) \
                at += TW_SPREAD_##KIND, scales += TW_PANEL, points += TW_PANEL; \
                codes += TW_STEP_K * TW_CODE_BYTES_##KIND * ROWS, row_scales += ROWS, row_sums += ROWS; \
            } \
        } \
    }
#define TW_FOR_EACH_TILE(X, KIND) X(KIND, 1) X(KIND, 2) X(KIND, 3) X(KIND, 4) X(KIND, 5) X(KIND, 6)
TW_FOR_EACH_TILE(TW_DEFINE_TILE, int4)

#define TW_SWITCH_TILE(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) TW_CASE(function, 3, __VA_ARGS__) \
        TW_CASE(function, 4, __VA_ARGS__) TW_CASE(function, 5, __VA_ARGS__) TW_CASE(function, 6, __VA_ARGS__) \
    }

/* sums[rows][32] += the products with a panel. */
#define TW_DEFINE_SPREAD_PRODUCT(KIND) \
    static inline void tw_spread_product_##KIND( \
        const tw_quantized *x, const uint8_t *panel, int64_t per, int zeros, float *sums) { \
        tw_spread chunk; \
        const int64_t tiles = tw_ceildiv(x->rows, TW_ROWS_##KIND); \
        for (int64_t from = 0, end; from < x->steps; from = end) { \
            end = tw_smaller(from + TW_SPREAD_STEPS(KIND), x->steps); \
            tw_spread_##KIND(panel, from, end, per, zeros, &chunk); \
            const uint8_t *const next = panel + TW_GROUPS_BYTES(KIND, zeros, end / per, per) + end % per * TW_STEP_BYTES(KIND); \
            const int64_t bytes = TW_SPREAD_STEPS(KIND) * (TW_STEP_BYTES(KIND) + TW_HEADER_BYTES(KIND, zeros) / per); \
            for (int64_t t = 0; t < tiles; t++) { \
                const tw_tile_q tile = tw_tile_at_q(x->rows, TW_ROWS_##KIND, t); \
                const int64_t at = tile.first * x->steps + from * tile.rows; \
                TW_SWITCH_TILE( \
                    tw_tile_##KIND##_, tile.rows, x->codes + at * TW_STEP_K * TW_CODE_BYTES_##KIND, x->scales + at, \
                    x->sums + at, &chunk, end - from, zeros, tw_fetch_of(next, bytes, end - from, t, tiles), \
                    sums + tile.first * TW_PANEL) \
            } \
        } \
    }
TW_DEFINE_SPREAD_PRODUCT(int4)

#endif

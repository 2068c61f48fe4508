/* Products of one to four quantized rows and a panel of quantized weights on AVX-512: at the memory's speed.
 *
 * The kernels of tw_quantized_held.h over a whole panel, but they take each step in the order of its addresses, half after
 * half, although that broadcasts every word twice: with the halves in turns a Zen 4 reads at half the speed where nothing is
 * fetched ahead, and at two thirds of it for one row where it is. So they fetch nothing ahead, and no barriers keep products
 * apart.
 * docs/speed.md has the measurements.
 */
#ifndef TW_QUANTIZED_FEW_H
#define TW_QUANTIZED_FEW_H

#include "tw_quantized_held.h"

/* The sums `sum` of row r: one vector, of half a step. */
#define TW_TERM_Q(sum, r, word, DOT) sum##r = DOT(sum##r, TW_WORD_Q(codes + ((word) * tw_r + r) * 4), 0);
#define TW_LOW_X_int4(r) TW_TERM_Q(x, r, 2 * word, TW_DOT_int4)
#define TW_HIGH_X_int4(r) TW_TERM_Q(x, r, 2 * word + 1, TW_DOT_int4)
#define TW_LOW_Y_int4(r) TW_TERM_Q(y, r, 2 * word, TW_DOT_int4)
#define TW_HIGH_Y_int4(r) TW_TERM_Q(y, r, 2 * word + 1, TW_DOT_int4)
#define TW_X_int8(r) TW_TERM_Q(x, r, word, TW_DOT_int8)
#define TW_Y_int8(r) TW_TERM_Q(y, r, word, TW_DOT_int8)

/* What a step at `at` adds to the sums of ROWS rows, from `codes` on; both go on as in TW_TERMS_int4 and TW_TERMS_int8. */
#define TW_HALF_IN_ORDER_int4(ROWS, half, LOW, HIGH) \
    _Pragma("GCC unroll 4") for (int64_t word = 0; word < 4; word++) { \
        const tw_q w = TW_LOAD_Q(at + (half) + word * 64); \
        { \
            const tw_q u0 = TW_AND_Q(w, TW_BYTES_Q(15)); \
            TW_REPEAT_##ROWS(LOW) \
        } \
        { \
            const tw_q u0 = TW_HIGH_Q(w); \
            TW_REPEAT_##ROWS(HIGH) \
        } \
    }
#define TW_IN_ORDER_int4(ROWS) \
    TW_HALF_IN_ORDER_int4(ROWS, 0, TW_LOW_X_int4, TW_HIGH_X_int4) \
    TW_HALF_IN_ORDER_int4(ROWS, TW_HALF_int4, TW_LOW_Y_int4, TW_HIGH_Y_int4) \
    at += TW_HALF_int4, codes += TW_STEP_K * ROWS;
#define TW_HALF_IN_ORDER_int8(ROWS, half, TERM) \
    _Pragma("GCC unroll 8") for (int64_t word = 0; word < 8; word++) { \
        const tw_q w0 = TW_LOAD_Q(at + (half) + word * 64), u0 = TW_UNSIGNED_int8(w0); \
        TW_REPEAT_##ROWS(TERM) \
    }
#define TW_IN_ORDER_int8(ROWS) \
    TW_HALF_IN_ORDER_int8(ROWS, 0, TW_X_int8) \
    TW_HALF_IN_ORDER_int8(ROWS, TW_HALF_int8, TW_Y_int8) \
    at += TW_HALF_int8, codes += TW_STEP_K * ROWS;

#define TW_FOR_EACH_FEW(DEFINE, NAME, KIND) \
    DEFINE(NAME, KIND, 1, TW_IN_ORDER_##KIND) DEFINE(NAME, KIND, 2, TW_IN_ORDER_##KIND) \
    DEFINE(NAME, KIND, 3, TW_IN_ORDER_##KIND) DEFINE(NAME, KIND, 4, TW_IN_ORDER_##KIND)
TW_FOR_EACH_FEW(TW_DEFINE_HELD_SYMMETRIC, tw_few_int4_, int4)
TW_FOR_EACH_FEW(TW_DEFINE_HELD_SYMMETRIC, tw_few_int8_, int8)
TW_FOR_EACH_FEW(TW_DEFINE_HELD_ZEROS, tw_few_zeros_int4_, int4)
TW_FOR_EACH_FEW(TW_DEFINE_HELD_ZEROS, tw_few_zeros_int8_, int8)
TW_FOR_EACH_FEW(TW_DEFINE_HELD_WHOLE, tw_few_whole_int8_, int8)

#define TW_FETCH_NOTHING ((tw_fetch){0})

/* sums[rows][32] += the products with a panel, for any number of rows. */
#define TW_DEFINE_PRODUCT_Q(KIND) \
    static inline void tw_product_##KIND( \
        const tw_quantized *x, const uint8_t *panel, int64_t per, int zeros, float *sums) { \
        if (x->rows > TW_FEW_ROWS_Q) { \
            tw_held_product_##KIND(x, panel, per, zeros, sums); \
        } else if (zeros) { \
            TW_SWITCH_ROWS_Q( \
                tw_few_zeros_##KIND##_, x->rows, x->codes, x->scales, x->sums, panel, 0, x->steps, per, TW_FETCH_NOTHING, \
                sums) \
        } else { \
            TW_SWITCH_ROWS_Q( \
                tw_few_##KIND##_, x->rows, x->codes, x->scales, x->sums, panel, 0, x->steps, per, TW_FETCH_NOTHING, sums) \
        } \
    }
TW_DEFINE_PRODUCT_Q(int4)
TW_DEFINE_PRODUCT_Q(int8)

/* totals[rows][32] += the products with a panel that is one group, as integers. */
static inline void tw_product_whole_int8(const tw_quantized *x, const uint8_t *panel, int32_t *totals) {
    if (x->rows > TW_FEW_ROWS_Q) {
        tw_held_product_whole_int8(x, panel, totals);
        return;
    }
    TW_SWITCH_ROWS_Q(
        tw_few_whole_int8_, x->rows, x->codes, panel + TW_HEADER_BYTES(int8, 0), x->steps, TW_FETCH_NOTHING, totals)
}

#endif

/* Products with the blocks of a paged cache, which are read where they lie.
 *
 * A block of keys is a panel [dim][32], a block of values is [32][dim]: rows of B of either product, float32, or bfloat16
 * that is widened in registers. As in tw_simd.h, each sum adds its terms one after another, one multiply-add each.
 */
#ifndef TW_PAGED_ATTENTION_H
#define TW_PAGED_ATTENTION_H

#include "tw_attention.h"
#include "tw_half.h"
#include "tw_paged.h"

typedef uint16_t tw_halves __attribute__((vector_size(TW_LANES * 2), aligned(2), may_alias));
typedef uint32_t tw_widened __attribute__((vector_size(TW_LANES * 4)));

static inline tw_vec tw_load_float(const float *p) { return tw_load(p); }
static inline tw_vec tw_load_half(const uint16_t *p) {
    return (tw_vec)(__builtin_convertvector(*(const tw_halves *)p, tw_widened) << 16);
}

/* sums[r][columns], rows `pitch` apart, = sums * factors[r] (0 without factors) + the sum over k < depth of
 * a[r * stride + k] times row k % per of blocks[k / per], rows `step` apart, columns from `at`.
 *
 * While it reads a part of a block it fetches a share, number `part` of `parts`, of as large a part of another one,
 * soon[k / per], into the second cache: in the order of addresses, as memory likes it best, not in that of the columns.
 * Forms differ in their columns: TW_LANES (narrow), two times and four times as many (wide). */
#define TW_FETCH(columns) \
    for (int64_t line = 0; line < (int64_t)((columns) * sizeof *b); line += 64) { \
        __builtin_prefetch((const char *)next + line, 0, 2); \
    } \
    next += pace;
#define TW_PAGED_narrow(LOAD, ROWS) \
    const tw_vec b0 = LOAD(b); \
    TW_FETCH(TW_LANES) \
    TW_REPEAT_##ROWS(TW_STEP_narrow)
#define TW_PAGED_(LOAD, ROWS) \
    const tw_vec b0 = LOAD(b), b1 = LOAD(b + TW_LANES); \
    TW_FETCH(2 * TW_LANES) \
    TW_REPEAT_##ROWS(TW_STEP)
#define TW_STEP_OF_FOUR(r) w##r += a##r[k] * b0, x##r += a##r[k] * b1, y##r += a##r[k] * b2, z##r += a##r[k] * b3;
#define TW_PAGED_WIDE(LOAD, ROWS) \
    const tw_vec b0 = LOAD(b), b1 = LOAD(b + TW_LANES), b2 = LOAD(b + 2 * TW_LANES), b3 = LOAD(b + 3 * TW_LANES); \
    TW_FETCH(4 * TW_LANES) \
    TW_REPEAT_##ROWS(TW_STEP_OF_FOUR)
#define TW_DEFINE_PAGED(NAME, ELEMENT, LOAD, COLUMNS, STEPS, ZERO, SCALE, KEEP, ROWS) \
    static __attribute__((unused, noinline)) void NAME##ROWS( \
        const float *a, int64_t stride, const ELEMENT *const *blocks, const ELEMENT *const *soon, int64_t part, \
        int64_t parts, int64_t at, int64_t step, int64_t per, int64_t depth, float *sums, int64_t pitch, \
        const float *factors) { \
        typedef float tw_element; \
        const int64_t pace = (uint32_t)(COLUMNS) / (uint32_t)parts; \
        TW_REPEAT_##ROWS(TW_TILE_POINTER) \
        TW_REPEAT_##ROWS(ZERO) \
        if (factors) { TW_REPEAT_##ROWS(SCALE) } \
        for (int64_t k = 0; k < depth; blocks++, soon++) { \
            const ELEMENT *b = *blocks + at, *next = *soon + (at + part * pace) * per; \
            for (const int64_t end = tw_smaller(k + per, depth); k < end; k++, b += step) { STEPS(LOAD, ROWS) } \
        } \
        TW_REPEAT_##ROWS(KEEP) \
    }

#define TW_DEFINE_PAGED_float(ROWS) \
    TW_DEFINE_PAGED(tw_paged_float_, float, tw_load_float, 2 * TW_LANES, TW_PAGED_, TW_ZERO, TW_SCALE, TW_KEEP, ROWS)
#define TW_DEFINE_PAGED_half(ROWS) \
    TW_DEFINE_PAGED(tw_paged_half_, uint16_t, tw_load_half, 2 * TW_LANES, TW_PAGED_, TW_ZERO, TW_SCALE, TW_KEEP, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_float)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_half)

#if TW_LANES * 2 < TW_PANEL
/* One or two rows wait for each other's additions less when they take more columns. */
#define TW_DEFINE_PAGED_WIDE(KIND, ELEMENT, ROWS) \
    TW_DEFINE_PAGED( \
        tw_paged_wide_##KIND##_, ELEMENT, tw_load_##KIND, 4 * TW_LANES, TW_PAGED_WIDE, TW_ZERO_WIDE, TW_SCALE_WIDE, \
        TW_KEEP_WIDE, ROWS)
TW_DEFINE_PAGED_WIDE(float, float, 1)
TW_DEFINE_PAGED_WIDE(float, float, 2)
TW_DEFINE_PAGED_WIDE(half, uint16_t, 1)
TW_DEFINE_PAGED_WIDE(half, uint16_t, 2)
#define TW_FEW_ROWS 2 /* that a wide form takes at once */
#define TW_SWITCH_WIDE(KIND, rows, ...) \
    if (rows == 1) { \
        tw_paged_wide_##KIND##_1(__VA_ARGS__); \
    } else { \
        tw_paged_wide_##KIND##_2(__VA_ARGS__); \
    }
#define TW_SWITCH_NARROW(KIND, rows, ...)
#else
#define TW_FEW_ROWS 0
#define TW_DEFINE_PAGED_NARROW(KIND, ELEMENT, ROWS) \
    TW_DEFINE_PAGED(tw_paged_narrow_##KIND##_, ELEMENT, tw_load_##KIND, TW_LANES, TW_PAGED_narrow, TW_ZERO_narrow, \
                    TW_SCALE_narrow, TW_KEEP_narrow, ROWS)
#define TW_DEFINE_PAGED_NARROW_float(ROWS) TW_DEFINE_PAGED_NARROW(float, float, ROWS)
#define TW_DEFINE_PAGED_NARROW_half(ROWS) TW_DEFINE_PAGED_NARROW(half, uint16_t, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_NARROW_float)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_NARROW_half)
#define TW_SWITCH_WIDE(KIND, rows, ...)
#define TW_SWITCH_NARROW(KIND, rows, ...) TW_SWITCH_ROWS(tw_paged_narrow_##KIND##_, rows, __VA_ARGS__)
#endif

/* The same for at most TW_MR rows and 16 or 32 columns from `at`. */
#define TW_DEFINE_PAGED_OF_ROWS(KIND, ELEMENT) \
    static inline __attribute__((unused)) void tw_paged_##KIND( \
        int64_t rows, int64_t columns, const float *a, int64_t stride, const ELEMENT *const *blocks, \
        const ELEMENT *const *soon, int64_t part, int64_t parts, int64_t at, int64_t step, int64_t per, int64_t depth, \
        float *sums, int64_t pitch, const float *factors) { \
        if (rows <= TW_FEW_ROWS && columns == 4 * TW_LANES) { \
            TW_SWITCH_WIDE( \
                KIND, rows, a, stride, blocks, soon, part, parts, at, step, per, depth, sums, pitch, factors) \
        } else if (columns == TW_LANES) { \
            TW_SWITCH_NARROW( \
                KIND, rows, a, stride, blocks, soon, part, parts, at, step, per, depth, sums, pitch, factors) \
        } else { \
            for (int64_t c = 0; c < columns; c += 2 * TW_LANES) { \
                TW_SWITCH_ROWS( \
                    tw_paged_##KIND##_, rows, a, stride, blocks, soon, part, parts, at + c, step, per, depth, sums + c, \
                    pitch, factors) \
            } \
        } \
    }
TW_DEFINE_PAGED_OF_ROWS(float, float)
TW_DEFINE_PAGED_OF_ROWS(half, uint16_t)

#endif

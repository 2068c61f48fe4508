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

typedef float tw_kind_float; /* elements of caches */
typedef uint16_t tw_kind_half;
typedef uint32_t tw_half_pairs __attribute__((vector_size(TW_LANES * 4), aligned(2), may_alias));

/* Two vectors of columns. Those of bfloat16 are the even and the odd ones of their neighbours, which takes a load and
 * two instructions; sums are brought into the same order when a product begins, and back when it ends. */
#define TW_LOAD_PAIR_float(p, first, second) const tw_vec first = tw_load(p), second = tw_load((p) + TW_LANES);
#define TW_LOAD_PAIR_half(p, even, odd) \
    const tw_half_pairs even##_and_odd = *(const tw_half_pairs *)(p); \
    const tw_vec even = (tw_vec)(even##_and_odd << 16), odd = (tw_vec)(even##_and_odd & 0xffff0000u);

#if TW_LANES == 16
static inline tw_vec tw_evens(tw_vec a, tw_vec b) {
    const __m512i of = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (tw_vec)_mm512_permutex2var_ps((__m512)a, of, (__m512)b);
}
static inline tw_vec tw_odds(tw_vec a, tw_vec b) {
    const __m512i of = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return (tw_vec)_mm512_permutex2var_ps((__m512)a, of, (__m512)b);
}
static inline void tw_store_turns(float *to, tw_vec even, tw_vec odd) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    tw_store(to, (tw_vec)_mm512_permutex2var_ps((__m512)even, low, (__m512)odd));
    tw_store(to + TW_LANES, (tw_vec)_mm512_permutex2var_ps((__m512)even, high, (__m512)odd));
}
/* A vector of bfloat16 that lies alone, in order. */
static inline tw_vec tw_load_half(const uint16_t *p) {
    return (tw_vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
static inline tw_vec tw_load_float(const float *p) { return tw_load(p); }
#else
static inline __m256 tw_middle_exchanged(__m256 v) { /* the second and the third quarter change places */
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
static inline tw_vec tw_evens(tw_vec a, tw_vec b) {
    return (tw_vec)tw_middle_exchanged(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));
}
static inline tw_vec tw_odds(tw_vec a, tw_vec b) {
    return (tw_vec)tw_middle_exchanged(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
}
static inline void tw_store_turns(float *to, tw_vec even, tw_vec odd) {
    const __m256 e = tw_middle_exchanged((__m256)even), o = tw_middle_exchanged((__m256)odd);
    tw_store(to, (tw_vec)_mm256_unpacklo_ps(e, o));
    tw_store(to + TW_LANES, (tw_vec)_mm256_unpackhi_ps(e, o));
}
#endif

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
#define TW_PAGED_narrow(KIND, ROWS) \
    const tw_vec b0 = tw_load_##KIND(b); \
    TW_FETCH(TW_LANES) \
    TW_REPEAT_##ROWS(TW_STEP_narrow)
#define TW_PAGED_(KIND, ROWS) \
    TW_LOAD_PAIR_##KIND(b, b0, b1) \
    TW_FETCH(2 * TW_LANES) \
    TW_REPEAT_##ROWS(TW_STEP)
#define TW_STEP_OF_FOUR(r) w##r += a##r[k] * b0, x##r += a##r[k] * b1, y##r += a##r[k] * b2, z##r += a##r[k] * b3;
#define TW_PAGED_WIDE(KIND, ROWS) \
    TW_LOAD_PAIR_##KIND(b, b0, b1) \
    TW_LOAD_PAIR_##KIND(b + 2 * TW_LANES, b2, b3) \
    TW_FETCH(4 * TW_LANES) \
    TW_REPEAT_##ROWS(TW_STEP_OF_FOUR)
#define TW_TO_TURNS(first, second) \
    { \
        const tw_vec low = first, high = second; \
        first = tw_evens(low, high), second = tw_odds(low, high); \
    }
#define TW_SCALE_half(r) TW_SCALE(r) TW_TO_TURNS(x##r, y##r)
#define TW_KEEP_half(r) tw_store_turns(sums + r * pitch, x##r, y##r);
#define TW_SCALE_WIDE_half(r) TW_SCALE_WIDE(r) TW_TO_TURNS(w##r, x##r) TW_TO_TURNS(y##r, z##r)
#define TW_KEEP_WIDE_half(r) \
    tw_store_turns(sums + r * pitch, w##r, x##r), tw_store_turns(sums + r * pitch + 2 * TW_LANES, y##r, z##r);
#define TW_SCALE_WIDE_float TW_SCALE_WIDE
#define TW_KEEP_WIDE_float TW_KEEP_WIDE
#define TW_DEFINE_PAGED(NAME, KIND, COLUMNS, STEPS, ZERO, SCALE, KEEP, ROWS) \
    static __attribute__((unused, noinline)) void NAME##ROWS( \
        const float *a, int64_t stride, const tw_kind_##KIND *const *blocks, const tw_kind_##KIND *const *soon, \
        int64_t part, int64_t parts, int64_t at, int64_t step, int64_t per, int64_t depth, float *sums, int64_t pitch, \
        const float *factors) { \
        typedef float tw_element; \
        const int64_t pace = (uint32_t)(COLUMNS) / (uint32_t)parts; \
        TW_REPEAT_##ROWS(TW_TILE_POINTER) \
        TW_REPEAT_##ROWS(ZERO) \
        if (factors) { TW_REPEAT_##ROWS(SCALE) } \
        for (int64_t k = 0; k < depth; blocks++, soon++) { \
            const tw_kind_##KIND *b = *blocks + at, *next = *soon + (at + part * pace) * per; \
            for (const int64_t end = tw_smaller(k + per, depth); k < end; k++, b += step) { STEPS(KIND, ROWS) } \
        } \
        TW_REPEAT_##ROWS(KEEP) \
    }

#define TW_DEFINE_PAGED_float(ROWS) \
    TW_DEFINE_PAGED(tw_paged_float_, float, 2 * TW_LANES, TW_PAGED_, TW_ZERO, TW_SCALE, TW_KEEP, ROWS)
#define TW_DEFINE_PAGED_half(ROWS) \
    TW_DEFINE_PAGED(tw_paged_half_, half, 2 * TW_LANES, TW_PAGED_, TW_ZERO, TW_SCALE_half, TW_KEEP_half, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_float)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_half)

#if TW_LANES * 2 < TW_PANEL
/* One or two rows wait for each other's additions less when they take more columns. */
#define TW_DEFINE_PAGED_WIDE(KIND, ROWS) \
    TW_DEFINE_PAGED( \
        tw_paged_wide_##KIND##_, KIND, 4 * TW_LANES, TW_PAGED_WIDE, TW_ZERO_WIDE, TW_SCALE_WIDE_##KIND, \
        TW_KEEP_WIDE_##KIND, ROWS)
TW_DEFINE_PAGED_WIDE(float, 1)
TW_DEFINE_PAGED_WIDE(float, 2)
TW_DEFINE_PAGED_WIDE(half, 1)
TW_DEFINE_PAGED_WIDE(half, 2)
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
#define TW_DEFINE_PAGED_NARROW(KIND, ROWS) \
    TW_DEFINE_PAGED(tw_paged_narrow_##KIND##_, KIND, TW_LANES, TW_PAGED_narrow, TW_ZERO_narrow, TW_SCALE_narrow, \
                    TW_KEEP_narrow, ROWS)
#define TW_DEFINE_PAGED_NARROW_float(ROWS) TW_DEFINE_PAGED_NARROW(float, ROWS)
#define TW_DEFINE_PAGED_NARROW_half(ROWS) TW_DEFINE_PAGED_NARROW(half, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_NARROW_float)
TW_FOR_EACH_ROWS(TW_DEFINE_PAGED_NARROW_half)
#define TW_SWITCH_WIDE(KIND, rows, ...)
#define TW_SWITCH_NARROW(KIND, rows, ...) TW_SWITCH_ROWS(tw_paged_narrow_##KIND##_, rows, __VA_ARGS__)
#endif

/* The same for at most TW_MR rows and 16 or 32 columns from `at`. */
#define TW_DEFINE_PAGED_OF_ROWS(KIND) \
    static inline __attribute__((unused)) void tw_paged_##KIND( \
        int64_t rows, int64_t columns, const float *a, int64_t stride, const tw_kind_##KIND *const *blocks, \
        const tw_kind_##KIND *const *soon, int64_t part, int64_t parts, int64_t at, int64_t step, int64_t per, \
        int64_t depth, float *sums, int64_t pitch, const float *factors) { \
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
TW_DEFINE_PAGED_OF_ROWS(float)
TW_DEFINE_PAGED_OF_ROWS(half)

#endif

/* What the attention kernel is made of: packing keys and values, tiles of its two products, the running softmax.
 *
 * The softmax is the streaming one (M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018;
 * T. Dao et al., "FlashAttention", 2022): a row keeps its maximum and the sum of exponentials so far, and what it has
 * accumulated is scaled when the maximum grows.
 *
 * Keys and values are packed in panels of 32: [panels][depth][32], keys transposed. Operands of products are float32,
 * or words of two bfloat16 (include tw_words.h first), neighbours along the depth.
 */
#ifndef TW_ATTENTION_H
#define TW_ATTENTION_H

#include "tw_intrinsics.h"
#include "tw_math.h"
#include "tw_simd.h"
#include "tw_sums.h"

typedef int32_t tw_ivec __attribute__((vector_size(TW_LANES * 4)));

/* The second operand where either is NaN. */
#if TW_LANES == 16
#define TW_MAX(a, b) ((tw_vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#else
#define TW_MAX(a, b) ((tw_vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#endif

/* 2^x for x <= 0, 0 below -126; NaN stays NaN. The polynomial is that of tw_exp2_f32. */
static inline tw_vec tw_exp2_nonpositive_vec(tw_vec x) {
#if TW_LANES == 16
    const tw_vec r = (tw_vec)_mm512_reduce_ps((__m512)x, 0), n = x - r; /* x = n + r, |r| <= 1/2 */
#else
    const tw_vec zero = {0}, bound = zero - 126.0f;
    const tw_vec low = TW_MAX(bound, x), shifted = low + TW_SHIFT, r = low - (shifted - TW_SHIFT);
#endif
    tw_vec p = r * 0x1.41fb82p-13f + 0x1.5f3eacp-10f;
    p = r * p + 0x1.3b2d4ep-7f;
    p = r * p + 0x1.c6aee8p-5f;
    p = r * p + 0x1.ebfbdcp-3f;
    p = r * p + 0x1.62e430p-1f;
    p = r * p + 1.0f;
#if TW_LANES == 16
    return (tw_vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    p *= (tw_vec)(((tw_ivec)shifted << 23) + 0x3f800000);
    return (tw_vec)((tw_ivec)p & ~(x < bound));
#endif
}

/* ---- packing ---- */

/* to[c * 32 + r] = row r's element c, for 8 rows and 8 elements of 32 bits */
static inline void tw_transpose_8x8(const void *const *rows, int64_t at, float *to) {
    for (int half = 0; half < 8; half += 4) {
        __m256 v[4];
        for (int r = 0; r < 4; r++) {
            const float *const low = (const float *)rows[r] + at + half;
            const float *const high = (const float *)rows[r + 4] + at + half;
            v[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        }
        const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
        const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
        _mm256_storeu_ps(to + (half + 0) * TW_PANEL, _mm256_shuffle_ps(a, c, 0x44));
        _mm256_storeu_ps(to + (half + 1) * TW_PANEL, _mm256_shuffle_ps(a, c, 0xee));
        _mm256_storeu_ps(to + (half + 2) * TW_PANEL, _mm256_shuffle_ps(b, d, 0x44));
        _mm256_storeu_ps(to + (half + 3) * TW_PANEL, _mm256_shuffle_ps(b, d, 0xee));
    }
}

/* Start to fetch four cache lines, into the second cache, from the `line`th of rows of `length` elements of 32 bits. */
static inline void tw_prefetch_lines(const void *const *rows, int64_t line, int64_t length) {
    const int64_t lines = (length + 15) / 16;
    for (int64_t end = line + 4; line < end; line++) {
        __builtin_prefetch((const char *)rows[line / lines] + line % lines * 64, 0, 2);
    }
}

/* panel[d][32] = 32 rows of `length` elements of 32 bits, transposed. Meanwhile two times 32 rows are fetched, `soon`
   (or 0): evenly, because the processor waits when many loads are under way, and in order, as it guesses right then. */
static inline void tw_pack_transposed(void *panel, const void *const *rows, int64_t length, const void *const *soon) {
    float *const to = panel;
    for (int64_t row = 0; row < TW_PANEL; row += 8) {
        if (length < 8) {
            for (int64_t d = 0; d < length; d++) {
                for (int64_t r = row; r < row + 8; r++) {
                    memcpy(to + d * TW_PANEL + r, (const char *)rows[r] + d * 4, 4);
                }
            }
            continue;
        }
        /* The last step overlaps the one before it where 8 does not divide the length. */
        for (int64_t d = 0; d < length; d += 8) {
            const int64_t at = tw_smaller(d, length - 8);
            tw_transpose_8x8(rows + row, at, to + at * TW_PANEL + row);
            if (soon && d + 8 <= length) {
                tw_prefetch_lines(soon + row, d / 2, length);
                tw_prefetch_lines(soon + TW_PANEL + row, d / 2, length);
            }
        }
    }
}

/* A row of `length` floats into panels that are `pitch` floats apart. */
static inline void tw_pack_value_f32(float *to, int64_t pitch, const float *from, int64_t length) {
    int64_t d = 0;
    for (; d + TW_PANEL <= length; d += TW_PANEL, to += pitch) {
        for (int64_t at = 0; at < TW_PANEL; at += TW_LANES) {
            tw_store(to + at, tw_load(from + d + at));
        }
    }
    memcpy(to, from + d, (length - d) * 4);
}

/* ---- products ---- */

/* sums[r][0..2*TW_LANES), rows `pitch` floats apart, = sums * factors[r] (0 without factors) + the sum over k < depth
   of a[r * stride + k] times b[k * step + ...]; a and b in elements of 32 bits. The narrow form: TW_LANES columns. */
#define TW_LOAD_f32 const tw_vec b0 = tw_load(b), b1 = tw_load(b + TW_LANES);
#define TW_LOAD_f32_narrow const tw_vec b0 = tw_load(b);
#define TW_STEPS_f32(ROWS) { TW_LOAD_f32 TW_REPEAT_##ROWS(TW_STEP) }
#define TW_STEPS_f32_narrow(ROWS) { TW_LOAD_f32_narrow TW_REPEAT_##ROWS(TW_STEP_narrow) }
#define TW_TILE_POINTER(r) const tw_element *const a##r = a + r * stride;
#define TW_SCALE(r) \
    x##r = tw_load(sums + r * pitch) * factors[r], y##r = tw_load(sums + r * pitch + TW_LANES) * factors[r];
#define TW_SCALE_narrow(r) x##r = tw_load(sums + r * pitch) * factors[r];
#define TW_KEEP(r) tw_store(sums + r * pitch, x##r), tw_store(sums + r * pitch + TW_LANES, y##r);
#define TW_KEEP_narrow(r) tw_store(sums + r * pitch, x##r);
#define TW_SCALE_WIDE(r) /* of four vectors: see TW_STEPS_WIDE */ \
    w##r = tw_load(sums + r * pitch) * factors[r], x##r = tw_load(sums + r * pitch + 8) * factors[r]; \
    y##r = tw_load(sums + r * pitch + 16) * factors[r], z##r = tw_load(sums + r * pitch + 24) * factors[r];
#define TW_KEEP_WIDE(r) \
    tw_store(sums + r * pitch, w##r), tw_store(sums + r * pitch + 8, x##r); \
    tw_store(sums + r * pitch + 16, y##r), tw_store(sums + r * pitch + 24, z##r);
/* Short vectors leave little between a step's multiply-adds and the counting of the next. */
#if defined(__SANITIZE_ADDRESS__) || TW_LANES > 8 || defined(TW_WORDS_H)
#define TW_UNROLLED_TILE
#else
#define TW_UNROLLED_TILE _Pragma("GCC unroll 4")
#endif
#define TW_DEFINE_TILE(NAME, ELEMENT, STEPS, ZERO, SCALE, KEEP, ROWS) \
    static __attribute__((unused, noinline)) void NAME##ROWS( \
        const ELEMENT *a, int64_t stride, const ELEMENT *b, int64_t step, int64_t depth, float *sums, int64_t pitch, \
        const float *factors) { \
        typedef ELEMENT tw_element; \
        TW_REPEAT_##ROWS(TW_TILE_POINTER) \
        TW_REPEAT_##ROWS(ZERO) \
        if (factors) { TW_REPEAT_##ROWS(SCALE) } \
        TW_UNROLLED_TILE \
        for (int64_t k = 0; k < depth; k++, b += step) { STEPS(ROWS) } \
        TW_REPEAT_##ROWS(KEEP) \
    }
#define TW_DEFINE_TILES(KIND, ELEMENT, ROWS) \
    TW_DEFINE_TILE(tw_tile_##KIND##_, ELEMENT, TW_STEPS_##KIND, TW_ZERO, TW_SCALE, TW_KEEP, ROWS) \
    TW_DEFINE_TILE( \
        tw_narrow_##KIND##_, ELEMENT, TW_STEPS_##KIND##_narrow, TW_ZERO_narrow, TW_SCALE_narrow, TW_KEEP_narrow, ROWS)

/* The same for `width` columns of one panel, which are rounded up to whole vectors; at most TW_MR rows. */
#define TW_DEFINE_TILE_OF_ROWS(KIND, ELEMENT, HOW) \
    static inline void tw_tile_##HOW##KIND( \
        int64_t rows, int64_t width, const ELEMENT *a, int64_t stride, const ELEMENT *b, int64_t step, int64_t depth, \
        float *sums, int64_t pitch, const float *factors) { \
        for (int64_t c = 0; c < width; c += 2 * TW_LANES) { \
            if (width - c > TW_LANES) { \
                TW_SWITCH_ROWS(tw_tile_##KIND##_, rows, a, stride, b + c, step, depth, sums + c, pitch, factors) \
            } else { \
                TW_SWITCH_ROWS(tw_narrow_##KIND##_, rows, a, stride, b + c, step, depth, sums + c, pitch, factors) \
            } \
        } \
    }

#ifdef TW_WORDS_H
#define TW_DEFINE_TILES_bf16(ROWS) TW_DEFINE_TILES(bf16, uint32_t, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_TILES_bf16)
TW_DEFINE_TILE_OF_ROWS(bf16, uint32_t, )

/* Two rows of `length` bfloat16 into panels of words that are `pitch` words apart. */
static inline void tw_pack_value_bf16(
    uint32_t *to, int64_t pitch, const uint16_t *even, const uint16_t *odd, int64_t length) {
    int64_t d = 0;
    for (; d + TW_PANEL <= length; d += TW_PANEL, to += pitch) {
        tw_pair_rows_bf16(to, even + d, odd + d);
    }
    for (; d < length; d++) {
        to[d % TW_PANEL] = (uint32_t)even[d] | (uint32_t)odd[d] << 16;
    }
}

/* to[0..2*TW_LANES) = two vectors of floats, rounded; `to` may be where they came from. */
static inline void tw_store_pair_bf16(uint16_t *to, tw_vec first, tw_vec second) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    float both[2 * TW_LANES];
    tw_store(both, first);
    tw_store(both + TW_LANES, second);
#pragma omp simd
    for (int64_t at = 0; at < 2 * TW_LANES; at++) {
        to[at] = tw_f32_to_bf16(both[at]);
    }
#endif
}
#else
#define TW_DEFINE_TILES_f32(ROWS) TW_DEFINE_TILES(f32, float, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_TILES_f32)
#if TW_LANES * 2 < TW_PANEL
TW_DEFINE_TILE_OF_ROWS(f32, float, in_halves_)

/* All columns of a panel, for up to TW_MR / 2 rows at once; see tw_simd.h. */
#define TW_DEFINE_WHOLE_TILE(ROWS) \
    TW_DEFINE_TILE(tw_whole_f32_, float, TW_STEPS_WIDE, TW_ZERO_WIDE, TW_SCALE_WIDE, TW_KEEP_WIDE, ROWS)
TW_DEFINE_WHOLE_TILE(1)
TW_DEFINE_WHOLE_TILE(2)
TW_DEFINE_WHOLE_TILE(3)
static inline void tw_tile_f32(
    int64_t rows, int64_t width, const float *a, int64_t stride, const float *b, int64_t step, int64_t depth,
    float *sums, int64_t pitch, const float *factors) {
    if (width + TW_LANES <= TW_PANEL) {
        tw_tile_in_halves_f32(rows, width, a, stride, b, step, depth, sums, pitch, factors);
    } else {
        const int64_t half = rows > TW_MR / 2 ? (rows + 1) / 2 : rows;
        TW_SWITCH_FLOATS(tw_whole_f32_, half, a, stride, b, step, depth, sums, pitch, factors)
        TW_SWITCH_FLOATS(
            tw_whole_f32_, rows - half, a + half * stride, stride, b, step, depth, sums + half * pitch, pitch,
            factors ? factors + half : 0)
    }
}
#else
TW_DEFINE_TILE_OF_ROWS(f32, float, )
#endif
#endif

/* ---- softmax ---- */

/* Turns the scores of a tile's rows into exponentials 2^(scale * (score - maximum)) against each row's running maximum
   and adds them to its running sum; with tw_words.h, they end as words in the first half of the row. Rows are `pitch`
   floats apart; used[r] scores of row r count, a multiple of 32, and where that is 0 the row stays as it is. factors[r]
   is for what the row has accumulated so far. A row that has met only -infinity keeps the sum 0. */
static inline void tw_softmax_tile(int64_t rows, float *scores, int64_t pitch, const int64_t *used, float scale,
                                   float *maxima, float *sums, float *factors) {
    float shifts[TW_MR];
    for (int64_t r = 0; r < rows; r++) {
        const float *const row = scores + r * pitch;
        if (used[r] == 0) {
            continue;
        }
        tw_vec best = tw_load(row), other = tw_load(row + TW_LANES);
        for (int64_t at = 2 * TW_LANES; at < used[r]; at += 2 * TW_LANES) {
            best = TW_MAX(best, tw_load(row + at));
            other = TW_MAX(other, tw_load(row + at + TW_LANES));
        }
        const float before = maxima[r], block = tw_lanes_max(TW_MAX(best, other));
        const float now = block > before ? block : before;
        shifts[r] = now == -INFINITY ? 0.0f : now;
        /* Nothing remains of powers that are too small for a float, which take long; a row's first block is such. */
        const float step = (before - shifts[r]) * scale;
        factors[r] = now == before ? 1.0f : step < -126.0f ? 0.0f : tw_exp2_f32(step);
        maxima[r] = now;
    }
    for (int64_t r = 0; r < rows; r++) {
        float *const row = scores + r * pitch;
        if (used[r] == 0) {
            continue;
        }
        tw_vec total = {0}, rest = {0};
        for (int64_t at = 0; at < used[r]; at += 2 * TW_LANES) {
            const tw_vec e = tw_exp2_nonpositive_vec((tw_load(row + at) - shifts[r]) * scale);
            const tw_vec f = tw_exp2_nonpositive_vec((tw_load(row + at + TW_LANES) - shifts[r]) * scale);
            total += e, rest += f;
#ifdef TW_WORDS_H
            tw_store_pair_bf16((uint16_t *)row + at, e, f);
#else
            tw_store(row + at, e);
            tw_store(row + at + TW_LANES, f);
#endif
        }
        sums[r] = sums[r] * factors[r] + tw_lanes_sum(total + rest);
    }
}

#endif

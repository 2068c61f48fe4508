/* Register-blocked products over words: 32 bits that hold 2 bfloat16 or 4 int8, neighbours along the reduction axis.
 *
 * A panel of B is [words][32], so the structure is that of the float32 product in tw_simd.h with the depth counted in
 * words; an operand whose last word is not full is padded with zeros. The step over one word of all rows is a macro, for
 * other loops around it (a convolution's):
 *
 *   TW_STEPS_bf16(ROWS)          x_r, y_r (+)= the products of word a_r[k] with the words b[0..2*TW_LANES)
 *   TW_STEPS_bf16_narrow(ROWS)   only x_r, with the words b[0..TW_LANES)
 *
 * with `const uint32_t *a<r>, *b; int64_t k` of the surrounding function and the sums that TW_ZERO_bf16(r) declares.
 *
 * bfloat16 sums are float32. AVX-512 BF16 multiplies and adds both halves of a word in one instruction. Elsewhere a word
 * is split into two float32 in registers, which is exact, and takes two multiply-adds: the even elements of all rows,
 * then the odd ones, because AVX2 has no registers for both halves at once.
 *
 * int8 sums are int32, exact modulo 2^32: a holds unsigned bytes and b signed ones. A signed a is offset by 128, which the
 * caller takes back: sum of (a + 128) * b = sum of a * b + 128 * sum of b. VNNI does a word in one instruction; elsewhere
 * bytes are widened to 16 bits, since multiplying bytes directly (vpmaddubsw) saturates.
 *
 * The order of a sum depends on the instruction set alone, not on the number of rows nor on a pause between two blocks.
 */
#ifndef TW_WORDS_H
#define TW_WORDS_H

#include "tw_half.h"
#include "tw_intrinsics.h"
#include "tw_simd.h"

typedef uint32_t tw_words __attribute__((vector_size(TW_LANES * 4)));
typedef uint32_t tw_words_anywhere __attribute__((vector_size(TW_LANES * 4), aligned(4), may_alias));
typedef int32_t tw_ints __attribute__((vector_size(TW_LANES * 4)));
typedef int32_t tw_ints_anywhere __attribute__((vector_size(TW_LANES * 4), aligned(4), may_alias));

static inline tw_words tw_load_words(const uint32_t *p) { return *(const tw_words_anywhere *)p; }
static inline void tw_store_words(uint32_t *p, tw_words v) { *(tw_words_anywhere *)p = v; }
static inline tw_ints tw_load_ints(const int32_t *p) { return *(const tw_ints_anywhere *)p; }
static inline void tw_store_ints(int32_t *p, tw_ints v) { *(tw_ints_anywhere *)p = v; }
static inline tw_words tw_broadcast_word(const uint32_t *p) {
#if TW_LANES == 16
    return (tw_words)_mm512_set1_epi32((int32_t)*p);
#else
    return (tw_words)_mm256_castps_si256(_mm256_broadcast_ss((const float *)p));
#endif
}

/* The two elements of words of bfloat16. */
static inline tw_vec tw_even_bf16(tw_words w) { return (tw_vec)(w << 16); }
static inline tw_vec tw_odd_bf16(tw_words w) { return (tw_vec)(w & 0xffff0000u); }

/* Accumulators x_r and y_r of row r, as in tw_simd.h; wide ones of AVX2 hold a whole row of a panel. */
#define TW_ZERO_bf16(r) tw_vec x##r = {0}, y##r = {0};
#define TW_RESUME_bf16(r) x##r = tw_load(sums + r * TW_PANEL), y##r = tw_load(sums + r * TW_PANEL + TW_LANES);
#define TW_FINISH_bf16(r) tw_store(sums + r * TW_PANEL, x##r), tw_store(sums + r * TW_PANEL + TW_LANES, y##r);
#define TW_ZERO_bf16_narrow(r) tw_vec x##r = {0};
#define TW_RESUME_bf16_narrow(r) x##r = tw_load(sums + r * TW_PANEL);
#define TW_FINISH_bf16_narrow(r) tw_store(sums + r * TW_PANEL, x##r);
#define TW_ZERO_int8(r) tw_ints x##r = {0}, y##r = {0};
#define TW_RESUME_int8(r) x##r = tw_load_ints(sums + r * TW_PANEL), y##r = tw_load_ints(sums + r * TW_PANEL + TW_LANES);
#define TW_FINISH_int8(r) tw_store_ints(sums + r * TW_PANEL, x##r), tw_store_ints(sums + r * TW_PANEL + TW_LANES, y##r);

/* One instruction for a word of each lane, or two steps: for the even elements of all rows, then for the odd ones. The
 * barrier has the words loaded anew: compilers would keep them, and spill sums. */
#define TW_AT_ONCE(ROWS, LOAD, STEP) \
    { \
        LOAD \
        TW_REPEAT_##ROWS(STEP) \
    }
#define TW_IN_HALVES(ROWS, LOAD_EVEN, STEP_EVEN, LOAD_ODD, STEP_ODD) \
    { \
        LOAD_EVEN \
        TW_REPEAT_##ROWS(STEP_EVEN) \
    } \
    __asm__ volatile("" ::: "memory"); \
    { \
        LOAD_ODD \
        TW_REPEAT_##ROWS(STEP_ODD) \
    }

#if defined(__AVX512BF16__)
#define TW_DOT_bf16(sum, a, b) ((tw_vec)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b)))
#define TW_LOAD_bf16 const tw_words b0 = tw_load_words(b), b1 = tw_load_words(b + TW_LANES);
#define TW_LOAD_bf16_narrow const tw_words b0 = tw_load_words(b);
#define TW_STEP_bf16(r) \
    { \
        const tw_words one = tw_broadcast_word(a##r + k); \
        x##r = TW_DOT_bf16(x##r, one, b0), y##r = TW_DOT_bf16(y##r, one, b1); \
    }
#define TW_STEP_bf16_narrow(r) x##r = TW_DOT_bf16(x##r, tw_broadcast_word(a##r + k), b0);
#define TW_STEPS_bf16(ROWS) TW_AT_ONCE(ROWS, TW_LOAD_bf16, TW_STEP_bf16)
#define TW_STEPS_bf16_narrow(ROWS) TW_AT_ONCE(ROWS, TW_LOAD_bf16_narrow, TW_STEP_bf16_narrow)
#else
#define TW_LOAD_HALF_bf16(HALF) \
    const tw_vec b0 = tw_##HALF##_bf16(tw_load_words(b)), b1 = tw_##HALF##_bf16(tw_load_words(b + TW_LANES)); \
    (void)b1;
#define TW_STEP_HALF_bf16(r, HALF) \
    { \
        const tw_vec one = tw_##HALF##_bf16(tw_broadcast_word(a##r + k)); \
        x##r += one * b0, y##r += one * b1; \
    }
#define TW_STEP_HALF_bf16_narrow(r, HALF) x##r += tw_##HALF##_bf16(tw_broadcast_word(a##r + k)) * b0;
#define TW_STEP_EVEN_bf16(r) TW_STEP_HALF_bf16(r, even)
#define TW_STEP_ODD_bf16(r) TW_STEP_HALF_bf16(r, odd)
#define TW_STEP_EVEN_bf16_narrow(r) TW_STEP_HALF_bf16_narrow(r, even)
#define TW_STEP_ODD_bf16_narrow(r) TW_STEP_HALF_bf16_narrow(r, odd)
#define TW_STEPS_bf16(ROWS) \
    TW_IN_HALVES(ROWS, TW_LOAD_HALF_bf16(even), TW_STEP_EVEN_bf16, TW_LOAD_HALF_bf16(odd), TW_STEP_ODD_bf16)
#define TW_STEPS_bf16_narrow(ROWS) \
    TW_IN_HALVES( \
        ROWS, TW_LOAD_HALF_bf16(even), TW_STEP_EVEN_bf16_narrow, TW_LOAD_HALF_bf16(odd), TW_STEP_ODD_bf16_narrow)
#endif

#if defined(__AVX512VNNI__)
#define TW_DOT_int8(sum, a, b) ((tw_ints)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b)))
#define TW_LOAD_int8 const tw_words b0 = tw_load_words(b), b1 = tw_load_words(b + TW_LANES);
#define TW_STEP_int8(r) \
    { \
        const tw_words one = tw_broadcast_word(a##r + k); \
        x##r = TW_DOT_int8(x##r, one, b0), y##r = TW_DOT_int8(y##r, one, b1); \
    }
#define TW_STEPS_int8(ROWS) TW_AT_ONCE(ROWS, TW_LOAD_int8, TW_STEP_int8)
#else
typedef int16_t tw_shorts __attribute__((vector_size(TW_LANES * 4)));
#if TW_LANES == 16
#define TW_DOT_PAIRS(a, b) ((tw_ints)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#else
#define TW_DOT_PAIRS(a, b) ((tw_ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#endif
/* Bytes 0 and 2, or 1 and 3, of each word as 16-bit numbers: unsigned for a, signed for b. */
static inline tw_shorts tw_even_unsigned(tw_words w) { return (tw_shorts)(w & 0x00ff00ffu); }
static inline tw_shorts tw_odd_unsigned(tw_words w) { return (tw_shorts)(w >> 8 & 0x00ff00ffu); }
static inline tw_shorts tw_even_signed(tw_words w) { return (tw_shorts)(w << 8) >> 8; }
static inline tw_shorts tw_odd_signed(tw_words w) { return (tw_shorts)w >> 8; }
#define TW_LOAD_HALF_int8(HALF) \
    const tw_shorts b0 = tw_##HALF##_signed(tw_load_words(b)), b1 = tw_##HALF##_signed(tw_load_words(b + TW_LANES));
#define TW_STEP_HALF_int8(r, HALF) \
    { \
        const tw_shorts one = tw_##HALF##_unsigned(tw_broadcast_word(a##r + k)); \
        x##r += TW_DOT_PAIRS(one, b0), y##r += TW_DOT_PAIRS(one, b1); \
    }
#define TW_STEP_EVEN_int8(r) TW_STEP_HALF_int8(r, even)
#define TW_STEP_ODD_int8(r) TW_STEP_HALF_int8(r, odd)
#define TW_STEPS_int8(ROWS) \
    TW_IN_HALVES(ROWS, TW_LOAD_HALF_int8(even), TW_STEP_EVEN_int8, TW_LOAD_HALF_int8(odd), TW_STEP_ODD_int8)
#endif

/* How far ahead of a step a panel's words are fetched: with few rows a step takes less time than memory does, with
 * many the panel is in cache from the tile before. */
#define TW_FAR_WORDS (32 * TW_PANEL)

/* sums[r][0..2*TW_LANES) (+)= sum over k < depth of the words a[r*stride + k] times b[k*32 + ...]; resume: continue. */
#define TW_WORD_POINTER(r) const uint32_t *const a##r = a + r * stride;
#define TW_DEFINE_WORDS(KIND, SUM, ROWS) \
    static __attribute__((unused, noinline)) void tw_product_##KIND##_##ROWS( \
        const uint32_t *a, int64_t stride, const uint32_t *b, int64_t depth, SUM *sums, int resume) { \
        TW_REPEAT_##ROWS(TW_WORD_POINTER) \
        TW_REPEAT_##ROWS(TW_ZERO_##KIND) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME_##KIND) } \
        for (int64_t k = 0; k < depth; k++, b += TW_PANEL) { \
            if (ROWS <= 4) __builtin_prefetch(b + TW_FAR_WORDS, 0, 3); \
            TW_STEPS_##KIND(ROWS) \
        } \
        TW_REPEAT_##ROWS(TW_FINISH_##KIND) \
    }
#define TW_DEFINE_bf16(ROWS) TW_DEFINE_WORDS(bf16, float, ROWS)
#define TW_DEFINE_int8(ROWS) TW_DEFINE_WORDS(int8, int32_t, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_bf16)
TW_FOR_EACH_ROWS(TW_DEFINE_int8)

/* sums[rows][32] (+)= a[rows][depth words] * b[depth words][32] for any number of rows, `stride` words apart, cut into
 * near-equal tiles of at most TW_MR. */
#if TW_LANES * 2 < TW_PANEL
#define TW_TILE_OF_WORDS(KIND, ROWS, ...) \
    TW_SWITCH_ROWS(tw_product_##KIND##_, ROWS, a + row * stride, stride, b, depth, sums + row * TW_PANEL, resume) \
    TW_SWITCH_ROWS( \
        tw_product_##KIND##_, ROWS, a + row * stride, stride, b + 16, depth, sums + row * TW_PANEL + 16, resume)
#else
#define TW_TILE_OF_WORDS(KIND, ROWS) \
    TW_SWITCH_ROWS(tw_product_##KIND##_, ROWS, a + row * stride, stride, b, depth, sums + row * TW_PANEL, resume)
#endif
#define TW_DEFINE_WORDS_OF_ROWS(KIND, SUM) \
    static inline void tw_product_rows_##KIND( \
        int64_t rows, const uint32_t *a, int64_t stride, const uint32_t *b, int64_t depth, SUM *sums, int resume) { \
        const int64_t tiles = tw_ceildiv(rows, TW_MR); \
        for (int64_t t = 0, row = 0; t < tiles; t++) { \
            const int64_t next = rows * (t + 1) / tiles; \
            TW_TILE_OF_WORDS(KIND, next - row) \
            row = next; \
        } \
    }
TW_DEFINE_WORDS_OF_ROWS(bf16, float)
TW_DEFINE_WORDS_OF_ROWS(int8, int32_t)

/* Making words of bfloat16. Float32 is rounded to nearest even; AVX-512 BF16 takes subnormal float32 as zeros. */

/* One vector of words from their even and odd elements. */
static inline tw_words tw_words_of_bf16(tw_vec even, tw_vec odd) {
#if defined(__AVX512BF16__)
    const tw_words low = (tw_words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const tw_words high = (tw_words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return low | high << 16;
#else
    const tw_words e = (tw_words)even, o = (tw_words)odd;
    const tw_words low = (e + 0x7fffu + (e >> 16 & 1u)) >> 16, high = (o + 0x7fffu + (o >> 16 & 1u)) & 0xffff0000u;
    const tw_words low_nan = (tw_words)(even != even), high_nan = (tw_words)(odd != odd);
    return (low & ~low_nan) | (low_nan & 0x7fc0u) | (high & ~high_nan) | (high_nan & 0x7fc00000u);
#endif
}

/* to[0..ceil(count/2)) = a row of `count` floats, neighbours in a word; a last odd element is paired with a zero. */
static inline void tw_pack_bf16(uint32_t *restrict to, const float *restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 32 <= count; i += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
        _mm512_storeu_si512(to + i / 2, (__m512i)both);
    }
    if (i < count) {
        const int64_t left = count - i;
        const __mmask32 mask = (__mmask32)((1ull << left) - 1);
        const __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, from + i);
        const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + i + (left > 16 ? 16 : 0));
        const __mmask16 words = (__mmask16)((1u << (left + 1) / 2) - 1);
        _mm512_mask_storeu_epi32(to + i / 2, words, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
#else
    uint16_t *restrict const halves = (uint16_t *)to;
#pragma omp simd
    for (i = 0; i < count; i++) {
        halves[i] = tw_f32_to_bf16(from[i]);
    }
    if (count % 2) {
        halves[count] = 0;
    }
#endif
}

/* to[0..32) = the words of two rows of a panel, each of 32 floats: a step of the reduction axis. */
static inline void tw_pack_rows_bf16(uint32_t *to, const float *even, const float *odd) {
    for (int64_t n = 0; n < TW_PANEL; n += TW_LANES) {
        tw_store_words(to + n, tw_words_of_bf16(tw_load(even + n), tw_load(odd + n)));
    }
}

/* The same from rows of bfloat16. */
static inline void tw_pair_rows_bf16(uint32_t *restrict to, const uint16_t *restrict even, const uint16_t *restrict odd) {
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        to[n] = (uint32_t)even[n] | (uint32_t)odd[n] << 16;
    }
}

/* to[0..ceil(count/2)) = a row of `count` bfloat16, with a zero after a last odd element. */
static inline void tw_copy_bf16(uint32_t *to, const uint16_t *from, int64_t count) {
    memcpy(to, from, (size_t)count * 2);
    if (count % 2) {
        ((uint16_t *)to)[count] = 0;
    }
}

/* Making words of int8: unsigned bytes for a, signed ones for b. */

/* to[0..ceil(count/4)) = a row of `count` signed bytes, each offset by 128; zeros of b meet what the last word lacks. */
static inline void tw_pack_int8(uint32_t *restrict to, const int8_t *restrict from, int64_t count) {
    uint8_t *restrict const bytes = (uint8_t *)to;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        bytes[i] = (uint8_t)from[i] ^ 0x80u;
    }
    memset(bytes + count, 0, (size_t)(-count & 3));
}

/* to[0..32) = the words of four rows of a panel, each of 32 bytes; adds to offsets[32] what the 128 of each a gives. */
static inline void tw_pack_rows_int8(uint32_t *restrict to, const int8_t *restrict rows, uint32_t *restrict offsets) {
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        const int32_t r0 = rows[n], r1 = rows[TW_PANEL + n], r2 = rows[2 * TW_PANEL + n], r3 = rows[3 * TW_PANEL + n];
        to[n] = (uint32_t)(r0 & 0xff) | (uint32_t)(r1 & 0xff) << 8 | (uint32_t)(r2 & 0xff) << 16 | (uint32_t)r3 << 24;
        offsets[n] += (uint32_t)(r0 + r1 + r2 + r3) * 128;
    }
}

#endif

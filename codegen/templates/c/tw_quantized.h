/* Products with weights of 4 or 8 bits, by activations that are quantized here or stay floating point.
 *
 * A panel of weights holds 32 columns. Along k it goes in steps of 32 terms and in groups of `per` steps; a group is a
 * header, then its steps (codegen/c/quantized_packing.py makes them):
 *
 *   header  the scales of the 32 columns, float16 (4 bits) or float32 (8 bits); with zero points, then a byte for each
 *   step    two halves of 16 columns; a half is [words][16][4 bytes]. Of 4 bits there are 4 words: byte i of word p holds
 *           term 8p + i in its low half and term 8p + 4 + i in its high half. Of 8 bits there are 8 words: byte i of
 *           word p holds term 4p + i.
 *
 * So a panel is read from its beginning to its end, by whatever registers there are: AVX2 takes the halves of a step one
 * after the other, two vectors of 8 columns each; AVX-512 takes both at once.
 *
 * Rows of activations are int8, filled up with zeros to whole steps, with a scale and a sum of codes for every step. A
 * step's products are summed exactly; the sums of steps are added up in float32 in the order of k, as
 * (sum of code * x - zero * sum of x) * (weight's scale * row's scale). What a row gives depends neither on the rows beside
 * it nor on where a chunk of steps ends.
 *
 * Codes of 4 bits are multiplied unsigned (vpmaddubsw): 8 products of two fit 16 bits, 8 * 2 * 15 * 127 < 2^15. Of 8 bits
 * both signs go to the activation, |w| * (sign(w) * x), and one product of two fits, 2 * 127 * 127 < 2^15. VNNI sums four
 * products in 32 bits at once; there codes of 8 bits are offset by 128 and the zero point with them.
 */
#ifndef TW_QUANTIZED_H
#define TW_QUANTIZED_H

#include "tw_intrinsics.h"
#include "tw_simd.h"

#define TW_STEP_K 32    /* terms of a step */
#define TW_AHEAD_Q 8192 /* bytes that are fetched ahead of a panel's stream */

#if TW_LANES == 16
#define TW_ROWS_Q 8
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
#define TW_FOR_EACH_ROWS_Q(X, KIND) X(KIND, 1) X(KIND, 2) X(KIND, 3) X(KIND, 4) X(KIND, 5) X(KIND, 6) X(KIND, 7) X(KIND, 8)
#define TW_SWITCH_ROWS_Q(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) TW_CASE(function, 3, __VA_ARGS__) \
        TW_CASE(function, 4, __VA_ARGS__) TW_CASE(function, 5, __VA_ARGS__) TW_CASE(function, 6, __VA_ARGS__) \
        TW_CASE(function, 7, __VA_ARGS__) TW_CASE(function, 8, __VA_ARGS__) \
    }
#else
#define TW_ROWS_Q 4 /* 4 x 2 sums, 2 vectors of weights twice, 1 broadcast, 2 products, of 16 registers */
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
#define TW_ABS_Q(a) _mm256_abs_epi8(a)
#define TW_SIGN_Q(a, sign) _mm256_sign_epi8(a, sign)
#define TW_FLOAT_Q(a) ((tw_vec)_mm256_cvtepi32_ps(a))
#define TW_KEEP_Q(a, b) __asm__("" : "+x"(a), "+x"(b))
#define TW_FOR_EACH_ROWS_Q(X, KIND) X(KIND, 1) X(KIND, 2) X(KIND, 3) X(KIND, 4)
#define TW_SWITCH_ROWS_Q(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) \
        TW_CASE(function, 3, __VA_ARGS__) TW_CASE(function, 4, __VA_ARGS__) \
    }
#endif

#if defined(__AVX512VNNI__)
#define TW_OFFSET_int8 128 /* what is added to codes of 8 bits to make them unsigned */
#else
#define TW_OFFSET_int8 0
#endif
#define TW_OFFSET_int4 0
#define TW_SYMMETRIC_int4 8 /* the zero point where none is stored */
#define TW_SYMMETRIC_int8 0

static inline int32_t tw_word_q(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* What a tile of rows fetches while it goes over a half step (AVX-512: a step): lines [first, last) of what lies `bytes`
 * further. Tiles that go over the same chunk share the lines of the next one, because fetching takes as long as loading. */
typedef struct {
    int64_t bytes, first, last;
} tw_ahead;

static inline void tw_prefetch_q(const uint8_t *from, tw_ahead ahead) {
    for (int64_t line = ahead.first; line < ahead.last; line++) {
        _mm_prefetch((const char *)from + ahead.bytes + line * 64, _MM_HINT_T0);
    }
}

/* Tile t of `tiles`. The first one also takes the line before, which may be a header. */
static inline tw_ahead tw_ahead_of(int64_t t, int64_t tiles, int64_t step_bytes) {
    const int64_t lines = step_bytes / TW_HALVES / 64;
    return (tw_ahead){TW_AHEAD_Q, t == 0 ? -1 : lines * t / tiles, lines * (t + 1) / tiles};
}

/* How a panel lies: bytes of a half of a step, of a step, and of a header. */
#define TW_HALF_int4 256
#define TW_HALF_int8 512
#define TW_STEP_BYTES(KIND) (2 * TW_HALF_##KIND)
#define TW_SCALES_int4 64
#define TW_SCALES_int8 128
#define TW_HEADER_BYTES(KIND, zeros) (TW_SCALES_##KIND + ((zeros) ? TW_PANEL : 0))

/* Bytes of the groups before group `group`. */
#define TW_GROUPS_BYTES(KIND, zeros, group, per) \
    ((group) * ((int64_t)TW_HEADER_BYTES(KIND, zeros) + (per) * (int64_t)TW_STEP_BYTES(KIND)))

/* Begins a loop over steps [from, end) of a panel, group by group: `scales` and `points` are those of the group, `step`
 * is where step s lies. */
#define TW_FOR_EACH_STEP(KIND, offset) \
    for (int64_t s = from; s < end;) { \
        float scales[TW_PANEL] TW_ALIGNED, points[TW_PANEL] TW_ALIGNED; \
        const int64_t group = s / per; \
        const uint8_t *step = panel + TW_GROUPS_BYTES(KIND, zeros, group, per); \
        tw_header_##KIND(step, zeros, offset, scales, points); \
        step += TW_HEADER_BYTES(KIND, zeros) + (s - group * per) * TW_STEP_BYTES(KIND); \
        for (const int64_t last = tw_smaller((group + 1) * per, end); s < last; s++, step += TW_STEP_BYTES(KIND)) {
#define TW_END_OF_STEPS \
        } \
    }

/* A header's scales and zero points (these with the offset of codes) as floats. */
static inline void tw_header_int4(const uint8_t *from, int zeros, int offset, float *scales, float *points) {
    for (int64_t n = 0; n < TW_PANEL; n += TW_LANES) {
#if TW_LANES == 16
        tw_store(scales + n, (tw_vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 2 * n))));
#else
        tw_store(scales + n, (tw_vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * n))));
#endif
    }
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        points[n] = (float)((zeros ? from[TW_SCALES_int4 + n] : TW_SYMMETRIC_int4) + offset);
    }
}
static inline void tw_header_int8(const uint8_t *from, int zeros, int offset, float *scales, float *points) {
    memcpy(scales, from, TW_PANEL * sizeof(float));
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        points[n] = (float)((zeros ? (int8_t)from[TW_SCALES_int8 + n] : TW_SYMMETRIC_int8) + offset);
    }
}

/* Sums of row r: two vectors side by side. The barrier keeps compilers from adding products to each other first, which
 * takes more registers than there are. */
#define TW_ROW_Q(r) const int8_t *const a##r = codes + r * stride;
#define TW_ZERO_Q(r) tw_q x##r = TW_BYTES_Q(0), y##r = x##r;
#define TW_TERMS_Q(r, at, DOT) \
    { \
        const tw_q one = TW_WORD_Q(a##r + k + at); \
        x##r = DOT(x##r, one, 0), y##r = DOT(y##r, one, 1); \
        TW_KEEP_Q(x##r, y##r); \
    }

#if defined(__AVX512VNNI__)
#define TW_DOT_int4(sum, x, i) _mm512_dpbusd_epi32(sum, u##i, x)
#define TW_SUM_int4(sum) sum
#define TW_DOT_int8(sum, x, i) _mm512_dpbusd_epi32(sum, u##i, x)
#define TW_UNSIGNED_int8(w) _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80))
#else
#define TW_DOT_int4(sum, x, i) TW_ADD16_Q(sum, TW_PAIRS_Q(u##i, x))
#define TW_SUM_int4(sum) TW_WIDEN_Q(sum)
#define TW_DOT_int8(sum, x, i) TW_ADD32_Q(sum, TW_WIDEN_Q(TW_PAIRS_Q(u##i, TW_SIGN_Q(x, w##i))))
#define TW_UNSIGNED_int8(w) TW_ABS_Q(w)
#endif
#define TW_SUM_int8(sum) sum
#define TW_LOW_int4(r) TW_TERMS_Q(r, 0, TW_DOT_int4)
#define TW_HIGH_int4(r) TW_TERMS_Q(r, 4, TW_DOT_int4)
#define TW_WORD_int8(r) TW_TERMS_Q(r, 0, TW_DOT_int8)

/* The sums of 32 terms from k on of ROWS rows with a half at `at` (AVX-512: with both). */
#define TW_TERMS_int4(ROWS) \
    for (int64_t p = 0; p < 4; p++, at += 64, k += 8) { \
        const tw_q w0 = TW_LOAD_Q(at), w1 = TW_LOAD_Q(at + TW_APART_Q(TW_HALF_int4)); \
        { \
            const tw_q u0 = TW_AND_Q(w0, TW_BYTES_Q(15)), u1 = TW_AND_Q(w1, TW_BYTES_Q(15)); \
            TW_REPEAT_##ROWS(TW_LOW_int4) \
        } \
        { \
            const tw_q u0 = TW_HIGH_Q(w0), u1 = TW_HIGH_Q(w1); \
            TW_REPEAT_##ROWS(TW_HIGH_int4) \
        } \
    }
#define TW_TERMS_int8(ROWS) \
    for (int64_t p = 0; p < 8; p++, at += 64, k += 4) { \
        const tw_q w0 = TW_LOAD_Q(at), w1 = TW_LOAD_Q(at + TW_APART_Q(TW_HALF_int8)); \
        const tw_q u0 = TW_UNSIGNED_int8(w0), u1 = TW_UNSIGNED_int8(w1); \
        TW_REPEAT_##ROWS(TW_WORD_int8) \
    }

/* sums[r][column] += both scales times (the step's sum - zero point * sum of the row's codes). */
#define TW_ADD_TO_int4(r) TW_ADD_TO(r, int4)
#define TW_ADD_TO_int8(r) TW_ADD_TO(r, int8)
#define TW_ADD_TO(r, KIND) \
    { \
        float *const to = sums + r * TW_PANEL + n; \
        const float scale = row_scales[r * apart + s], total = row_sums[r * apart + s]; \
        const tw_vec f0 = TW_FLOAT_Q(TW_SUM_##KIND(x##r)) - z0 * total, f1 = TW_FLOAT_Q(TW_SUM_##KIND(y##r)) - z1 * total; \
        tw_store(to, tw_load(to) + f0 * (s0 * scale)), tw_store(to + TW_LANES, tw_load(to + TW_LANES) + f1 * (s1 * scale)); \
    }

/* Steps [from, end) of a panel, in groups of `per`, with ROWS rows of codes `stride` bytes apart, whose scales and sums
 * per step are `apart` floats apart; sums[r][32] is added to. */
#define TW_DEFINE_Q(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_quantized_##KIND##_##ROWS( \
        const int8_t *codes, int64_t stride, const float *row_scales, const float *row_sums, int64_t apart, \
        const uint8_t *panel, int64_t from, int64_t end, int64_t per, int zeros, tw_ahead ahead, float *sums) { \
        TW_REPEAT_##ROWS(TW_ROW_Q) \
        TW_FOR_EACH_STEP(KIND, TW_OFFSET_##KIND) \
            for (int64_t half = 0; half < TW_HALVES; half++) { \
                const uint8_t *at = step + half * TW_HALF_##KIND; \
                const int64_t n = half * 16; \
                int64_t k = s * TW_STEP_K; \
                tw_prefetch_q(at, ahead); \
                TW_REPEAT_##ROWS(TW_ZERO_Q) \
                TW_TERMS_##KIND(ROWS) \
                const tw_vec s0 = tw_load(scales + n), s1 = tw_load(scales + n + TW_LANES); \
                const tw_vec z0 = tw_load(points + n), z1 = tw_load(points + n + TW_LANES); \
                __asm__ volatile("" ::: "memory"); /* sums stay in memory */ \
                TW_REPEAT_##ROWS(TW_ADD_TO_##KIND) \
            } \
        TW_END_OF_STEPS \
    }
TW_FOR_EACH_ROWS_Q(TW_DEFINE_Q, int4)
TW_FOR_EACH_ROWS_Q(TW_DEFINE_Q, int8)

/* The same for one scale per column and row, of 8 bits: totals[r][32] stay integers, with the offset of codes in them. */
#if TW_LANES == 16
#define TW_ADD_INTS(to, sum) _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), sum))
#else
#define TW_ADD_INTS(to, sum) \
    _mm256_storeu_si256((__m256i *)(to), _mm256_add_epi32(_mm256_loadu_si256((const __m256i *)(to)), sum))
#endif
#define TW_ADD_WHOLE(r) \
    TW_ADD_INTS(totals + r * TW_PANEL + n, x##r); \
    TW_ADD_INTS(totals + r * TW_PANEL + n + TW_LANES, y##r);
#define TW_DEFINE_WHOLE(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_whole_##KIND##_##ROWS( \
        const int8_t *codes, int64_t stride, const uint8_t *panel, int64_t from, int64_t end, tw_ahead ahead, \
        int32_t *totals) { \
        TW_REPEAT_##ROWS(TW_ROW_Q) \
        for (int64_t s = from; s < end; s++, panel += TW_STEP_BYTES(KIND)) { \
            for (int64_t half = 0; half < TW_HALVES; half++) { \
                const uint8_t *at = panel + half * TW_HALF_##KIND; \
                const int64_t n = half * 16; \
                int64_t k = s * TW_STEP_K; \
                tw_prefetch_q(at, ahead); \
                TW_REPEAT_##ROWS(TW_ZERO_Q) \
                TW_TERMS_##KIND(ROWS) \
                __asm__ volatile("" ::: "memory"); \
                TW_REPEAT_##ROWS(TW_ADD_WHOLE) \
            } \
        } \
    }
TW_FOR_EACH_ROWS_Q(TW_DEFINE_WHOLE, int8)

/* Rows of activations as they are multiplied: codes [rows][stride], and a scale and a sum of codes for each step. */
typedef struct {
    int8_t *codes;
    float *scales, *sums;
    int64_t stride, steps;
} tw_quantized;

/* sums[rows][32] += steps [from, end) of a panel, for any number of rows: near-equal tiles of at most TW_ROWS_Q. */
#define TW_DEFINE_ROWS_OF_Q(KIND) \
    static inline void tw_product_##KIND( \
        int64_t rows, const tw_quantized *x, const uint8_t *panel, int64_t from, int64_t end, int64_t per, int zeros, \
        float *sums) { \
        const int64_t tiles = tw_ceildiv(rows, TW_ROWS_Q); \
        for (int64_t t = 0, row = 0; t < tiles; t++) { \
            const int64_t next = rows * (t + 1) / tiles; \
            TW_SWITCH_ROWS_Q( \
                tw_quantized_##KIND##_, next - row, x->codes + row * x->stride, x->stride, \
                x->scales + row * x->steps, x->sums + row * x->steps, x->steps, panel, from, end, per, zeros, \
                tw_ahead_of(t, tiles, TW_STEP_BYTES(KIND)), sums + row * TW_PANEL) \
            row = next; \
        } \
    }
TW_DEFINE_ROWS_OF_Q(int4)
TW_DEFINE_ROWS_OF_Q(int8)

/* totals[rows][32] += steps [from, end) of a panel that is one group. */
static inline void tw_product_whole_int8(
    int64_t rows, const tw_quantized *x, const uint8_t *panel, int64_t from, int64_t end, int32_t *totals) {
    const int64_t tiles = tw_ceildiv(rows, TW_ROWS_Q);
    const uint8_t *const at = panel + TW_HEADER_BYTES(int8, 0) + from * TW_STEP_BYTES(int8);
    for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t next = rows * (t + 1) / tiles;
        TW_SWITCH_ROWS_Q(
            tw_whole_int8_, next - row, x->codes + row * x->stride, x->stride, at, from, end,
            tw_ahead_of(t, tiles, TW_STEP_BYTES(int8)), totals + row * TW_PANEL)
        row = next;
    }
}

/* In place: totals of a row become floats, times both scales. */
static inline void tw_scale_whole_int8(const tw_quantized *x, int64_t row, const uint8_t *panel, int32_t *totals) {
    const float *const scales = (const float *)panel;
    const float scale = x->scales[row * x->steps];
    int32_t offset = 0;
    for (int64_t s = 0; TW_OFFSET_int8 && s < x->steps; s++) {
        offset += TW_OFFSET_int8 * (int32_t)x->sums[row * x->steps + s];
    }
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        const float total = (float)(totals[n] - offset) * (scales[n] * scale);
        memcpy(totals + n, &total, sizeof total);
    }
}

/* A row of k floats as codes in [-127, 127], rounded half to even, with one scale for every `per` steps: the largest
 * magnitude / 127. What is smaller than 1e-30 throughout has scale 0 and codes 0; a NaN makes the scale NaN. */
static inline void tw_quantize_row(const float *x, int64_t k, int64_t per, int8_t *codes, float *scales, float *sums) {
    const int64_t steps = tw_ceildiv(k, TW_STEP_K);
    for (int64_t first = 0; first < steps; first += per) {
        const int64_t last = tw_smaller(first + per, steps);
        int32_t top = 0; /* the bits of a magnitude order as integers do, with NaN above all */
#pragma omp simd reduction(max : top)
        for (int64_t i = first * TW_STEP_K; i < tw_smaller(last * TW_STEP_K, k); i++) {
            int32_t bits;
            memcpy(&bits, x + i, sizeof bits);
            bits &= 0x7fffffff;
            top = bits > top ? bits : top;
        }
        float largest;
        memcpy(&largest, &top, sizeof largest);
        const int counts = !(largest <= 1e-30f);
        const float scale = counts ? largest / 127.0f : 0.0f;
        const __m256 inverse = _mm256_set1_ps(counts ? 127.0f / largest : 0.0f);
        for (int64_t s = first; s < last; s++) {
            const float *from = x + s * TW_STEP_K;
            float padded[TW_STEP_K] TW_ALIGNED;
            if ((s + 1) * TW_STEP_K > k) {
                memset(padded, 0, sizeof padded);
                memcpy(padded, from, (size_t)(k - s * TW_STEP_K) * sizeof(float));
                from = padded;
            }
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse));
            const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), inverse));
            const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 16), inverse));
            const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 24), inverse));
            const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256((__m256i *)(codes + s * TW_STEP_K), _mm256_permutevar8x32_epi32(bytes, order));
            const __m256i four = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
            __m128i two = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
            two = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0x4e));
            two = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1));
            scales[s] = scale;
            sums[s] = (float)_mm_cvtsi128_si32(two);
        }
    }
}

/* to[32 * (end - from)][32] = the numbers that steps [from, end) of a panel stand for, rows along k. */
#define TW_DEFINE_DEQUANTIZE(KIND, TERMS, CODE) \
    static inline void tw_dequantize_##KIND( \
        const uint8_t *panel, int64_t from, int64_t end, int64_t per, int zeros, float *restrict to) { \
        TW_FOR_EACH_STEP(KIND, 0) \
            for (int64_t half = 0; half < 2; half++) { \
                for (int64_t k = 0; k < TW_STEP_K; k++) { \
                    const uint32_t *const words = (const uint32_t *)(step + half * TW_HALF_##KIND + k / TERMS * 64); \
                    float *const row = to + ((s - from) * TW_STEP_K + k) * TW_PANEL + half * 16; \
                    _Pragma("omp simd") for (int64_t n = 0; n < 16; n++) { \
                        row[n] = ((float)(CODE) - points[half * 16 + n]) * scales[half * 16 + n]; \
                    } \
                } \
            } \
        TW_END_OF_STEPS \
    }
TW_DEFINE_DEQUANTIZE(int4, 8, (int32_t)(words[n] >> (k % 4 * 8 + k / 4 % 2 * 4) & 15u))
TW_DEFINE_DEQUANTIZE(int8, 4, (int32_t)(words[n] << (24 - k % 4 * 8)) >> 24)

/* to[0..k) = one column of a panel: a row of the weight. */
#define TW_DEFINE_COLUMN(KIND, TERMS, CODE) \
    static inline void tw_column_##KIND( \
        const uint8_t *panel, int64_t column, int64_t k, int64_t per, int zeros, float *restrict to) { \
        const int64_t from = 0, end = tw_ceildiv(k, TW_STEP_K); \
        TW_FOR_EACH_STEP(KIND, 0) \
            for (int64_t i = 0; i < tw_smaller(TW_STEP_K, k - s * TW_STEP_K); i++) { \
                const uint8_t byte = \
                    step[column / 16 * TW_HALF_##KIND + i / TERMS * 64 + column % 16 * 4 + i % 4]; \
                to[s * TW_STEP_K + i] = ((float)(CODE) - points[column]) * scales[column]; \
            } \
        TW_END_OF_STEPS \
    }
TW_DEFINE_COLUMN(int4, 8, byte >> (i / 4 % 2 * 4) & 15)
TW_DEFINE_COLUMN(int8, 4, (int8_t)byte)

#endif

/* Weights of 4 or 8 bits, and rows of activations that are quantized here.
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
 * after the other, two vectors of 8 columns each; AVX-512 a vector of each in turns, or for up to four rows as AVX2 does.
 *
 * Rows of activations become codes in [-127, 127], filled up with zeros to whole steps, with a scale for every step. They
 * lie in tiles, the rows that are multiplied at once, so that a product reads a tile from its beginning to its end:
 * [steps][words][rows of the tile][4 bytes], and scales and sums of a step [steps][rows of the tile]. A word is four terms.
 * Where both factors have 8 bits, AVX2 takes rows one by one, and a word is the magnitudes of four terms, then their signs,
 * -1 or 0. All rows go over a chunk of 8 steps before the next one, so codes lie in this order: [chunks][rows][steps].
 */
#ifndef TW_QUANTIZED_H
#define TW_QUANTIZED_H

#include "tw_intrinsics.h"
#include "tw_simd.h"

#define TW_STEP_K 32 /* terms of a step */

/* Most rows of a tile, and bytes of an activation's code, by the weights that it meets. */
#if TW_LANES == 16
#define TW_ROWS_int4 6 /* 6 x 4 sums, 4 vectors of weights, 1 broadcast, 2 constants, of 32 registers */
#define TW_ROWS_int8 6
#define TW_CODE_BYTES_int8 1
#else
#define TW_ROWS_int4 6 /* 6 x 2 sums, 2 vectors of weights, 1 broadcast, 1 product, of 16 registers */
#define TW_ROWS_int8 1
#define TW_CODE_BYTES_int8 2
#endif
#define TW_CODE_BYTES_int4 1
#define TW_CHUNK_int8 8 /* steps of a chunk, where both factors have 8 bits */

#if defined(__AVX512VNNI__)
#define TW_OFFSET_int8 128 /* what is added to codes of 8 bits to make them unsigned */
#else
#define TW_OFFSET_int8 0
#endif
#define TW_OFFSET_int4 0
#define TW_SYMMETRIC_int4 8 /* the zero point where none is stored */
#define TW_SYMMETRIC_int8 0

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
#define TW_FOR_EACH_STEP(KIND) \
    for (int64_t s = from; s < end;) { \
        float scales[TW_PANEL] TW_ALIGNED, points[TW_PANEL] TW_ALIGNED; \
        const int64_t group = s / per; \
        const uint8_t *step = panel + TW_GROUPS_BYTES(KIND, zeros, group, per); \
        tw_header_##KIND(step, zeros, scales, points); \
        step += TW_HEADER_BYTES(KIND, zeros) + (s - group * per) * TW_STEP_BYTES(KIND); \
        for (const int64_t last = tw_smaller((group + 1) * per, end); s < last; s++, step += TW_STEP_BYTES(KIND)) {
#define TW_END_OF_STEPS \
        } \
    }

/* A header's scales and zero points as floats. */
static inline void tw_header_int4(const uint8_t *from, int zeros, float *scales, float *points) {
    for (int64_t n = 0; n < TW_PANEL; n += TW_LANES) {
#if TW_LANES == 16
        tw_store(scales + n, (tw_vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 2 * n))));
#else
        tw_store(scales + n, (tw_vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * n))));
#endif
    }
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        points[n] = (float)(zeros ? from[TW_SCALES_int4 + n] : TW_SYMMETRIC_int4);
    }
}
static inline void tw_header_int8(const uint8_t *from, int zeros, float *scales, float *points) {
    memcpy(scales, from, TW_PANEL * sizeof(float));
#pragma omp simd
    for (int64_t n = 0; n < TW_PANEL; n++) {
        points[n] = (float)(zeros ? (int8_t)from[TW_SCALES_int8 + n] : TW_SYMMETRIC_int8);
    }
}

/* Rows of activations in tiles. A sum is that of a step's codes. Of AVX2, where weights of 4 bits have no zero points of
 * their own, it is what their common one takes away, as two numbers of 16 bits; beside weights of 8 bits it has the
 * magnitudes of the negative codes, summed, in its high half (tw_place_codes). */
typedef struct {
    int8_t *codes;
    float *scales;
    int32_t *sums;
    int32_t *lacking; /* of a row: what its products with all of a panel of 8 bits lack, as integers */
    uint8_t *wide;    /* [chunks][rows]: for TW_SIGNED_SUMS, see tw_quantized_signed.h */
    int64_t rows, steps;
} tw_quantized;

/* Of m rows of `steps` steps in one memory, whose codes take so many bytes, those from `top` on. A row takes
 * quantized_packing.row_bytes bytes: of each array there are those of all rows, and a block of rows has its part. */
static inline tw_quantized tw_quantized_at(
    void *memory, int64_t m, int64_t steps, int64_t code_bytes, int64_t top, int64_t rows) {
    int8_t *const codes = memory;
    float *const scales = (float *)(codes + m * steps * TW_STEP_K * code_bytes);
    int32_t *const sums = (int32_t *)(scales + m * steps), *const lacking = sums + m * steps;
    uint8_t *const wide = (uint8_t *)(lacking + m);
    const int64_t at = top * steps;
    return (tw_quantized){
        codes + at * TW_STEP_K * code_bytes, scales + at, sums + at, lacking + top,
        wide + top * tw_ceildiv(steps, TW_CHUNK_int8), rows, steps,
    };
}

/* Where the codes of a row's step lie that begins a chunk, beside weights of 8 bits on AVX2. */
static inline int8_t *tw_chunk_codes(const tw_quantized *x, int64_t row, int64_t step) {
    const int64_t length = tw_smaller(TW_CHUNK_int8, x->steps - step);
    return x->codes + (step * x->rows + row * length) * TW_STEP_K * TW_CODE_BYTES_int8;
}

/* Near-equal tiles of at most `most` rows: the rows of tile t, and of the tile that a row lies in. */
typedef struct {
    int64_t first, rows;
} tw_tile_q;

static inline tw_tile_q tw_tile_at_q(int64_t rows, int64_t most, int64_t t) {
    const int64_t tiles = tw_ceildiv(rows, most), first = rows * t / tiles;
    return (tw_tile_q){first, rows * (t + 1) / tiles - first};
}
static inline tw_tile_q tw_tile_of_q(int64_t rows, int64_t most, int64_t row) {
    return tw_tile_at_q(rows, most, (tw_ceildiv(rows, most) * (row + 1) - 1) / rows);
}

/* What becomes of a step's codes: how one is written, and what their sum is for. */
typedef enum { TW_SUMS, TW_SIGNED_SUMS, TW_STARTS } tw_codes_q;
#if TW_LANES == 16
#define TW_CODES_int4(zeros) TW_SUMS
#define TW_CODES_int8(zeros) TW_SUMS
#else
#define TW_CODES_int4(zeros) ((zeros) ? TW_SUMS : TW_STARTS)
#define TW_CODES_int8(zeros) TW_SIGNED_SUMS
#endif

/* The codes of a step to their places in a tile of `rows`, and its sum. */
static inline void tw_place_codes(__m256i codes, tw_codes_q kind, int64_t rows, int8_t *to, int32_t *sum) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
    __m128i both = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    both = _mm_add_epi16(both, _mm_shuffle_epi32(both, 0x4e));
    both = _mm_add_epi16(both, _mm_shuffle_epi32(both, 0xb1)); /* terms 4p and 4p + 1; terms 4p + 2 and 4p + 3 */
    /* 8 * 16 * 127 < 2^15, and so is what a start and products of some terms come to: 16 * 8 * 127. */
    both = kind == TW_STARTS ? _mm_sub_epi16(_mm_setzero_si128(), _mm_slli_epi16(both, 3))
                             : _mm_madd_epi16(both, _mm_set1_epi16(1));
    *sum = _mm_cvtsi128_si32(both);
    if (kind == TW_SIGNED_SUMS) { /* tiles of one row */
        const __m256i sizes = _mm256_abs_epi8(codes), signs = _mm256_cmpgt_epi8(_mm256_setzero_si256(), codes);
        const __m256i low = _mm256_unpacklo_epi32(sizes, signs), high = _mm256_unpackhi_epi32(sizes, signs);
        _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *)(to + 32), _mm256_permute2x128_si256(low, high, 0x31));
        const __m256i quarters = _mm256_sad_epu8(_mm256_and_si256(sizes, signs), _mm256_setzero_si256());
        __m128i negative = _mm_add_epi32(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
        negative = _mm_add_epi32(negative, _mm_shuffle_epi32(negative, 0x4e));
        *sum = (int32_t)((uint32_t)_mm_cvtsi128_si32(negative) << 16 | (uint16_t)*sum);
        return;
    }
    int32_t words[8];
    _mm256_storeu_si256((__m256i *)words, codes);
    for (int64_t word = 0; word < 8; word++) {
        memcpy(to + word * rows * 4, words + word, 4);
    }
}

/* Whether four magnitudes that two words in a row have at the same place (their first or last two terms) come to more
 * than 255. */
static inline int tw_wide_codes(__m256i codes) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_set1_epi8(1));
    const __m256i fours = _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
    return _mm256_movemask_epi8(_mm256_cmpgt_epi16(fours, _mm256_set1_epi16(255))) != 0;
}

/* The bits of the largest magnitude of some steps of a row of k floats: ordered as integers, with NaN above all. */
static inline int32_t tw_largest_bits(const float *row, int64_t from, int64_t end, int64_t k) {
    const __m256i magnitudes = _mm256_set1_epi32(0x7fffffff);
    const int64_t last = tw_smaller(end * TW_STEP_K, k);
    __m256i tops = _mm256_setzero_si256();
    int64_t i = from * TW_STEP_K;
    for (; i + TW_STEP_K <= last; i += TW_STEP_K) {
        _Pragma("GCC unroll 4") for (int64_t n = 0; n < TW_STEP_K; n += 8) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *)(row + i + n));
            tops = _mm256_max_epi32(tops, _mm256_and_si256(bits, magnitudes));
        }
    }
    for (; i < last; i++) {
        int32_t bits;
        memcpy(&bits, row + i, sizeof bits);
        tops = _mm256_max_epi32(tops, _mm256_and_si256(_mm256_set1_epi32(bits), magnitudes));
    }
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(tops), _mm256_extracti128_si256(tops, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
    return _mm_cvtsi128_si32(top);
}

/* Steps [from, end) of row `row` of x, of k floats, as codes in [-127, 127], rounded half to even, with one scale for every
 * `per` steps: the largest magnitude / 127. What is smaller than 1e-30 throughout has scale 0 and codes 0; a NaN makes the
 * scale NaN. Parts of a row begin with a scale and with a chunk. */
static inline void tw_quantize_steps(
    const float *from_row, int64_t k, int64_t from, int64_t end, int64_t per, tw_codes_q kind, const tw_quantized *x,
    int64_t row) {
    const int64_t steps = x->steps, bytes = kind == TW_SIGNED_SUMS ? 2 * TW_STEP_K : TW_STEP_K;
    const tw_tile_q tile = tw_tile_of_q(x->rows, kind == TW_SIGNED_SUMS ? TW_ROWS_int8 : TW_ROWS_int4, row);
    int8_t *const codes = x->codes + tile.first * steps * bytes + (row - tile.first) * 4;
    float *const scales = x->scales + tile.first * steps + (row - tile.first);
    int32_t *const sums = x->sums + tile.first * steps + (row - tile.first);
    int32_t total = 0;
    for (int64_t first = from; first < end; first += per) {
        const int64_t last = tw_smaller(first + per, end);
        const int32_t top = tw_largest_bits(from_row, first, last, k);
        float largest;
        memcpy(&largest, &top, sizeof largest);
        const int counts = !(largest <= 1e-30f);
        const float scale = counts ? largest / 127.0f : 0.0f;
        const __m256 inverse = _mm256_set1_ps(counts ? 127.0f / largest : 0.0f);
        for (int64_t s = first; s < last; s++) {
            const float *at = from_row + s * TW_STEP_K;
            float padded[TW_STEP_K] TW_ALIGNED;
            if ((s + 1) * TW_STEP_K > k) {
                memset(padded, 0, sizeof padded);
                memcpy(padded, at, (size_t)(k - s * TW_STEP_K) * sizeof(float));
                at = padded;
            }
            const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at), inverse));
            const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at + 8), inverse));
            const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at + 16), inverse));
            const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(at + 24), inverse));
            const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const __m256i placed = _mm256_permutevar8x32_epi32(mixed, order);
            int32_t *const sum = sums + s * tile.rows;
            scales[s * tile.rows] = scale;
            if (kind == TW_SIGNED_SUMS) {
                const int64_t in_chunk = s % TW_CHUNK_int8;
                uint8_t *const wide = x->wide + s / TW_CHUNK_int8 * x->rows + row;
                tw_place_codes(placed, kind, 1, tw_chunk_codes(x, row, s - in_chunk) + in_chunk * bytes, sum);
                *wide = (uint8_t)((in_chunk ? *wide : 0) | tw_wide_codes(placed));
                total += *sum >> 16;
            } else {
                tw_place_codes(placed, kind, tile.rows, codes + s * bytes * tile.rows, sum);
                total -= TW_OFFSET_int8 * *sum;
            }
        }
    }
    if (end - from == steps) x->lacking[row] = total; /* else scales differ, and there are no products with all of a panel */
}

/* to[32 * (end - from)][32] = the numbers that steps [from, end) of a panel stand for, rows along k. */
#define TW_DEFINE_DEQUANTIZE(KIND, TERMS, CODE) \
    static inline void tw_dequantize_##KIND( \
        const uint8_t *panel, int64_t from, int64_t end, int64_t per, int zeros, float *restrict to) { \
        TW_FOR_EACH_STEP(KIND) \
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
        TW_FOR_EACH_STEP(KIND) \
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

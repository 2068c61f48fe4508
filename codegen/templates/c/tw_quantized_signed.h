/* Products of quantized rows and a panel of weights of 8 bits on AVX2.
 *
 * vpmaddubsw multiplies unsigned bytes by signed ones, so magnitudes of a row's codes meet weights whose signs were
 * changed: sum of |x| * (w ^ sign(x)), the sign -1 or 0. For a negative x, w ^ -1 is -w - 1, so the sum lacks |x|: once per
 * row, what tw_place_codes keeps in the high half of a step's sum is added. Two products fit 16 bits, 2 * 127 * 128 < 2^15.
 * (vpsignb needs no correction, but shares its units with the instructions that multiply. vpmaddwd takes as many of those,
 * and weights that were made wider first.)
 *
 * Four products rarely come to more than 16 bits, and where they cannot, one instruction less adds them up: where four
 * magnitudes come to 255 at most, 255 * 128 < 2^15. tw_quantize_steps notes the chunks of a row where some come to more;
 * these are wide. Either way sums are exact.
 *
 * Rows need no tiles: one by one they meet all 32 columns, and weights are operands in memory as the panel holds them.
 * They go over a chunk of the panel that stays in the first-level cache. Meanwhile the next one is fetched, in the order in
 * which it lies, shared out between the rows: what the first row needs first then comes first, and not just before it is
 * needed. A few rows go over the panel together, as it comes from memory.
 */
#ifndef TW_QUANTIZED_SIGNED_H
#define TW_QUANTIZED_SIGNED_H

#include "tw_quantized_products.h"

/* Products of two terms each of a word with 8 columns at `at`. */
static inline __m256i tw_signed_word(__m256i sizes, __m256i signs, const uint8_t *at) {
    return _mm256_maddubs_epi16(sizes, _mm256_xor_si256(signs, _mm256_loadu_si256((const __m256i *)at)));
}
static inline __m256i tw_signed_sum(__m256i sum, __m256i products) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}

/* Sums a and b are of the first 16 columns of a panel, c and d of the others. */
#define TW_SIGNED_RESUME(totals) \
    __m256i *const to = (__m256i *)(totals); \
    __m256i a = _mm256_loadu_si256(to), b = _mm256_loadu_si256(to + 1); \
    __m256i c = _mm256_loadu_si256(to + 2), d = _mm256_loadu_si256(to + 3);
#define TW_SIGNED_LEAVE \
    _mm256_storeu_si256(to, a), _mm256_storeu_si256(to + 1, b); \
    _mm256_storeu_si256(to + 2, c), _mm256_storeu_si256(to + 3, d);
/* A step's sums to the floats of 32 columns. */
#define TW_ADD_COLUMNS_Q(add) \
    add(a, header, zeros, scale, less, 0, sums); \
    add(b, header, zeros, scale, less, 8, sums); \
    add(c, header, zeros, scale, less, 16, sums); \
    add(d, header, zeros, scale, less, 24, sums);

/* A step's products with 32 columns. The barriers keep compilers from adding products of several words to each other first,
 * which takes more registers than there are. */
#define TW_SIGNED_STEP(codes, step) \
    for (int64_t word = 0; word < 8; word++) { \
        const __m256i sizes = TW_WORD_Q((codes) + word * 8), signs = TW_WORD_Q((codes) + word * 8 + 4); \
        const uint8_t *const first = (step) + word * 64, *const second = first + TW_HALF_int8; \
        a = tw_signed_sum(a, tw_signed_word(sizes, signs, first)); \
        b = tw_signed_sum(b, tw_signed_word(sizes, signs, first + 32)); \
        TW_KEEP_Q(a, b); \
        c = tw_signed_sum(c, tw_signed_word(sizes, signs, second)); \
        d = tw_signed_sum(d, tw_signed_word(sizes, signs, second + 32)); \
        TW_KEEP_Q(c, d); \
    }

/* The same where four products fit 16 bits. */
#define TW_SIGNED_PAIR(sum, at) \
    sum = tw_signed_sum(sum, _mm256_add_epi16(tw_signed_word(sizes0, signs0, at), tw_signed_word(sizes1, signs1, (at) + 64)))
#define TW_SIGNED_STEP_OF_PAIRS(codes, step) \
    for (int64_t word = 0; word < 8; word += 2) { \
        const __m256i sizes0 = TW_WORD_Q((codes) + word * 8), signs0 = TW_WORD_Q((codes) + word * 8 + 4); \
        const __m256i sizes1 = TW_WORD_Q((codes) + word * 8 + 8), signs1 = TW_WORD_Q((codes) + word * 8 + 12); \
        const uint8_t *const first = (step) + word * 64, *const second = first + TW_HALF_int8; \
        TW_SIGNED_PAIR(a, first); \
        TW_SIGNED_PAIR(b, first + 32); \
        TW_KEEP_Q(a, b); \
        TW_SIGNED_PAIR(c, second); \
        TW_SIGNED_PAIR(d, second + 32); \
        TW_KEEP_Q(c, d); \
    }

/* totals[32] += the products with some steps, as integers, without the correction. */
#define TW_DEFINE_SIGNED(NAME, STEP) \
    static __attribute__((noinline)) void NAME( \
        const int8_t *codes, const uint8_t *step, int64_t steps, tw_fetch fetch, int32_t *totals) { \
        TW_SIGNED_RESUME(totals) \
        for (int64_t s = 0; s < steps; s++, step += TW_STEP_BYTES(int8), codes += TW_STEP_K * TW_CODE_BYTES_int8) { \
            tw_fetch_some(&fetch); \
            STEP(codes, step) \
        } \
        TW_SIGNED_LEAVE \
    }
TW_DEFINE_SIGNED(tw_signed_whole, TW_SIGNED_STEP)
TW_DEFINE_SIGNED(tw_signed_whole_of_pairs, TW_SIGNED_STEP_OF_PAIRS)

/* The same for a few rows whose codes lie `apart` bytes apart, at the memory's speed: half after half as the panel lies,
 * and fetched in as many pieces. */
#define TW_SIGNED_FEW(r) \
    { \
        const int8_t *const at = codes + (r) * apart + word * 8; \
        const __m256i sizes = TW_WORD_Q(at), signs = TW_WORD_Q(at + 4); \
        x##r = tw_signed_sum(x##r, _mm256_maddubs_epi16(sizes, _mm256_xor_si256(signs, w0))); \
        y##r = tw_signed_sum(y##r, _mm256_maddubs_epi16(sizes, _mm256_xor_si256(signs, w1))); \
        TW_KEEP_Q(x##r, y##r); \
    }
#define TW_SIGNED_KEEP(r) \
    { \
        __m256i *const to = (__m256i *)(totals + (r) * TW_PANEL + n); \
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), x##r)); \
        _mm256_storeu_si256(to + 1, _mm256_add_epi32(_mm256_loadu_si256(to + 1), y##r)); \
    }
#define TW_DEFINE_SIGNED_FEW(KIND, ROWS) \
    static __attribute__((noinline)) void tw_signed_few_##ROWS( \
        const int8_t *codes, int64_t apart, const uint8_t *step, int64_t steps, int32_t *totals) { \
        for (int64_t s = 0; s < steps; s++, step += TW_STEP_BYTES(KIND), codes += TW_STEP_K * TW_CODE_BYTES_##KIND) { \
            for (int64_t n = 0; n < TW_PANEL; n += 16) { \
                const uint8_t *const half = step + n / 16 * TW_HALF_##KIND; \
                tw_prefetch_half(half, TW_HALF_##KIND); \
                TW_REPEAT_##ROWS(TW_ZERO_Q) \
                for (int64_t word = 0; word < 8; word++) { \
                    const __m256i w0 = TW_LOAD_Q(half + word * 64), w1 = TW_LOAD_Q(half + word * 64 + 32); \
                    TW_REPEAT_##ROWS(TW_SIGNED_FEW) \
                } \
                __asm__ volatile("" ::: "memory"); \
                TW_REPEAT_##ROWS(TW_SIGNED_KEEP) \
            } \
        } \
    }
TW_FOR_EACH_ROWS_Q(TW_DEFINE_SIGNED_FEW, int8)

/* sums[n..n+8) += (total - zero point * sum of the row's codes) * (weight's scale * row's scale). */
static inline void tw_signed_add(
    __m256i total, const uint8_t *header, int zeros, float scale, float less, int64_t n, float *sums) {
    tw_vec value = TW_FLOAT_Q(total);
    if (zeros) {
        const __m128i points = _mm_loadl_epi64((const __m128i *)(header + TW_SCALES_int8 + n));
        value -= TW_FLOAT_Q(_mm256_cvtepi8_epi32(points)) * less;
    }
    tw_store(sums + n, tw_load(sums + n) + value * (tw_load((const float *)header + n) * scale));
}

/* Steps [from, end) of a panel, in groups of `per`, with a row that is given from step `from` on; sums[32] is added to. */
#define TW_DEFINE_SIGNED_GROUPS(NAME, STEP) \
    static __attribute__((noinline)) void NAME( \
        const int8_t *codes, const float *row_scales, const int32_t *row_sums, const uint8_t *panel, int64_t from, \
        int64_t end, int64_t per, int zeros, tw_fetch fetch, float *sums) { \
        for (int64_t s = from; s < end;) { \
            const int64_t group = s / per; \
            const uint8_t *const header = panel + TW_GROUPS_BYTES(int8, zeros, group, per); \
            const uint8_t *step = header + TW_HEADER_BYTES(int8, zeros) + (s - group * per) * TW_STEP_BYTES(int8); \
            for (const int64_t last = tw_smaller((group + 1) * per, end); s < last; s++, step += TW_STEP_BYTES(int8)) { \
                __m256i a = _mm256_set1_epi32(*row_sums >> 16), b = a, c = a, d = a; \
                const float scale = *row_scales, less = (float)(int16_t)*row_sums; \
                tw_fetch_some(&fetch); \
                STEP(codes, step) \
                TW_ADD_COLUMNS_Q(tw_signed_add) \
                codes += TW_STEP_K * TW_CODE_BYTES_int8, row_scales++, row_sums++; \
            } \
        } \
    }
TW_DEFINE_SIGNED_GROUPS(tw_signed_groups, TW_SIGNED_STEP)
TW_DEFINE_SIGNED_GROUPS(tw_signed_groups_of_pairs, TW_SIGNED_STEP_OF_PAIRS)

/* What row `row` fetches while it goes over a chunk of `steps`: its share of the chunk that lies `next`. */
static inline tw_fetch tw_signed_fetch(const uint8_t *next, int64_t steps, int64_t row, int64_t rows) {
    const int64_t lines = TW_CHUNK_int8 * TW_STEP_BYTES(int8) / 64;
    const int64_t first = lines * row / rows, end = lines * (row + 1) / rows;
    return (tw_fetch){next + first * 64, next + end * 64, tw_ceildiv(end - first, steps)};
}

/* sums[rows][32] += the products with a panel. */
static inline void tw_product_int8(const tw_quantized *x, const uint8_t *panel, int64_t per, int zeros, float *sums) {
    for (int64_t from = 0, end; from < x->steps; from = end) {
        end = tw_smaller(from + TW_CHUNK_int8, x->steps);
        const uint8_t *const next =
            panel + TW_GROUPS_BYTES(int8, zeros, end / per, per) + end % per * TW_STEP_BYTES(int8);
        for (int64_t row = 0; row < x->rows; row++) {
            const int64_t at = row * x->steps + from;
            (x->wide[from / TW_CHUNK_int8 * x->rows + row] ? tw_signed_groups : tw_signed_groups_of_pairs)(
                tw_chunk_codes(x, row, from), x->scales + at, x->sums + at, panel, from, end, per, zeros,
                tw_signed_fetch(next, end - from, row, x->rows), sums + row * TW_PANEL);
        }
    }
}

/* totals[rows][32] += the products with a panel that is one group, as integers. */
static inline void tw_product_whole_int8(const tw_quantized *x, const uint8_t *panel, int32_t *totals) {
    panel += TW_HEADER_BYTES(int8, 0);
    for (int64_t from = 0, end; from < x->steps; from = end) {
        end = tw_smaller(from + TW_CHUNK_int8, x->steps);
        const uint8_t *const step = panel + from * TW_STEP_BYTES(int8), *const next = panel + end * TW_STEP_BYTES(int8);
        if (x->rows <= TW_FEW_ROWS_Q) {
            const int64_t apart = (end - from) * TW_STEP_K * TW_CODE_BYTES_int8;
            TW_SWITCH_ROWS_Q(tw_signed_few_, x->rows, tw_chunk_codes(x, 0, from), apart, step, end - from, totals)
            continue;
        }
        for (int64_t row = 0; row < x->rows; row++) {
            (x->wide[from / TW_CHUNK_int8 * x->rows + row] ? tw_signed_whole : tw_signed_whole_of_pairs)(
                tw_chunk_codes(x, row, from), step, end - from, tw_signed_fetch(next, end - from, row, x->rows),
                totals + row * TW_PANEL);
        }
    }
}

#endif

/* The register-blocked convolution over channels-blocked images: [batch][ceil(C/16)][H][W][16].
 *
 * A tile is up to TW_MR output pixels, neighbours in the flattened image, against one panel of 32 output channels. Each
 * tap of the kernel is, for one block of 16 input channels, a product of TW_MR rows of 16 by 16 x 32 weights: only the
 * addresses of the rows change from tap to tap, so the sums stay in registers over all taps and channels. A tap that
 * falls outside the image reads zeros.
 *
 * With 16 registers of 8 floats, a tile of floats is computed as two of TW_MR / 2 rows and all 32 columns. Three
 * broadcast pixels are then held while the panel streams past, whole lines of it and each line once a tile; the other
 * cut, TW_MR rows by 16 columns, would read every second line of the panel twice, from half of the sets of the first
 * cache, and all pixels again for the other half of the columns.
 *
 * There are two KINDs of images: f32, whose words are floats, and bf16, whose words are two neighbouring channels, as in
 * tw_words.h, which must be included first. Distances count words. A template instantiates the functions that it calls:
 *
 *   TW_CONVOLVE(KIND)    tw_convolve_<KIND>, any kernel
 *   TW_POINTWISE(KIND)   tw_pointwise_<KIND>, kernels of one tap with stride 1
 *   TW_SLIDE(KIND)       tw_slide_<KIND>, windows along rows of pixels
 */
#ifndef TW_CONVOLUTION_H
#define TW_CONVOLUTION_H

#include "tw_simd.h"

#define TW_WORD_f32 float
#define TW_WORD_bf16 uint32_t
enum { TW_BLOCK_f32 = 16, TW_BLOCK_bf16 = 8 }; /* words in a block of channels */

/* What a kernel needs, where that is known: bit r of TW_ROWS_USED tells whether a tile has r rows, TW_WHOLE_BLOCKS whether
 * all blocks of channels are full. The rest is not compiled, which takes most of a kernel's time to compile. */
#if !defined(TW_ROWS_USED)
#define TW_ROWS_USED (-1)
#endif
#if !defined(TW_WHOLE_BLOCKS)
#define TW_WHOLE_BLOCKS 0
#endif
/* Halves are the rows of a tile that is cut in two. */
enum { TW_HALVES_USED = (TW_ROWS_USED & 14) | ((TW_ROWS_USED >> 2 | TW_ROWS_USED >> 3) & 12) };
#define TW_UNUSED(ROWS) (TW_ROWS_USED >> (ROWS) & 1) == 0
#define TW_UNUSED_narrow(ROWS) TW_UNUSED(ROWS)
#define TW_UNUSED_wide(ROWS) (TW_HALVES_USED >> (ROWS) & 1) == 0
#define TW_ONLY_USED(WIDTH, ROWS) \
    if (TW_UNUSED##WIDTH(ROWS)) { \
        __builtin_trap(); \
    }

/* The step of tw_words.h for floats. */
#define TW_ZERO_f32(r) TW_ZERO(r)
#define TW_RESUME_f32(r) TW_RESUME(r)
#define TW_FINISH_f32(r) TW_FINISH(r)
#define TW_STEPS_f32(ROWS) \
    { \
        const tw_vec b0 = tw_load(b), b1 = tw_load(b + TW_LANES); \
        TW_REPEAT_##ROWS(TW_STEP) \
    }
#define TW_ZERO_f32_narrow(r) TW_ZERO_narrow(r)
#define TW_RESUME_f32_narrow(r) TW_RESUME_narrow(r)
#define TW_FINISH_f32_narrow(r) TW_FINISH_narrow(r)
#define TW_STEPS_f32_narrow(ROWS) \
    { \
        const tw_vec b0 = tw_load(b); \
        TW_REPEAT_##ROWS(TW_STEP_narrow) \
    }

#if TW_LANES * 2 < TW_PANEL
/* All 32 columns of up to TW_MR / 2 rows: one vector of the panel after another is multiplied by all pixels. */
#define TW_ZERO_f32_wide(r) TW_ZERO_WIDE(r)
#define TW_RESUME_f32_wide(r) TW_RESUME_WIDE(r)
#define TW_FINISH_f32_wide(r) TW_FINISH_WIDE(r)
#define TW_STEPS_f32_wide(ROWS) TW_STEPS_WIDE(ROWS)
#endif

/* The image and the kernel that slides over it. */
typedef struct {
    const void *image;      /* first channel block of this image and group */
    const void *zeros;      /* a block of zeros */
    int64_t plane;          /* between channel blocks */
    int64_t blocks, last;   /* channel blocks, and words of each pixel in the last one */
    int64_t kh, kw;         /* taps, at most 64 each way */
    int64_t step_h, step_w; /* between taps */
    const char *ahead;      /* the weights that this tile fetches for what comes next */
    int64_t share, lines;   /* bytes of them for each pixel; lines of 64 bytes in each step of a tile */
} tw_kernel_window;

/* Spread the fetching of the next `bytes` of weights over the tiles of `pixels`, unless work on so few hides nothing. */
static inline void tw_fetch_ahead(tw_kernel_window *w, int64_t bytes, int64_t pixels) {
    w->share = pixels < TW_MR ? 0 : bytes / pixels;
    w->lines = tw_ceildiv(TW_MR / 2 * w->share, 64 * w->blocks * w->kh * w->kw);
}

/* Where the taps of each pixel start, and which rows and columns of taps lie inside the image. */
typedef struct {
    int64_t offset[TW_MR]; /* of the first tap in the plane; may lie outside */
    uint64_t rows[TW_MR], columns[TW_MR];
    int64_t inside; /* every tap of every pixel is in the image */
} tw_pixel_tile;

/* Bit i tells whether position first + i*step lies in [0, size). */
static inline uint64_t tw_inside_mask(int64_t first, int64_t step, int64_t taps, int64_t size) {
    uint64_t mask = 0;
    for (int64_t i = 0; i < taps; i++) {
        const int64_t position = first + i * step;
        mask |= (uint64_t)(position >= 0 && position < size) << i;
    }
    return mask;
}

/* Call the function of a panel (NAME_<rows>), of its first 16 columns (NAME_narrow_<rows>) or of fewer rows
 * (NAME_wide_<rows>), by the number of rows. Functions get b, sums, the first row, and what else there is. */
#if TW_LANES == 16
#define TW_FOR_EACH_WIDTH(DEFINE, KIND) TW_FOR_EACH_ROWS(DEFINE##_##KIND) TW_FOR_EACH_ROWS(DEFINE##_##KIND##_narrow)
#define TW_CALL_PANEL(KIND, NAME, rows, columns, b, sums, ...) \
    if ((columns) > 16) { \
        TW_SWITCH_ROWS(NAME##_, rows, b, sums, 0, __VA_ARGS__) \
    } else { \
        TW_SWITCH_ROWS(NAME##_narrow_, rows, b, sums, 0, __VA_ARGS__) \
    }
#define TW_UNROLLED
#define TW_AHEAD_POINTER
#define TW_AHEAD
#else
#define TW_FOR_EACH_WIDTH(DEFINE, KIND) TW_FOR_EACH_WIDTH_##KIND(DEFINE##_##KIND)
#define TW_FOR_EACH_WIDTH_bf16(DEFINE) TW_FOR_EACH_ROWS(DEFINE)
#define TW_FOR_EACH_WIDTH_f32(DEFINE) TW_FOR_EACH_ROWS(DEFINE) DEFINE##_wide(1) DEFINE##_wide(2) DEFINE##_wide(3)
#define TW_CALL_PANEL(KIND, NAME, rows, columns, b, sums, ...) \
    TW_CALL_PANEL_##KIND(NAME, rows, columns, b, sums, __VA_ARGS__)
#define TW_CALL_PANEL_bf16(NAME, rows, columns, b, sums, ...) \
    TW_SWITCH_ROWS(NAME##_, rows, b, sums, 0, __VA_ARGS__) \
    if ((columns) > 16) { \
        TW_SWITCH_ROWS(NAME##_, rows, b + 16, sums + 16, 0, __VA_ARGS__) \
    }
#define TW_CALL_PANEL_f32(NAME, rows, columns, b, sums, ...) \
    if ((columns) > 16) { \
        const int64_t half = (rows) > TW_MR / 2 ? (rows + 1) / 2 : rows; \
        TW_SWITCH_HALF(NAME##_wide_, half, b, sums, 0, __VA_ARGS__) \
        TW_SWITCH_HALF(NAME##_wide_, rows - half, b, sums + half * TW_PANEL, half, __VA_ARGS__) \
    } else { \
        TW_SWITCH_ROWS(NAME##_, rows, b, sums, 0, __VA_ARGS__) \
    }
#define TW_SWITCH_HALF(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) TW_CASE(function, 3, __VA_ARGS__) \
    }
/* Leaving a loop of 16 short steps costs as much as several of them. With checks around every load the compiler would take
 * minutes. */
#if defined(__SANITIZE_ADDRESS__)
#define TW_UNROLLED
#else
#define TW_UNROLLED _Pragma("GCC unroll 16")
#endif
/* Weights come from memory while those before them are worked with: few lines at a time, into the second cache. */
#define TW_AHEAD_POINTER \
    const int64_t lines = w->lines; \
    const char *ahead = w->ahead + row * w->share;
#define TW_AHEAD \
    for (int64_t line = 0; line < lines; line++, ahead += 64) { \
        __builtin_prefetch(ahead, 0, 2); \
    }
#endif

/* b += the steps of one block of channels, whose length is known but in the last block. */
#define TW_STEPS_OF_BLOCK(KIND, WIDTH, ROWS) \
    if (TW_WHOLE_BLOCKS || depth == TW_BLOCK_##KIND) { \
        TW_UNROLLED \
        for (int64_t k = 0; k < TW_BLOCK_##KIND; k++, b += TW_PANEL) { TW_STEPS_##KIND##WIDTH(ROWS) } \
    } else { \
        for (int64_t k = 0; k < depth; k++, b += TW_PANEL) { TW_STEPS_##KIND##WIDTH(ROWS) } \
    }

#define TW_TAP_POINTER(r) const word *a##r;
#define TW_TAP_INSIDE(r) a##r = at + offset[r];
#define TW_TAP_BORDER(r) a##r = rows[r] >> i & columns[r] >> j & 1 ? at + offset[r] : w->zeros;
#define TW_DEFINE_CONVOLVE(KIND, WIDTH, ROWS) \
    static __attribute__((unused, noinline)) void tw_convolve_##KIND##WIDTH##_##ROWS( \
        const TW_WORD_##KIND *b, float *sums, int64_t row, const tw_kernel_window *w, const tw_pixel_tile *tile, \
        int resume) { \
        TW_ONLY_USED(WIDTH, ROWS) \
        const int64_t *const offset = tile->offset + row; \
        const uint64_t *const rows = tile->rows + row, *const columns = tile->columns + row; \
        typedef TW_WORD_##KIND word; \
        TW_AHEAD_POINTER \
        TW_REPEAT_##ROWS(TW_ZERO_##KIND##WIDTH) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME_##KIND##WIDTH) } \
        for (int64_t block = 0; block < w->blocks; block++) { \
            const int64_t depth = block + 1 < w->blocks ? TW_BLOCK_##KIND : w->last; \
            for (int64_t i = 0; i < w->kh; i++) { \
                for (int64_t j = 0; j < w->kw; j++) { \
                    TW_AHEAD \
                    const word *const at = (const word *)w->image + (block * w->plane + i * w->step_h + j * w->step_w); \
                    TW_REPEAT_##ROWS(TW_TAP_POINTER) \
                    if (tile->inside) { \
                        TW_REPEAT_##ROWS(TW_TAP_INSIDE) \
                    } else { \
                        TW_REPEAT_##ROWS(TW_TAP_BORDER) \
                    } \
                    TW_STEPS_OF_BLOCK(KIND, WIDTH, ROWS) \
                } \
            } \
        } \
        TW_REPEAT_##ROWS(TW_FINISH_##KIND##WIDTH) \
    }

/* One tap, stride 1: the rows are a block apart. */
#define TW_POINTWISE_POINTER(r) const word *const a##r = a + r * apart;
#define TW_DEFINE_POINTWISE(KIND, WIDTH, ROWS) \
    static __attribute__((unused, noinline)) void tw_pointwise_##KIND##WIDTH##_##ROWS( \
        const TW_WORD_##KIND *b, float *sums, int64_t row, const tw_kernel_window *w, int64_t first, \
        int resume) { \
        TW_ONLY_USED(WIDTH, ROWS) \
        typedef TW_WORD_##KIND word; \
        enum { apart = TW_BLOCK_##KIND }; \
        TW_AHEAD_POINTER \
        const word *a = (const word *)w->image + (first + row) * apart; \
        TW_REPEAT_##ROWS(TW_ZERO_##KIND##WIDTH) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME_##KIND##WIDTH) } \
        for (int64_t block = 0; block < w->blocks; block++, a += w->plane) { \
            const int64_t depth = block + 1 < w->blocks ? apart : w->last; \
            TW_AHEAD \
            TW_REPEAT_##ROWS(TW_POINTWISE_POINTER) \
            TW_STEPS_OF_BLOCK(KIND, WIDTH, ROWS) \
        } \
        TW_REPEAT_##ROWS(TW_FINISH_##KIND##WIDTH) \
    }

/* Windows that slide along rows: pixel r, segment s (a channel and a row of taps) and tap j read
 * a[r*pixel_step + s*segment_step + j*tap_step]. */
#define TW_SLIDE_POINTER(r) const word *const a##r = a + r * pixel_step;
#define TW_DEFINE_SLIDE(KIND, WIDTH, ROWS) \
    static __attribute__((unused, noinline)) void tw_slide_##KIND##WIDTH##_##ROWS( \
        const TW_WORD_##KIND *b, float *sums, int64_t row, const TW_WORD_##KIND *a, int64_t pixel_step, \
        int64_t segments, int64_t segment_step, int64_t taps, int64_t tap_step, int resume) { \
        typedef TW_WORD_##KIND word; \
        a += row * pixel_step; \
        TW_REPEAT_##ROWS(TW_ZERO_##KIND##WIDTH) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME_##KIND##WIDTH) } \
        for (int64_t s = 0; s < segments; s++, a += segment_step) { \
            TW_REPEAT_##ROWS(TW_SLIDE_POINTER) \
            for (int64_t j = 0, k = 0; j < taps; j++, k += tap_step, b += TW_PANEL) { TW_STEPS_##KIND##WIDTH(ROWS) } \
        } \
        TW_REPEAT_##ROWS(TW_FINISH_##KIND##WIDTH) \
    }

#define TW_DEFINE_CONVOLVE_f32(ROWS) TW_DEFINE_CONVOLVE(f32, , ROWS)
#define TW_DEFINE_CONVOLVE_f32_wide(ROWS) TW_DEFINE_CONVOLVE(f32, _wide, ROWS)
#define TW_DEFINE_CONVOLVE_f32_narrow(ROWS) TW_DEFINE_CONVOLVE(f32, _narrow, ROWS)
#define TW_DEFINE_CONVOLVE_bf16(ROWS) TW_DEFINE_CONVOLVE(bf16, , ROWS)
#define TW_DEFINE_CONVOLVE_bf16_narrow(ROWS) TW_DEFINE_CONVOLVE(bf16, _narrow, ROWS)
#define TW_DEFINE_POINTWISE_f32(ROWS) TW_DEFINE_POINTWISE(f32, , ROWS)
#define TW_DEFINE_POINTWISE_f32_wide(ROWS) TW_DEFINE_POINTWISE(f32, _wide, ROWS)
#define TW_DEFINE_POINTWISE_f32_narrow(ROWS) TW_DEFINE_POINTWISE(f32, _narrow, ROWS)
#define TW_DEFINE_POINTWISE_bf16(ROWS) TW_DEFINE_POINTWISE(bf16, , ROWS)
#define TW_DEFINE_POINTWISE_bf16_narrow(ROWS) TW_DEFINE_POINTWISE(bf16, _narrow, ROWS)
#define TW_DEFINE_SLIDE_f32(ROWS) TW_DEFINE_SLIDE(f32, , ROWS)
#define TW_DEFINE_SLIDE_f32_wide(ROWS) TW_DEFINE_SLIDE(f32, _wide, ROWS)
#define TW_DEFINE_SLIDE_f32_narrow(ROWS) TW_DEFINE_SLIDE(f32, _narrow, ROWS)
#define TW_DEFINE_SLIDE_bf16(ROWS) TW_DEFINE_SLIDE(bf16, , ROWS)
#define TW_DEFINE_SLIDE_bf16_narrow(ROWS) TW_DEFINE_SLIDE(bf16, _narrow, ROWS)

/* sums[pixels][32] (+)= the convolution of the pixels of a tile with one packed panel, of which at least the first
 * `columns` are computed; resume: continue what is there. */
#define TW_CONVOLVE(KIND) \
    TW_FOR_EACH_WIDTH(TW_DEFINE_CONVOLVE, KIND) \
    static inline void tw_convolve_##KIND( \
        int64_t pixels, int64_t columns, const tw_kernel_window *w, const tw_pixel_tile *tile, \
        const TW_WORD_##KIND *b, float *sums, int resume) { \
        TW_CALL_PANEL(KIND, tw_convolve_##KIND, pixels, columns, b, sums, w, tile, resume) \
    }

/* The same for a kernel of one tap and stride 1; first is the first pixel of the tile. */
#define TW_POINTWISE(KIND) \
    TW_FOR_EACH_WIDTH(TW_DEFINE_POINTWISE, KIND) \
    static inline void tw_pointwise_##KIND( \
        int64_t pixels, int64_t columns, const tw_kernel_window *w, int64_t first, const TW_WORD_##KIND *b, \
        float *sums, int resume) { \
        TW_CALL_PANEL(KIND, tw_pointwise_##KIND, pixels, columns, b, sums, w, first, resume) \
    }

/* sums[pixels][32] (+)= windows that slide along rows. */
#define TW_SLIDE(KIND) \
    TW_FOR_EACH_WIDTH(TW_DEFINE_SLIDE, KIND) \
    static inline void tw_slide_##KIND( \
        int64_t pixels, int64_t columns, const TW_WORD_##KIND *a, int64_t pixel_step, int64_t segments, \
        int64_t segment_step, int64_t taps, int64_t tap_step, const TW_WORD_##KIND *b, float *sums, int resume) { \
        TW_CALL_PANEL( \
            KIND, tw_slide_##KIND, pixels, columns, b, sums, a, pixel_step, segments, segment_step, taps, tap_step, \
            resume) \
    }

#endif

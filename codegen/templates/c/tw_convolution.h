/* The register-blocked convolution over channels-blocked images: [batch][ceil(C/16)][H][W][16].
 *
 * A tile is up to TW_MR output pixels, neighbours in the flattened image, against one panel of 32 output channels. Each
 * tap of the kernel is, for one block of 16 input channels, a product of TW_MR rows of 16 by 16 x 32 weights: only the
 * addresses of the rows change from tap to tap, so the sums stay in registers over all taps and channels. A tap that
 * falls outside the image reads zeros.
 */
#ifndef TW_CONVOLUTION_H
#define TW_CONVOLUTION_H

#include "tw_simd.h"

/* The image and the kernel that slides over it; distances in floats. */
typedef struct {
    const float *image;   /* first channel block of this image and group */
    const float *zeros;   /* 16 zeros */
    int64_t plane;        /* between channel blocks */
    int64_t blocks, last; /* channel blocks, and channels in the last one */
    int64_t kh, kw;       /* taps, at most 64 each way */
    int64_t step_h, step_w; /* between taps */
} tw_kernel_window;

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

#define TW_TAP_POINTER(r) const float *a##r;
#define TW_TAP_INSIDE(r) a##r = w->image + (shift + tile->offset[r]);
#define TW_TAP_BORDER(r) \
    a##r = tile->rows[r] >> i & tile->columns[r] >> j & 1 ? w->image + (shift + tile->offset[r]) : w->zeros;
#define TW_DEFINE_CONVOLVE_AS(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_convolve##KIND##_##ROWS( \
        const tw_kernel_window *w, const tw_pixel_tile *tile, const float *b, float *sums) { \
        TW_REPEAT_##ROWS(TW_ZERO##KIND) \
        for (int64_t block = 0; block < w->blocks; block++) { \
            const int64_t depth = block + 1 < w->blocks ? 16 : w->last; \
            for (int64_t i = 0; i < w->kh; i++) { \
                for (int64_t j = 0; j < w->kw; j++) { \
                    const int64_t shift = block * w->plane + i * w->step_h + j * w->step_w; \
                    TW_REPEAT_##ROWS(TW_TAP_POINTER) \
                    if (tile->inside) { \
                        TW_REPEAT_##ROWS(TW_TAP_INSIDE) \
                    } else { \
                        TW_REPEAT_##ROWS(TW_TAP_BORDER) \
                    } \
                    for (int64_t k = 0; k < depth; k++, b += TW_PANEL) { \
                        const tw_vec b0 = tw_load(b), b1 = tw_load(b + TW_LANES); \
                        (void)b1; \
                        TW_REPEAT_##ROWS(TW_STEP##KIND) \
                    } \
                } \
            } \
        } \
        TW_REPEAT_##ROWS(TW_FINISH##KIND) \
    }
#define TW_DEFINE_CONVOLVE(ROWS) TW_DEFINE_CONVOLVE_AS(, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_CONVOLVE)
#if TW_LANES == 16
#define TW_DEFINE_CONVOLVE_NARROW(ROWS) TW_DEFINE_CONVOLVE_AS(_narrow, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_CONVOLVE_NARROW)
#endif

/* One tap, stride 1: the rows are 16 floats apart. */
#define TW_POINTWISE_POINTER(r) const float *const a##r = a + r * 16;
#define TW_DEFINE_POINTWISE_AS(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_pointwise##KIND##_##ROWS( \
        const tw_kernel_window *w, const float *a, const float *b, float *sums) { \
        TW_REPEAT_##ROWS(TW_ZERO##KIND) \
        for (int64_t block = 0; block < w->blocks; block++, a += w->plane) { \
            const int64_t depth = block + 1 < w->blocks ? 16 : w->last; \
            TW_REPEAT_##ROWS(TW_POINTWISE_POINTER) \
            for (int64_t k = 0; k < depth; k++, b += TW_PANEL) { \
                const tw_vec b0 = tw_load(b), b1 = tw_load(b + TW_LANES); \
                (void)b1; \
                TW_REPEAT_##ROWS(TW_STEP##KIND) \
            } \
        } \
        TW_REPEAT_##ROWS(TW_FINISH##KIND) \
    }
#define TW_DEFINE_POINTWISE(ROWS) TW_DEFINE_POINTWISE_AS(, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_POINTWISE)
#if TW_LANES == 16
#define TW_DEFINE_POINTWISE_NARROW(ROWS) TW_DEFINE_POINTWISE_AS(_narrow, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_POINTWISE_NARROW)
#endif

/* sums[pixels][32] = the convolution of the pixels of a tile with one packed panel, of which at least the first
 * `columns` are computed. */
static inline void tw_convolve(
    int64_t pixels, int64_t columns, const tw_kernel_window *w, const tw_pixel_tile *tile, const float *b,
    float *sums) {
#if TW_LANES == 16
    if (columns > 16) {
        TW_SWITCH_ROWS(tw_convolve_, pixels, w, tile, b, sums)
    } else {
        TW_SWITCH_ROWS(tw_convolve_narrow_, pixels, w, tile, b, sums)
    }
#else
    TW_SWITCH_ROWS(tw_convolve_, pixels, w, tile, b, sums)
    if (columns > 16) {
        TW_SWITCH_ROWS(tw_convolve_, pixels, w, tile, b + 16, sums + 16)
    }
#endif
}

/* The same for a kernel of one tap and stride 1; first is the first pixel of the tile. */
static inline void tw_pointwise(
    int64_t pixels, int64_t columns, const tw_kernel_window *w, int64_t first, const float *b, float *sums) {
#if TW_LANES == 16
    if (columns > 16) {
        TW_SWITCH_ROWS(tw_pointwise_, pixels, w, w->image + first * 16, b, sums)
    } else {
        TW_SWITCH_ROWS(tw_pointwise_narrow_, pixels, w, w->image + first * 16, b, sums)
    }
#else
    TW_SWITCH_ROWS(tw_pointwise_, pixels, w, w->image + first * 16, b, sums)
    if (columns > 16) {
        TW_SWITCH_ROWS(tw_pointwise_, pixels, w, w->image + first * 16, b + 16, sums + 16)
    }
#endif
}

/* sums[pixels][32] (+)= windows that slide along rows: pixel r, segment s (a channel and a row of taps) and tap j read
 * a[r*pixel_step + s*segment_step + j*tap_step]. */
#define TW_SLIDE_POINTER(r) const float *const a##r = a + r * pixel_step;
#define TW_DEFINE_SLIDE_AS(KIND, ROWS) \
    static __attribute__((unused, noinline)) void tw_slide##KIND##_##ROWS( \
        const float *a, int64_t pixel_step, int64_t segments, int64_t segment_step, int64_t taps, int64_t tap_step, \
        const float *b, float *sums, int resume) { \
        TW_REPEAT_##ROWS(TW_ZERO##KIND) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME##KIND) } \
        for (int64_t s = 0; s < segments; s++, a += segment_step) { \
            TW_REPEAT_##ROWS(TW_SLIDE_POINTER) \
            for (int64_t j = 0, k = 0; j < taps; j++, k += tap_step, b += TW_PANEL) { \
                const tw_vec b0 = tw_load(b), b1 = tw_load(b + TW_LANES); \
                (void)b1; \
                TW_REPEAT_##ROWS(TW_STEP##KIND) \
            } \
        } \
        TW_REPEAT_##ROWS(TW_FINISH##KIND) \
    }
#define TW_DEFINE_SLIDE(ROWS) TW_DEFINE_SLIDE_AS(, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_SLIDE)
#if TW_LANES == 16
#define TW_DEFINE_SLIDE_NARROW(ROWS) TW_DEFINE_SLIDE_AS(_narrow, ROWS)
TW_FOR_EACH_ROWS(TW_DEFINE_SLIDE_NARROW)
#endif

static inline void tw_slide(
    int64_t pixels, int64_t columns, const float *a, int64_t pixel_step, int64_t segments, int64_t segment_step,
    int64_t taps, int64_t tap_step, const float *b, float *sums, int resume) {
#if TW_LANES == 16
    if (columns > 16) {
        TW_SWITCH_ROWS(tw_slide_, pixels, a, pixel_step, segments, segment_step, taps, tap_step, b, sums, resume)
    } else {
        TW_SWITCH_ROWS(tw_slide_narrow_, pixels, a, pixel_step, segments, segment_step, taps, tap_step, b, sums, resume)
    }
#else
    TW_SWITCH_ROWS(tw_slide_, pixels, a, pixel_step, segments, segment_step, taps, tap_step, b, sums, resume)
    if (columns > 16) {
        TW_SWITCH_ROWS(
            tw_slide_, pixels, a, pixel_step, segments, segment_step, taps, tap_step, b + 16, sums + 16, resume)
    }
#endif
}

#endif

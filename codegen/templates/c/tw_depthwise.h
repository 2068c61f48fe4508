/* The register-blocked depthwise convolution: one filter per channel, 16 channels side by side. */
#ifndef TW_DEPTHWISE_H
#define TW_DEPTHWISE_H

#include "tw_half.h"
#include "tw_simd.h"

/* Copy a row of the image as float32. */
static inline void tw_read_f32(float *restrict to, const float *restrict from, int64_t count) {
    memcpy(to, from, count * sizeof(float));
}
static inline void tw_read_bf16(float *restrict to, const uint16_t *restrict from, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        to[i] = tw_bf16_to_f32(from[i]);
    }
}

/* sums[r][16] = sum over i < kh, j < kw of rows[i][at + j*tap_step + r*pixel_step] * weights[i*kw + j]; every term is a
 * vector of 16. */
#if TW_LANES == 16
#define TW_DEPTH_ZERO(r) tw_vec x##r = {0};
#define TW_DEPTH_STEP(r) x##r += tw_load(tap + r * pixel_step) * w0;
#define TW_DEPTH_FINISH(r) tw_store(sums + r * 16, x##r);
#else
#define TW_DEPTH_ZERO(r) tw_vec x##r = {0}, y##r = {0};
#define TW_DEPTH_STEP(r) x##r += tw_load(tap + r * pixel_step) * w0, y##r += tw_load(tap + r * pixel_step + 8) * w1;
#define TW_DEPTH_FINISH(r) tw_store(sums + r * 16, x##r), tw_store(sums + r * 16 + 8, y##r);
#endif
#define TW_DEFINE_DEPTHWISE(PIXELS) \
    static __attribute__((unused, noinline)) void tw_depthwise_##PIXELS( \
        const float *const *rows, int64_t at, int64_t pixel_step, int64_t kh, int64_t kw, int64_t tap_step, \
        const float *weights, float *sums) { \
        TW_REPEAT_##PIXELS(TW_DEPTH_ZERO) \
        for (int64_t i = 0; i < kh; i++) { \
            const float *tap = rows[i] + at; \
            for (int64_t j = 0; j < kw; j++, tap += tap_step, weights += 16) { \
                const tw_vec w0 = tw_load(weights), w1 = tw_load(weights + 16 - TW_LANES); \
                (void)w1; \
                TW_REPEAT_##PIXELS(TW_DEPTH_STEP) \
            } \
        } \
        TW_REPEAT_##PIXELS(TW_DEPTH_FINISH) \
    }
TW_FOR_EACH_ROWS(TW_DEFINE_DEPTHWISE)

static inline void tw_depthwise(
    int64_t pixels, const float *const *rows, int64_t at, int64_t pixel_step, int64_t kh, int64_t kw,
    int64_t tap_step, const float *weights, float *sums) {
    TW_SWITCH_ROWS(tw_depthwise_, pixels, rows, at, pixel_step, kh, kw, tap_step, weights, sums)
}

#endif

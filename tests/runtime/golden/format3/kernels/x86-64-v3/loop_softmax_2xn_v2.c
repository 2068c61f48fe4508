#include "tw_math.h"

void loop_softmax_2xn_v2(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
    int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    float *restrict y0 = buf[1];
    const int64_t n_blocks = dim[0];
    (void)dim;
    (void)fault;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t i0 = unit;
        float r0 = (-(float)INFINITY);
        int32_t r0_nan = 0;
        #pragma omp simd reduction(max:r0) reduction(|:r0_nan)
        for (int64_t i1 = 0; i1 < n_blocks * 8; i1++) {
            const float t1 = x0[i1 + (i0 * n_blocks * 8)];
            r0 = t1 > r0 ? t1 : r0;
            r0_nan |= t1 != t1;
        }
        float r2 = 0;
        for (int64_t i1_from = 0; i1_from < n_blocks * 8; i1_from += 4096) {
            float s3 = 0;
            #pragma omp simd reduction(+:s3)
            for (int64_t i1 = i1_from; i1 < tw_min_i64(n_blocks * 8, i1_from + 4096); i1++) {
                const float t4 = x0[i1 + (i0 * n_blocks * 8)];
                const float t5 = t4 - (r0_nan ? (float)NAN : r0);
                const float t6 = tw_exp_f32(t5);
                s3 += t6;
            }
            r2 += s3;
        }
        const float t10 = 1.0f / r2;
        #pragma omp simd
        for (int64_t i1 = 0; i1 < n_blocks * 8; i1++) {
            const float t7 = x0[i1 + (i0 * n_blocks * 8)];
            const float t8 = t7 - (r0_nan ? (float)NAN : r0);
            const float t9 = tw_exp_f32(t8);
            const float t11 = t9 * t10;
            y0[i1 + (i0 * n_blocks * 8)] = t11;
        }
    }
}

#include "tw_math.h"

void loop_softmax_batchx3(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
    int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    float *restrict y0 = buf[1];
    const int64_t n_batch = dim[0];
    (void)dim;
    (void)fault;
    float row0[3] __attribute__((aligned(64)));
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t i0 = unit;
        float r0 = (-(float)INFINITY);
        int32_t r0_nan = 0;
        #pragma omp simd reduction(max:r0) reduction(|:r0_nan)
        for (int64_t i1 = 0; i1 < 3; i1++) {
            const float t1 = x0[i1 + (i0 * 3)];
            r0 = t1 > r0 ? t1 : r0;
            r0_nan |= t1 != t1;
        }
        float r2 = 0;
        #pragma omp simd reduction(+:r2)
        for (int64_t i1 = 0; i1 < 3; i1++) {
            const float t3 = x0[i1 + (i0 * 3)];
            const float t4 = t3 - (r0_nan ? (float)NAN : r0);
            const float t5 = tw_exp_f32(t4);
            row0[i1] = t5;
            r2 += t5;
        }
        const float t6 = 1.0f / r2;
        #pragma omp simd
        for (int64_t i1 = 0; i1 < 3; i1++) {
            const float t7 = row0[i1] * t6;
            y0[i1 + (i0 * 3)] = t7;
        }
    }
}

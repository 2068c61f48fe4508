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
        float r1 = (-(float)INFINITY);
        int32_t r1_nan = 0;
        #pragma omp simd reduction(max:r1) reduction(|:r1_nan)
        for (int64_t i1 = 0; i1 < n_blocks * 8; i1++) {
            const float t2 = x0[i1 + (i0 * n_blocks * 8)];
            r1 = t2 > r1 ? t2 : r1;
            r1_nan |= t2 != t2;
        }
        float r5 = 0;
        #pragma omp simd reduction(+:r5)
        for (int64_t i1 = 0; i1 < n_blocks * 8; i1++) {
            const float t6 = x0[i1 + (i0 * n_blocks * 8)];
            const float t7 = t6 - (r1_nan ? (float)NAN : r1);
            const float t8 = tw_exp_f32(t7);
            r5 += t8;
        }
        const float t9 = 1.0f / r5;
        #pragma omp simd
        for (int64_t i1 = 0; i1 < n_blocks * 8; i1++) {
            const float t0 = x0[i1 + (i0 * n_blocks * 8)];
            const float t3 = t0 - (r1_nan ? (float)NAN : r1);
            const float t4 = tw_exp_f32(t3);
            const float t10 = t4 * t9;
            y0[i1 + (i0 * n_blocks * 8)] = t10;
        }
    }
}

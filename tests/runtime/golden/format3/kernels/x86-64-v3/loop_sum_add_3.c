#include "tw_math.h"

void loop_sum_add_3(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
    int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    const float *restrict x1 = buf[1];
    float *restrict y0 = buf[2];
    const int64_t n_batch = dim[0];
    (void)dim;
    (void)fault;
    for (int64_t unit = begin; unit < end; unit++) {
        float r0[3] __attribute__((aligned(64)));
        #pragma omp simd
        for (int64_t l = 0; l < 3; l++) {
            r0[l] = 0;
        }
        for (int64_t i0 = 0; i0 < n_batch; i0++) {
            #pragma omp simd
            for (int64_t l = 0; l < 3; l++) {
                const float t1 = x0[l + (i0 * 3)];
                r0[l] += t1;
            }
        }
        #pragma omp simd
        for (int64_t l = 0; l < 3; l++) {
            const float t2 = x1[l];
            const float t3 = t2 + r0[l];
            y0[l] = t3;
        }
    }
}

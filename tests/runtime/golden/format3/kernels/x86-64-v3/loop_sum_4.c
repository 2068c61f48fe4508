#include "tw_math.h"

void loop_sum_4(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
    int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    float *restrict y0 = buf[1];
    const int64_t n_blocks = dim[0];
    (void)dim;
    (void)fault;
    for (int64_t unit = begin; unit < end; unit++) {
        float r0[4] __attribute__((aligned(64)));
        #pragma omp simd
        for (int64_t l = 0; l < 4; l++) {
            r0[l] = 0;
        }
        for (int64_t i0 = 0; i0 < n_blocks; i0++) {
            for (int64_t i1 = 0; i1 < 1; i1++) {
                for (int64_t i2 = 0; i2 < 32; i2++) {
                    #pragma omp simd
                    for (int64_t l = 0; l < 4; l++) {
                        const float t1 = x0[l + (i0 * 128) + (i1 * 128) + (i2 * 4)];
                        r0[l] += t1;
                    }
                }
            }
        }
        #pragma omp simd
        for (int64_t l = 0; l < 4; l++) {
            y0[l] = r0[l];
        }
    }
}

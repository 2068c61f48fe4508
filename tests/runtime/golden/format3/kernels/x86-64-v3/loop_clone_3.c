#include "tw_math.h"

void loop_clone_3(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
    int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    float *restrict y0 = buf[1];
    (void)dim;
    (void)fault;
    for (int64_t unit = begin; unit < end; unit++) {
        #pragma omp simd
        for (int64_t i0 = 0; i0 < 3; i0++) {
            const float t0 = x0[i0];
            y0[i0] = t0;
        }
    }
}

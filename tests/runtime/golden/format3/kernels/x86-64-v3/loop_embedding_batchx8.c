#include "tw_math.h"

void loop_embedding_batchx8(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
    int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    const int64_t *restrict x1 = buf[1];
    float *restrict y0 = buf[2];
    const int64_t n_batch = dim[0];
    (void)dim;
    (void)fault;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t i0 = unit;
        const int64_t t0 = x1[i0];
        const int64_t g0 = tw_index(t0, 10, fault);
        #pragma omp simd
        for (int64_t i1 = 0; i1 < 8; i1++) {
            const float t1 = x0[i1 + (g0 * 8)];
            y0[i1 + (i0 * 8)] = t1;
        }
    }
}

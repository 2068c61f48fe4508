#include "tw_math.h"
#include "tw_runtime.h"

void matmul_linear_batchx8(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);

TW_API int64_t tw_arena_encode(const int64_t *symbols, int64_t *offsets);
TW_API int64_t tw_arena_encode(const int64_t *symbols, int64_t *offsets) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    (void)symbols;
    int64_t size = 0;
    (void)offsets;
    return size;
}

static void tw_steps_0(tw_call *call, const int64_t *offsets) {
    const int64_t n_batch = call->symbols[0];
    (void)n_batch;
    (void)offsets;
    /* 0: first torch/nn/modules/linear.py:134 */
    {
        void *const buf[] = {(void *)call->inputs[0], (void *)(call->weights + 1088), (void *)(call->weights + 320), call->outputs[0]};
        const int64_t dim[] = {n_batch};
        tw_step(call, 0, 0, matmul_linear_batchx8, buf, dim, (n_batch + 95) / 96, (n_batch * 152) + 800);
    }
}

TW_API int32_t tw_run_encode(tw_call *call);

TW_API int32_t tw_run_encode(tw_call *call) {
    int64_t offsets[1];
    tw_arena_encode(call->symbols, offsets);
    tw_steps_0(call, offsets);
    return call->fault;
}

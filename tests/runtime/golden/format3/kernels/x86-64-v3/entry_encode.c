#include "tw_entry.h"
#include "tw_math.h"

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
        tw_step(call, 0, 0, matmul_linear_batchx8, buf, dim, (n_batch + 47) / 48, (n_batch * 152) + 800);
    }
}

TW_API int32_t tw_run_encode(tw_call *call);

TW_API int32_t tw_run_encode(tw_call *call) {
    int64_t offsets[1];
    tw_arena_encode(call->symbols, offsets);
    tw_steps_0(call, offsets);
    return call->fault;
}

static const tw_symbol tw_symbols[] = {{"batch", 1, 32}};
static const tw_port tw_inputs[] = {{"x", "float32", 4, 2}};
static const tw_port tw_outputs[] = {{"output", "float32", 4, 2}};
static const tw_state tw_states[] = {{0}};

static const char *tw_check(const int64_t *symbols) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    if (n_batch < 1 || n_batch > 32) return "batch must be 1 to 32";
    (void)symbols;
    return NULL;
}

static void tw_shapes(const int64_t *symbols, int64_t *dims) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    dims[0] = n_batch;
    dims[1] = 6;
    dims[2] = n_batch;
    dims[3] = 8;
    (void)symbols;
    (void)dims;
}

static void tw_state_bytes(const int64_t *symbols, int64_t *bytes) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    (void)symbols;
    (void)bytes;
}

TW_API extern const tw_entry tw_entry_encode;
const tw_entry tw_entry_encode = {
    "encode", 1, 1, 1, 0, tw_symbols, tw_inputs, tw_outputs, tw_states,
    tw_check, tw_shapes, tw_arena_encode, tw_run_encode, tw_state_bytes,
};

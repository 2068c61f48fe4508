#include "tw_entry.h"
#include "tw_math.h"

void loop_clone_3(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void loop_embedding_batchx8(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void loop_softmax_2xn(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void loop_softmax_2xn_v2(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void loop_softmax_batchx3(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void loop_sum_add_3(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void matmul_linear_batchx3(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void matmul_linear_relu_add_batchx8(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);

TW_API int64_t tw_arena_main(const int64_t *symbols, int64_t *offsets);
TW_API int64_t tw_arena_main(const int64_t *symbols, int64_t *offsets) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    const int64_t n_blocks = symbols[1];
    (void)n_blocks;
    (void)symbols;
    int64_t size = 0;
    const int64_t at0 = 0; /* embedding_1 */
    const int64_t end0 = at0 + (n_batch * 32 + 63) / 64 * 64;
    size = tw_max_i64(size, end0);
    const int64_t at1 = 0; /* linear_2 */
    const int64_t end1 = at1 + (n_batch * 12 + 63) / 64 * 64;
    size = tw_max_i64(size, end1);
    if (offsets) {
        offsets[0] = at0;
        offsets[1] = at1;
    }
    return size;
}

static void tw_steps_0(tw_call *call, const int64_t *offsets) {
    const int64_t n_batch = call->symbols[0];
    (void)n_batch;
    const int64_t n_blocks = call->symbols[1];
    (void)n_blocks;
    (void)offsets;
    /* 0: words torch/nn/modules/sparse.py:189 */
    {
        void *const buf[] = {(void *)(call->weights + 0), (void *)call->inputs[1], call->arena + offsets[0]};
        const int64_t dim[] = {n_batch};
        tw_step(call, 0, 0, loop_embedding_batchx8, buf, dim, n_batch, (n_batch * 40) + 320);
    }
    /* 1: first torch/nn/modules/linear.py:134 */
    {
        void *const buf[] = {(void *)call->inputs[0], (void *)(call->weights + 1088), call->arena + offsets[0], (void *)(call->weights + 320), call->outputs[1]};
        const int64_t dim[] = {n_batch};
        tw_step(call, 1, 0, matmul_linear_relu_add_batchx8, buf, dim, (n_batch + 47) / 48, (n_batch * 184) + 800);
    }
    /* 2: second torch/nn/modules/linear.py:134 */
    {
        void *const buf[] = {call->outputs[1], (void *)(call->weights + 2176), (void *)(call->weights + 1152), call->arena + offsets[1]};
        const int64_t dim[] = {n_batch};
        tw_step(call, 2, 0, matmul_linear_batchx3, buf, dim, (n_batch + 47) / 48, (n_batch * 92) + 1036);
    }
    /* 3: softmax tilewright/tests/runtime/golden/make_format1.py:44 */
    {
        void *const buf[] = {call->arena + offsets[1], call->outputs[0]};
        const int64_t dim[] = {n_batch};
        tw_step(call, 3, 0, loop_softmax_batchx3, buf, dim, n_batch, n_batch * 42);
    }
    /* 4: sum_1 add_1 tilewright/tests/runtime/golden/make_format1.py:45 */
    {
        void *const buf[] = {call->outputs[0], call->states[0], call->outputs[3]};
        const int64_t dim[] = {n_batch};
        tw_step(call, 4, 0, loop_sum_add_3, buf, dim, 1, (n_batch * 13) + 27);
    }
    /* 5: softmax_1 tilewright/tests/runtime/golden/make_format1.py:46 */
    if ((n_blocks * 8) <= 24576) {
        void *const buf[] = {(void *)call->inputs[2], call->outputs[2]};
        const int64_t dim[] = {n_blocks};
        tw_step(call, 5, 0, loop_softmax_2xn, buf, dim, 2, n_blocks * 224);
    }
    else {
        void *const buf[] = {(void *)call->inputs[2], call->outputs[2]};
        const int64_t dim[] = {n_blocks};
        tw_step(call, 5, 1, loop_softmax_2xn_v2, buf, dim, 2, n_blocks * 224);
    }
    /* 6: sum_1 add_1 tilewright/tests/runtime/golden/make_format1.py:45 */
    {
        void *const buf[] = {call->outputs[3], call->states[0]};
        const int64_t dim[] = {0};
        tw_step(call, 6, 0, loop_clone_3, buf, dim, 1, 24);
    }
}

TW_API int32_t tw_run_main(tw_call *call);

TW_API int32_t tw_run_main(tw_call *call) {
    int64_t offsets[2];
    tw_arena_main(call->symbols, offsets);
    tw_steps_0(call, offsets);
    return call->fault;
}

static const tw_symbol tw_symbols[] = {{"batch", 1, 32}, {"blocks", 1, 8000}};
static const tw_port tw_inputs[] = {{"x", "float32", 4, 2}, {"word", "int64", 8, 1}, {"row", "float32", 4, 2}};
static const tw_port tw_outputs[] = {{"scores", "float32", 4, 2}, {"more.0", "float32", 4, 2}, {"more.1", "float32", 4, 2}, {"total", "float32", 4, 1}};
static const tw_state tw_states[] = {{"total", 12, 2240}};

static const char *tw_check(const int64_t *symbols) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    const int64_t n_blocks = symbols[1];
    (void)n_blocks;
    if (n_batch < 1 || n_batch > 32) return "batch must be 1 to 32";
    if (n_blocks < 1 || n_blocks > 8000) return "blocks must be 1 to 8000";
    if (!(n_batch != 13)) return "the model was traced assuming batch != 13";
    (void)symbols;
    return NULL;
}

static void tw_shapes(const int64_t *symbols, int64_t *dims) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    const int64_t n_blocks = symbols[1];
    (void)n_blocks;
    dims[0] = n_batch;
    dims[1] = 6;
    dims[2] = n_batch;
    dims[3] = 2;
    dims[4] = n_blocks * 8;
    dims[5] = n_batch;
    dims[6] = 3;
    dims[7] = n_batch;
    dims[8] = 8;
    dims[9] = 2;
    dims[10] = n_blocks * 8;
    dims[11] = 3;
    (void)symbols;
    (void)dims;
}

static void tw_state_bytes(const int64_t *symbols, int64_t *bytes) {
    const int64_t n_batch = symbols[0];
    (void)n_batch;
    const int64_t n_blocks = symbols[1];
    (void)n_blocks;
    bytes[0] = 12;
    (void)symbols;
    (void)bytes;
}

TW_API extern const tw_entry tw_entry_main;
const tw_entry tw_entry_main = {
    "main", 2, 3, 4, 1, tw_symbols, tw_inputs, tw_outputs, tw_states,
    tw_check, tw_shapes, tw_arena_main, tw_run_main, tw_state_bytes,
};

#include "tw_entry.h"
#include "tw_math.h"

void cache_append_cache_append_blocksx1x32x4(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);
void loop_sum_4(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);

TW_API int64_t tw_arena_append(const int64_t *symbols, int64_t *offsets);
TW_API int64_t tw_arena_append(const int64_t *symbols, int64_t *offsets) {
    const int64_t n_tokens = symbols[0];
    (void)n_tokens;
    const int64_t n_sequences = symbols[1];
    (void)n_sequences;
    const int64_t n_width = symbols[2];
    (void)n_width;
    const int64_t n_blocks = symbols[3];
    (void)n_blocks;
    (void)symbols;
    int64_t size = 0;
    (void)offsets;
    return size;
}

static void tw_steps_0(tw_call *call, const int64_t *offsets) {
    const int64_t n_tokens = call->symbols[0];
    (void)n_tokens;
    const int64_t n_sequences = call->symbols[1];
    (void)n_sequences;
    const int64_t n_width = call->symbols[2];
    (void)n_width;
    const int64_t n_blocks = call->symbols[3];
    (void)n_blocks;
    (void)offsets;
    /* 0: cache_append tilewright/tests/runtime/golden/make_format3.py:46 */
    {
        void *const buf[] = {(void *)call->inputs[0], (void *)call->inputs[1], (void *)call->inputs[2], (void *)call->inputs[3], call->states[0]};
        const int64_t dim[] = {n_tokens, n_sequences, n_width, n_blocks};
        tw_step(call, 0, 0, cache_append_cache_append_blocksx1x32x4, buf, dim, (n_tokens + 15) / 16, n_tokens * 32);
    }
    /* 1: sum_1 tilewright/tests/runtime/golden/make_format3.py:47 */
    {
        void *const buf[] = {call->states[0], call->outputs[0]};
        const int64_t dim[] = {n_blocks};
        tw_step(call, 1, 0, loop_sum_4, buf, dim, 1, (n_blocks * 544) + 16);
    }
}

TW_API int32_t tw_run_append(tw_call *call);

TW_API int32_t tw_run_append(tw_call *call) {
    int64_t offsets[1];
    tw_arena_append(call->symbols, offsets);
    tw_steps_0(call, offsets);
    return call->fault;
}

static const tw_symbol tw_symbols[] = {{"tokens", 1, 16}, {"sequences", 1, 4}, {"width", 1, 2}, {"blocks", 1, 1000}};
static const tw_port tw_inputs[] = {{"rows", "float32", 4, 3}, {"positions", "int32", 4, 1}, {"starts", "int32", 4, 1}, {"table", "int32", 4, 2}};
static const tw_port tw_outputs[] = {{"output", "float32", 4, 1}};
static const tw_state tw_states[] = {{"cache", -1, -1}};

static const char *tw_check(const int64_t *symbols) {
    const int64_t n_tokens = symbols[0];
    (void)n_tokens;
    const int64_t n_sequences = symbols[1];
    (void)n_sequences;
    const int64_t n_width = symbols[2];
    (void)n_width;
    const int64_t n_blocks = symbols[3];
    (void)n_blocks;
    if (n_tokens < 1 || n_tokens > 16) return "tokens must be 1 to 16";
    if (n_sequences < 1 || n_sequences > 4) return "sequences must be 1 to 4";
    if (n_width < 1 || n_width > 2) return "width must be 1 to 2";
    if (n_blocks < 1 || n_blocks > 1000) return "blocks must be 1 to 1000";
    (void)symbols;
    return NULL;
}

static void tw_shapes(const int64_t *symbols, int64_t *dims) {
    const int64_t n_tokens = symbols[0];
    (void)n_tokens;
    const int64_t n_sequences = symbols[1];
    (void)n_sequences;
    const int64_t n_width = symbols[2];
    (void)n_width;
    const int64_t n_blocks = symbols[3];
    (void)n_blocks;
    dims[0] = n_tokens;
    dims[1] = 1;
    dims[2] = 4;
    dims[3] = n_tokens;
    dims[4] = n_sequences + 1;
    dims[5] = n_sequences;
    dims[6] = n_width;
    dims[7] = 4;
    (void)symbols;
    (void)dims;
}

static void tw_state_bytes(const int64_t *symbols, int64_t *bytes) {
    const int64_t n_tokens = symbols[0];
    (void)n_tokens;
    const int64_t n_sequences = symbols[1];
    (void)n_sequences;
    const int64_t n_width = symbols[2];
    (void)n_width;
    const int64_t n_blocks = symbols[3];
    (void)n_blocks;
    bytes[0] = n_blocks * 512;
    (void)symbols;
    (void)bytes;
}

TW_API extern const tw_entry tw_entry_append;
const tw_entry tw_entry_append = {
    "append", 4, 4, 1, 1, tw_symbols, tw_inputs, tw_outputs, tw_states,
    tw_check, tw_shapes, tw_arena_append, tw_run_append, tw_state_bytes,
};

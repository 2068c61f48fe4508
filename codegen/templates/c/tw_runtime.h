/* The C side of the runtime: the thread pool and the call that kernels run in.
 *
 * Generated entry files call tw_step() once per step of the plan; hosts (Python through ctypes, or a C program) fill in
 * a tw_call and call tw_run_<entry>(). Linux, C11 with GNU extensions, gcc and clang.
 *
 * Alignment: weights, arena and states are 64-byte aligned; inputs and outputs are aligned to their element only.
 */
#ifndef TW_RUNTIME_H
#define TW_RUNTIME_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TW_API __attribute__((visibility("default")))
#define TW_INTERNAL __attribute__((visibility("hidden"))) /* shared by the objects of one library only */

/* Raised whenever tw_call or the meaning of a function below changes; the host compares it with tw_abi. */
#define TW_ABI 1

/* Does units [begin, end) of a step. buf: the operands of the plan's variant; dim: its sizes. Units are independent, and
 * the result does not depend on how they are grouped. A kernel that meets an index past its table sets *fault to 1. */
typedef void (*tw_kernel)(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                          int32_t *restrict fault);

/* Called on the calling thread after each step, when set; times are of CLOCK_MONOTONIC. */
typedef void (*tw_trace)(void *user, int32_t step, int32_t variant, int64_t begin_ns, int64_t end_ns);

typedef struct tw_pool tw_pool;

/* One run of an entry point. The host owns everything; two calls at once need different arenas, outputs and states. */
typedef struct {
    const char *weights;    /* start of the data section of weights.safetensors */
    char *arena;            /* at least tw_arena_<entry>(symbols, NULL) bytes */
    void *const *inputs;    /* in the order of the plan, C-contiguous */
    void *const *outputs;
    void *const *states;
    const int64_t *symbols; /* values, in the order of the plan */
    tw_pool *pool;          /* NULL: run on the calling thread */
    tw_trace trace;         /* NULL: no tracing */
    void *trace_user;
    int32_t fault;          /* 0 before the run; see tw_run_<entry>. A trace callback may set -1 to skip what is left */
} tw_call;

/* A pool of `threads` threads, the caller included. Threads start with the first step that is worth sharing, and again
 * in a forked child. One call uses the pool at a time; another that comes meanwhile runs its step on its own thread.
 * Returns NULL when there is no memory. */
TW_API tw_pool *tw_pool_create(int threads);

/* Ends and joins the threads; no call may be using the pool. NULL is ignored. */
TW_API void tw_pool_destroy(tw_pool *pool);

/* Runs units [0, units) of one step, shared over the pool as far as `work` (bytes moved plus flops, all units together)
 * is worth it. Does nothing once the call has a fault. */
TW_INTERNAL void tw_step(tw_call *call, int32_t step, int32_t variant, tw_kernel kernel, void *const *buf,
                         const int64_t *dim, int64_t units, int64_t work);

/* A ready-made trace: appends to a tw_records given as trace_user; what does not fit is counted and dropped. */
typedef struct {
    int32_t step, variant;
    int64_t begin_ns, end_ns;
} tw_record;

typedef struct {
    tw_record *items;
    int64_t capacity;
    int64_t count; /* of all steps, also those that did not fit */
} tw_records;

TW_API void tw_trace_record(void *records, int32_t step, int32_t variant, int64_t begin_ns, int64_t end_ns);

TW_API extern const int32_t tw_abi;

/* Generated once per library: SHA-256 (hex) of the header of weights.safetensors (its 8-byte length and its JSON), and
 * the size of the whole file in bytes. */
TW_API extern const char tw_weights_id[65];
TW_API extern const int64_t tw_weights_size;

/* Generated per entry point:
 *
 * TW_API int32_t tw_run_<entry>(tw_call *call);
 *     Runs all steps. Returns call->fault: 0, or 1 + the index of the step that met an out-of-range index.
 * TW_API int64_t tw_arena_<entry>(const int64_t *symbols, int64_t *offsets);
 *     The size of the arena; when offsets is not NULL, also the offset of every buffer of the plan.
 */

#ifdef __cplusplus
}
#endif
#endif

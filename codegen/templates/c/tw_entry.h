/* What an entry point takes and gives: the part of a plan that a C program needs to call it. examples/c uses all of it.
 *
 * A library exports one tw_entry per entry point, tw_entry_<entry>: declare it extern when linking, or look it up by
 * name after dlopen. Libraries that were compiled before this header existed do not export it.
 */
#ifndef TW_ENTRY_H
#define TW_ENTRY_H

#include "tw_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A size that varies between calls. */
typedef struct {
    const char *name;
    int64_t minimum, maximum; /* inclusive */
} tw_symbol;

/* An input or an output: C-contiguous. */
typedef struct {
    const char *name;
    const char *dtype; /* "float32", "int64", ... */
    int32_t item_bytes;
    int32_t rank;
} tw_port;

/* Memory that lasts from call to call, 64-byte aligned. States of the same name are one for all entry points. */
typedef struct {
    const char *name;
    int64_t bytes; /* -1: its size varies, ask state_bytes; it is chosen once, for all calls that share the state */
    int64_t initial; /* where in the data section of the weights its first content lies; -1: it starts as zeros */
} tw_state;

typedef struct {
    const char *name;
    int32_t symbol_count, input_count, output_count, state_count;
    const tw_symbol *symbols; /* all in the order in which a tw_call has them */
    const tw_port *inputs;
    const tw_port *outputs;
    const tw_state *states;
    /* NULL when the entry point runs with these sizes, else what is wrong. Check before the functions below. */
    const char *(*check)(const int64_t *symbols);
    /* Fills in the shapes: the sizes of the first input, of the second, ..., then those of the outputs. */
    void (*shapes)(const int64_t *symbols, int64_t *dims);
    /* tw_arena_<entry> and tw_run_<entry>, see tw_runtime.h. Kernels keep up to 512 KB on the stack of the thread that
     * calls: it should have a megabyte. */
    int64_t (*arena)(const int64_t *symbols, int64_t *offsets);
    int32_t (*run)(tw_call *call);
    /* Fills in the bytes of each state. Libraries of format 2 and before end above; no state of theirs varies. */
    void (*state_bytes)(const int64_t *symbols, int64_t *bytes);
} tw_entry;

/* Processor flags that the code needs, as /proc/cpuinfo spells them, with a space between. Without them, calls end in
 * an illegal instruction. */
TW_API extern const char tw_features[];

#ifdef __cplusplus
}
#endif
#endif

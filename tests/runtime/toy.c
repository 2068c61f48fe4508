/* A model written by hand, as the code generator would write it; conftest.py holds its plans.
 *
 * main:  t = x @ w (n rows of 8 by 8x4; another variant for one row);  y = t + table[idx]
 * count: total += x;  y = total      (state)
 * half:  y = x                       (bfloat16)
 * busy:  t = x + 1 (or INCREMENT), 64 times over;  y = t      (many steps, each worth sharing)
 */
#include <string.h>

#include "tw_runtime.h"

#define STEPS 64
#ifndef INCREMENT
#define INCREMENT 1
#endif

static void rows(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                 int32_t *restrict fault) {
    const float *x = buf[0], *w = buf[1];
    float *y = buf[2];
    (void)dim, (void)fault;
    for (int64_t i = begin; i < end; i++)
        for (int j = 0; j < 4; j++) {
            float sum = 0;
            for (int k = 0; k < 8; k++) sum += x[i * 8 + k] * w[k * 4 + j];
            y[i * 4 + j] = sum;
        }
}

static void one_row(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                    int32_t *restrict fault) {
    rows(buf, dim, begin, end, fault);
}

static void add_rows(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                     int32_t *restrict fault) {
    const float *t = buf[0], *table = buf[1];
    const int64_t *index = buf[2];
    float *y = buf[3];
    for (int64_t i = begin; i < end; i++) {
        if (index[i] < 0 || index[i] >= dim[1]) {
            *fault = 1;
            continue;
        }
        for (int j = 0; j < 4; j++) y[i * 4 + j] = t[i * 4 + j] + table[index[i] * 4 + j];
    }
}

static void accumulate(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                       int32_t *restrict fault) {
    const float *x = buf[0];
    float *total = buf[1], *y = buf[2];
    (void)dim, (void)fault;
    for (int64_t i = begin; i < end; i++) y[i] = total[i] += x[i];
}

static void copy16(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                   int32_t *restrict fault) {
    (void)dim, (void)fault;
    memcpy((uint16_t *)buf[1] + begin, (const uint16_t *)buf[0] + begin, (size_t)(end - begin) * 2);
}

static void increment(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                      int32_t *restrict fault) {
    const float *x = buf[0];
    float *y = buf[1];
    (void)fault;
    for (int64_t i = begin * dim[0]; i < end * dim[0]; i++) y[i] = x[i] + INCREMENT;
}

static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

TW_API int64_t tw_arena_main(const int64_t *symbols, int64_t *offsets) {
    if (offsets) offsets[0] = 0;
    return round_up(symbols[0] * 16);
}

TW_API int32_t tw_run_main(tw_call *call) {
    int64_t n = call->symbols[0];
    {
        void *const buf[] = {call->inputs[0], (void *)(call->weights + 0), call->arena};
        const int64_t dim[] = {n};
        if (n == 1)
            tw_step(call, 0, 0, one_row, buf, dim, n, n * 64);
        else
            tw_step(call, 0, 1, rows, buf, dim, n, n * 64 * 1000); /* exaggerated, so that small sizes are shared */
    }
    {
        void *const buf[] = {call->arena, (void *)(call->weights + 128), call->inputs[1], call->outputs[0]};
        const int64_t dim[] = {n, 10};
        tw_step(call, 1, 0, add_rows, buf, dim, n, n * 64 * 1000);
    }
    return call->fault;
}

TW_API int64_t tw_arena_count(const int64_t *symbols, int64_t *offsets) {
    (void)symbols, (void)offsets;
    return 0;
}

TW_API int32_t tw_run_count(tw_call *call) {
    void *const buf[] = {call->inputs[0], call->states[0], call->outputs[0]};
    tw_step(call, 0, 0, accumulate, buf, NULL, 4, 4);
    return call->fault;
}

TW_API int64_t tw_arena_half(const int64_t *symbols, int64_t *offsets) {
    (void)symbols, (void)offsets;
    return 0;
}

TW_API int32_t tw_run_half(tw_call *call) {
    void *const buf[] = {call->inputs[0], call->outputs[0]};
    tw_step(call, 0, 0, copy16, buf, NULL, call->symbols[0] * 2, 1);
    return call->fault;
}

TW_API int64_t tw_arena_busy(const int64_t *symbols, int64_t *offsets) {
    int64_t size = round_up(symbols[0] * 64 * 4);
    if (offsets) offsets[0] = 0, offsets[1] = size;
    return 2 * size;
}

TW_API int32_t tw_run_busy(tw_call *call) {
    int64_t n = call->symbols[0];
    char *place[2] = {call->arena, call->arena + round_up(n * 64 * 4)};
    const int64_t dim[] = {64};
    for (int i = 0; i < STEPS; i++) {
        void *const buf[] = {i == 0 ? call->inputs[0] : place[i % 2], i == STEPS - 1 ? call->outputs[0] : place[(i + 1) % 2]};
        tw_step(call, i, 0, increment, buf, dim, n, n * 64 * 1000);
    }
    return call->fault;
}

const char tw_weights_id[65] = WEIGHTS_ID;
const int64_t tw_weights_size = WEIGHTS_SIZE;

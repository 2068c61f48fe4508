/* Times a kernel as a call runs it: shared over the thread pool, its constants read from memory, its other operands and
 * its results from cache, where the steps before have left them. Linked with the kernels that compile --tune measures.
 */
#include "tw_runtime.h"

#include <time.h>

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void read_through(const volatile char *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) (void)from[at];
}

/* Wakes the threads, which in a call have just done the step before: each unit takes 20 microseconds. */
static void wait_a_little(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                          int32_t *restrict fault) {
    (void)buf, (void)dim, (void)fault;
    for (int64_t unit = begin, from = now_ns(); unit < end; unit++, from = now_ns()) {
        while (now_ns() - from < 20000) {
        }
    }
}

/* Nanoseconds for all units. warm: bytes of each operand to read before, 0 for constants; other: memory that is larger
 * than the caches. */
TW_API int64_t tw_tune(tw_pool *pool, int32_t threads, tw_kernel kernel, void *const *buf, int32_t count,
                       const int64_t *warm, const int64_t *dim, int64_t units, int64_t work, const char *other,
                       int64_t other_bytes);
TW_API int64_t tw_tune(tw_pool *pool, int32_t threads, tw_kernel kernel, void *const *buf, int32_t count,
                       const int64_t *warm, const int64_t *dim, int64_t units, int64_t work, const char *other,
                       int64_t other_bytes) {
    tw_call call = {.pool = pool};
    read_through(other, other_bytes);
    for (int32_t i = 0; i < count; i++) read_through(buf[i], warm[i]);
    tw_step(&call, 0, 0, wait_a_little, buf, dim, 8 * threads, (int64_t)1 << 40);
    const int64_t begin = now_ns();
    tw_step(&call, 1, 0, kernel, buf, dim, units, work);
    return now_ns() - begin;
}

/* The thread pool: see tw_runtime.h for what it promises.
 *
 * One job is open at a time. Its life is one 32-bit word, `state`:
 *
 *     bits 0..9 threads at work on it | 10..19 threads it still wants | 20 open | 21 caller sleeps | 22..31 generation
 *
 * A worker joins with a compare-and-swap that takes one of the wanted places, so a job that the caller has finished and
 * closed is never waited for: a worker that wakes late costs nothing. The fields of the job are written only while it is
 * closed and nobody is at work, and the swap that joins (acquire) sees them because opening was a release. A stale
 * compare-and-swap that succeeds after the generation wrapped joins the job that is open now, which is right as well.
 *
 * Units are split into one range per thread, so that a thread touches the same part of the data in every step; a thread
 * that is done with its range takes from the others. What is taken at once is half of what a range has left, down to a
 * small share: few calls of the kernel, and threads end close together also where one is slower than another.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "tw_runtime.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 512
#define SPIN_NS 60000        /* how long a thread without work spins before it sleeps */
#define SPINS_PER_LOOK 32    /* pauses between two looks at the clock */
#define WORK_PER_THREAD 32768 /* bytes + flops below which another thread costs more than it brings */
#define LEAST_SHARE 32 /* of a range's units, one part in so many is taken at least */

#define ACTIVE_ONE 1u
#define ACTIVE_MASK 0x3ffu
#define WANTED_ONE (1u << 10)
#define WANTED_MASK (0x3ffu << 10)
#define OPEN (1u << 20)
#define CALLER_SLEEPS (1u << 21)
#define GENERATION_ONE (1u << 22)
#define GENERATION_MASK (0x3ffu << 22)

#define WAKE_WORKERS 1u
#define WAKE_CALLER 2u

typedef struct {
    _Alignas(64) _Atomic int64_t next;
    int64_t end, least;
} range;

typedef struct {
    tw_pool *pool;
    int index; /* the range that this worker begins with; the caller begins with 0 */
    pthread_t thread;
} worker;

struct tw_pool {
    _Alignas(64) _Atomic uint32_t state;
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic uint32_t stop;
    _Alignas(64) _Atomic uint64_t holder; /* 2 * forks + 1 while a call of this process uses the pool */
    uint64_t forks;                       /* value of fork_count when the workers were started */
    int threads, started;
    worker *workers;
    /* the job */
    _Alignas(64) tw_kernel kernel;
    void *const *buf;
    const int64_t *dim;
    int ranges_used;
    _Atomic int32_t fault;
    range *ranges;
};

const int32_t tw_abi = TW_ABI;

/* How many forks lie between this process and the one that loaded the library (starts at 1, so that 0 means never). */
static _Atomic uint64_t fork_count = 1;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void count_fork(void) { atomic_fetch_add_explicit(&fork_count, 1, memory_order_relaxed); }
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value, uint32_t who) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT_BITSET_PRIVATE, value, NULL, NULL, who);
}

static void futex_wake(_Atomic uint32_t *word, int count, uint32_t who) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE_BITSET_PRIVATE, count, NULL, NULL, who);
}

/* Takes units until none is left, from range `first` on; the units of the job are all taken when it returns. */
static void work_on_job(tw_pool *pool, int first) {
    int32_t fault = 0;
    int count = pool->ranges_used;
    first %= count;
    for (int i = 0; i < count; i++) {
        range *r = &pool->ranges[first + i < count ? first + i : first + i - count];
        int64_t begin = atomic_load_explicit(&r->next, memory_order_relaxed);
        while (begin < r->end) {
            int64_t left = r->end - begin, taken = left / 2 > r->least ? left / 2 : left < r->least ? left : r->least;
            if (!atomic_compare_exchange_weak_explicit(&r->next, &begin, begin + taken, memory_order_relaxed,
                                                       memory_order_relaxed))
                continue;
            pool->kernel(pool->buf, pool->dim, begin, begin + taken, &fault);
            begin = atomic_load_explicit(&r->next, memory_order_relaxed);
        }
    }
    if (fault) atomic_store_explicit(&pool->fault, 1, memory_order_relaxed);
}

/* Joins the open job if it wants another thread: 1 after joining, else 0. */
static int join_job(tw_pool *pool, uint32_t state) {
    while ((state & OPEN) && (state & WANTED_MASK)) {
        if (atomic_compare_exchange_weak_explicit(&pool->state, &state, state - WANTED_ONE + ACTIVE_ONE,
                                                  memory_order_acquire, memory_order_relaxed))
            return 1;
    }
    return 0;
}

static void *worker_main(void *argument) {
    worker *self = argument;
    tw_pool *pool = self->pool;
    int64_t idle_since = 0;
    int spins = 0;
    prctl(PR_SET_NAME, "tilewright");
    for (;;) {
        uint32_t state = atomic_load_explicit(&pool->state, memory_order_relaxed);
        if (join_job(pool, state)) {
            work_on_job(pool, self->index);
            uint32_t before = atomic_fetch_sub_explicit(&pool->state, ACTIVE_ONE, memory_order_release);
            if ((before & CALLER_SLEEPS) && (before & ACTIVE_MASK) == ACTIVE_ONE)
                futex_wake(&pool->state, 1, WAKE_CALLER);
            idle_since = 0;
            spins = 0;
            continue;
        }
        if (atomic_load_explicit(&pool->stop, memory_order_acquire)) return NULL;
        pause_cpu();
        if (++spins < SPINS_PER_LOOK) continue;
        spins = 0;
        int64_t now = now_ns();
        if (!idle_since) idle_since = now;
        if (now - idle_since < SPIN_NS) continue;
        /* Either this thread sees the word that open_job() stores, or open_job() sees this sleeper. */
        atomic_fetch_add(&pool->sleepers, 1);
        state = atomic_load(&pool->state);
        if (!((state & OPEN) && (state & WANTED_MASK)) && !atomic_load(&pool->stop))
            futex_wait(&pool->state, state, WAKE_WORKERS);
        atomic_fetch_sub(&pool->sleepers, 1);
        idle_since = 0;
    }
}

/* Starts the workers of this process; the holder calls it. Fewer than asked for is fine: the caller works too. */
static void start_workers(tw_pool *pool, uint64_t forks) {
    sigset_t all, old;
    atomic_store(&pool->state, 0);
    atomic_store(&pool->sleepers, 0);
    pool->forks = forks;
    pool->started = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 0; i < pool->threads - 1; i++) {
        worker *w = &pool->workers[i];
        w->pool = pool;
        w->index = i + 1;
        if (pthread_create(&w->thread, NULL, worker_main, w)) break;
        pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Takes the pool for one step. A holder from before a fork does not count: its thread is not in this process. */
static int acquire_pool(tw_pool *pool) {
    uint64_t forks = atomic_load_explicit(&fork_count, memory_order_relaxed);
    uint64_t held = 2 * forks + 1;
    uint64_t holder = atomic_load_explicit(&pool->holder, memory_order_relaxed);
    if (holder == held ||
        !atomic_compare_exchange_strong_explicit(&pool->holder, &holder, held, memory_order_acquire, memory_order_relaxed))
        return 0;
    if (pool->forks != forks) start_workers(pool, forks);
    return 1;
}

static void open_job(tw_pool *pool, int64_t units, int threads) {
    int64_t share = units / threads, rest = units % threads, begin = 0;
    for (int i = 0; i < threads; i++) {
        range *r = &pool->ranges[i];
        int64_t count = share + (i < rest);
        r->end = begin + count;
        r->least = (count + LEAST_SHARE - 1) / LEAST_SHARE;
        atomic_store_explicit(&r->next, begin, memory_order_relaxed);
        begin = r->end;
    }
    pool->ranges_used = threads;
    uint32_t generation = (atomic_load_explicit(&pool->state, memory_order_relaxed) + GENERATION_ONE) & GENERATION_MASK;
    atomic_store(&pool->state, generation | OPEN | (uint32_t)(threads - 1) * WANTED_ONE);
    uint32_t sleepers = atomic_load(&pool->sleepers);
    if (sleepers) futex_wake(&pool->state, threads - 1, WAKE_WORKERS);
}

/* Lets nobody join any more and waits for those at work. */
static void close_job(tw_pool *pool) {
    uint32_t state = atomic_fetch_and_explicit(&pool->state, ~(OPEN | WANTED_MASK), memory_order_acquire);
    int64_t since = 0;
    int spins = 0;
    state &= ~(OPEN | WANTED_MASK);
    while (state & ACTIVE_MASK) {
        pause_cpu();
        if (++spins == SPINS_PER_LOOK) {
            spins = 0;
            int64_t now = now_ns();
            if (!since) since = now;
            if (now - since >= SPIN_NS) {
                state = atomic_fetch_or(&pool->state, CALLER_SLEEPS) | CALLER_SLEEPS;
                if (state & ACTIVE_MASK) futex_wait(&pool->state, state, WAKE_CALLER);
            }
        }
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
}

/* Runs the step over the pool; 0 when another call holds it. */
static int run_shared(tw_call *call, tw_kernel kernel, void *const *buf, const int64_t *dim, int64_t units, int threads,
                      int32_t *fault) {
    tw_pool *pool = call->pool;
    if (!acquire_pool(pool)) return 0;
    if (threads > pool->started + 1) threads = pool->started + 1;
    if (threads < 2) {
        kernel(buf, dim, 0, units, fault);
    } else {
        pool->kernel = kernel;
        pool->buf = buf;
        pool->dim = dim;
        atomic_store_explicit(&pool->fault, 0, memory_order_relaxed);
        open_job(pool, units, threads);
        work_on_job(pool, 0);
        close_job(pool);
        *fault = atomic_load_explicit(&pool->fault, memory_order_relaxed);
    }
    atomic_store_explicit(&pool->holder, 0, memory_order_release);
    return 1;
}

void tw_step(tw_call *call, int32_t step, int32_t variant, tw_kernel kernel, void *const *buf, const int64_t *dim,
             int64_t units, int64_t work) {
    if (call->fault) return;
    int64_t begin = call->trace ? now_ns() : 0;
    int32_t fault = 0;
    if (units > 0) {
        int64_t threads = call->pool ? work / WORK_PER_THREAD : 1;
        if (threads > units) threads = units;
        if (call->pool && threads > call->pool->threads) threads = call->pool->threads;
        if (threads < 2 || !run_shared(call, kernel, buf, dim, units, (int)threads, &fault))
            kernel(buf, dim, 0, units, &fault);
    }
    if (fault) call->fault = step + 1;
    if (call->trace) call->trace(call->trace_user, step, variant, begin, now_ns());
}

tw_pool *tw_pool_create(int threads) {
    pthread_once(&fork_once, watch_forks);
    if (threads < 1) threads = 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    tw_pool *pool = aligned_alloc(64, sizeof(tw_pool));
    range *ranges = aligned_alloc(64, sizeof(range) * (size_t)threads);
    worker *workers = calloc((size_t)threads, sizeof(worker));
    if (!pool || !ranges || !workers) {
        free(pool);
        free(ranges);
        free(workers);
        return NULL;
    }
    atomic_init(&pool->state, 0);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->stop, 0);
    atomic_init(&pool->holder, 0);
    atomic_init(&pool->fault, 0);
    for (int i = 0; i < threads; i++) atomic_init(&ranges[i].next, 0);
    pool->forks = 0;
    pool->threads = threads;
    pool->started = 0;
    pool->workers = workers;
    pool->ranges = ranges;
    return pool;
}

void tw_pool_destroy(tw_pool *pool) {
    if (!pool) return;
    if (pool->forks == atomic_load_explicit(&fork_count, memory_order_relaxed)) {
        atomic_store(&pool->stop, 1);
        /* a change of the word, so that a worker about to sleep on it does not */
        atomic_fetch_add(&pool->state, GENERATION_ONE);
        futex_wake(&pool->state, MAX_THREADS, WAKE_WORKERS);
        for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    }
    free(pool->workers);
    free(pool->ranges);
    free(pool);
}

void tw_trace_record(void *user, int32_t step, int32_t variant, int64_t begin_ns, int64_t end_ns) {
    tw_records *records = user;
    int64_t index = records->count++;
    if (index < records->capacity) records->items[index] = (tw_record){step, variant, begin_ns, end_ns};
}

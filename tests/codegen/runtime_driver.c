/* Drives the thread pool from C, for sanitizers and for measuring.
 *
 * usage: runtime_driver check THREADS ROUNDS     every unit is done exactly once, from several callers and after forks
 *        runtime_driver overhead THREADS STEPS   prints nanoseconds per step that does (almost) nothing
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tw_runtime.h"

#define UNITS 1000
#define CALLERS 3

static tw_pool *pool;
static int rounds;

static void count_units(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                        int32_t *restrict fault) {
    int32_t *counts = buf[0];
    for (int64_t i = begin; i < end; i++) {
        counts[i]++;
        if (i == dim[0]) *fault = 1;
    }
}

static void nothing(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                    int32_t *restrict fault) {
    (void)buf, (void)dim, (void)begin, (void)end, (void)fault;
}

static int check_caller(unsigned seed) {
    static const int64_t works[] = {0, 40000, 100000, 1000000};
    int32_t counts[UNITS];
    for (int round = 0; round < rounds; round++) {
        tw_call call = {.pool = pool};
        int64_t units = rand_r(&seed) % (UNITS + 1);
        int64_t bad = rand_r(&seed) % 4 ? -1 : rand_r(&seed) % UNITS;
        void *const buf[] = {counts};
        const int64_t dim[] = {bad};
        memset(counts, 0, sizeof counts);
        tw_step(&call, 4, 0, count_units, buf, dim, units, works[rand_r(&seed) % 4]);
        for (int i = 0; i < UNITS; i++)
            if (counts[i] != (i < units)) {
                fprintf(stderr, "round %d: unit %d of %lld was done %d times\n", round, i, (long long)units, counts[i]);
                return 1;
            }
        if (call.fault != (bad >= 0 && bad < units ? 5 : 0)) {
            fprintf(stderr, "round %d: fault %d\n", round, call.fault);
            return 1;
        }
        if (call.fault) { /* what comes after a fault is skipped */
            tw_step(&call, 5, 0, count_units, buf, dim, units, 1);
            if (call.fault != 5 || counts[0] != 1) return 1;
        }
        if (rand_r(&seed) % 64 == 0) usleep(200); /* let the workers go to sleep now and then */
    }
    return 0;
}

static void *caller_main(void *seed) { return (void *)(intptr_t)check_caller((unsigned)(intptr_t)seed); }

static int check(void) {
    pthread_t callers[CALLERS];
    intptr_t bad = 0;
    for (int i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, caller_main, (void *)(intptr_t)(i + 1));
#ifndef NO_FORK
    for (int i = 0; i < 3; i++) { /* while the callers are inside steps */
        pid_t child = fork();
        if (child == 0) {
            alarm(60);
            rounds = rounds / 10 + 1;
            int wrong = check_caller(99);
            tw_pool_destroy(pool);
            _exit(wrong);
        }
        int status;
        waitpid(child, &status, 0);
        if (status) {
            fprintf(stderr, "child %d ended with status %d\n", i, status);
            bad = 1;
        }
    }
#endif
    for (int i = 0; i < CALLERS; i++) {
        void *result;
        pthread_join(callers[i], &result);
        bad |= (intptr_t)result;
    }
    return (int)bad;
}

static void overhead(int64_t steps) {
    struct timespec begin, end;
    tw_call call = {.pool = pool};
    for (int phase = 0; phase < 2; phase++) { /* the first one warms up */
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int64_t i = 0; i < steps; i++) tw_step(&call, 0, 0, nothing, NULL, NULL, 8, 1 << 20);
        clock_gettime(CLOCK_MONOTONIC, &end);
    }
    printf("%.1f\n", ((double)(end.tv_sec - begin.tv_sec) * 1e9 + (double)(end.tv_nsec - begin.tv_nsec)) / (double)steps);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    int threads = atoi(argv[2]);
    rounds = atoi(argv[3]);
    int bad = 0;
    for (int i = 0; i < 2; i++) { /* a second pool after the first one is gone */
        pool = tw_pool_create(threads);
        if (!pool) return 3;
        if (!strcmp(argv[1], "check"))
            bad |= check();
        else if (i == 1)
            overhead(rounds);
        tw_pool_destroy(pool);
    }
    return bad;
}

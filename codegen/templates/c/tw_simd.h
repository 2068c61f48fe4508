/* Vectors and the register-blocked product that matrix kernels are built from.
 *
 * One source serves every instruction set: GNU vector types as wide as the target's registers, TW_MR rows of a product
 * kept in registers at once. Weights are packed in panels of TW_PANEL columns on every target of an artifact, so that one
 * copy serves all. Accumulators are named variables (macros repeat the statements): both GCC and clang then keep them in registers,
 * which they do not promise for arrays.
 *
 * Every product adds its terms one after another along k, one fused multiply-add each. Neither the number of rows
 * computed together nor a pause between two blocks of k changes a result by a bit.
 */
#ifndef TW_SIMD_H
#define TW_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define TW_LANES 16 /* floats in a vector */
#define TW_MR 12    /* rows in registers: 12 x 2 accumulators, 2 vectors of B, 1 broadcast of A, of 32 registers */
#else
#define TW_LANES 8
#define TW_MR 6 /* 6 x 2 accumulators, 2 vectors of B, 1 broadcast of A, of 16 registers */
#endif
#if !defined(TW_PANEL)
#define TW_PANEL 32 /* columns of B that are packed together; 16 where a vector is half as wide */
#endif
#define TW_ALIGNED __attribute__((aligned(64)))

typedef float tw_vec __attribute__((vector_size(TW_LANES * 4)));
typedef float tw_vec_anywhere __attribute__((vector_size(TW_LANES * 4), aligned(4), may_alias));

static inline tw_vec tw_load(const float *p) { return *(const tw_vec_anywhere *)p; }
static inline void tw_store(float *p, tw_vec v) { *(tw_vec_anywhere *)p = v; }
static inline int64_t tw_smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t tw_larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t tw_ceildiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A loop count that clang may not know: it would unroll a constant short loop first, and then vectorise the loop around
 * it with gathers and scatters. GCC does best when it knows. */
static inline int64_t tw_loop_count(int64_t count) {
#if defined(__clang__)
    __asm__("" : "+r"(count));
#endif
    return count;
}

#define TW_REPEAT_1(X) X(0)
#define TW_REPEAT_2(X) TW_REPEAT_1(X) X(1)
#define TW_REPEAT_3(X) TW_REPEAT_2(X) X(2)
#define TW_REPEAT_4(X) TW_REPEAT_3(X) X(3)
#define TW_REPEAT_5(X) TW_REPEAT_4(X) X(4)
#define TW_REPEAT_6(X) TW_REPEAT_5(X) X(5)
#define TW_REPEAT_7(X) TW_REPEAT_6(X) X(6)
#define TW_REPEAT_8(X) TW_REPEAT_7(X) X(7)
#define TW_REPEAT_9(X) TW_REPEAT_8(X) X(8)
#define TW_REPEAT_10(X) TW_REPEAT_9(X) X(9)
#define TW_REPEAT_11(X) TW_REPEAT_10(X) X(10)
#define TW_REPEAT_12(X) TW_REPEAT_11(X) X(11)

/* Instantiate X(rows) for 1..TW_MR, and call the function for a number of rows known at run time. */
#define TW_CASE(function, rows, ...) \
    case rows: function##rows(__VA_ARGS__); break;
#if TW_MR == 12
#define TW_FOR_EACH_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define TW_SWITCH_ROWS(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) TW_CASE(function, 3, __VA_ARGS__) \
        TW_CASE(function, 4, __VA_ARGS__) TW_CASE(function, 5, __VA_ARGS__) TW_CASE(function, 6, __VA_ARGS__) \
        TW_CASE(function, 7, __VA_ARGS__) TW_CASE(function, 8, __VA_ARGS__) TW_CASE(function, 9, __VA_ARGS__) \
        TW_CASE(function, 10, __VA_ARGS__) TW_CASE(function, 11, __VA_ARGS__) TW_CASE(function, 12, __VA_ARGS__) \
    }
#else
#define TW_FOR_EACH_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define TW_SWITCH_ROWS(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) TW_CASE(function, 3, __VA_ARGS__) \
        TW_CASE(function, 4, __VA_ARGS__) TW_CASE(function, 5, __VA_ARGS__) TW_CASE(function, 6, __VA_ARGS__) \
    }
#endif

/* Accumulators x_r and y_r of row r: two vectors side by side, against the vectors b0 and b1 of B. */
#define TW_ZERO(r) tw_vec x##r = {0}, y##r = {0};
#define TW_RESUME(r) x##r = tw_load(sums + r * TW_PANEL), y##r = tw_load(sums + r * TW_PANEL + TW_LANES);
#define TW_STEP(r) x##r += a##r[k] * b0, y##r += a##r[k] * b1;
#define TW_FINISH(r) tw_store(sums + r * TW_PANEL, x##r), tw_store(sums + r * TW_PANEL + TW_LANES, y##r);

/* The same for a panel of which only the first TW_LANES columns are wanted. */
#define TW_ZERO_narrow(r) tw_vec x##r = {0};
#define TW_RESUME_narrow(r) x##r = tw_load(sums + r * TW_PANEL);
#define TW_STEP_narrow(r) x##r += a##r[k] * b0;
#define TW_FINISH_narrow(r) tw_store(sums + r * TW_PANEL, x##r);

/* All columns of a panel of four vectors: accumulators w_r to z_r of row r. With 16 registers, 3 rows of them take 7
 * loads for 12 multiply-adds, and 6 rows of half a panel 8. The fewer loads and other instructions a multiply-add has,
 * the less it matters that the other hardware thread of the core has work, too. */
#define TW_ZERO_WIDE(r) tw_vec w##r = {0}, x##r = {0}, y##r = {0}, z##r = {0};
#define TW_RESUME_WIDE(r) \
    w##r = tw_load(sums + r * TW_PANEL), x##r = tw_load(sums + r * TW_PANEL + 8); \
    y##r = tw_load(sums + r * TW_PANEL + 16), z##r = tw_load(sums + r * TW_PANEL + 24);
#define TW_FINISH_WIDE(r) \
    tw_store(sums + r * TW_PANEL, w##r), tw_store(sums + r * TW_PANEL + 8, x##r); \
    tw_store(sums + r * TW_PANEL + 16, y##r), tw_store(sums + r * TW_PANEL + 24, z##r);
#define TW_SPREAD(r) const tw_vec c##r = a##r[k] - (tw_vec){0};
#define TW_STEP_w(r) w##r += c##r * b0;
#define TW_STEP_x(r) x##r += c##r * b1;
#define TW_STEP_y(r) y##r += c##r * b2;
#define TW_STEP_z(r) z##r += c##r * b3;
#define TW_STEPS_WIDE(ROWS) /* one vector of the panel after another is multiplied by all rows */ \
    { \
        TW_REPEAT_##ROWS(TW_SPREAD) \
        const tw_vec b0 = tw_load(b); \
        TW_REPEAT_##ROWS(TW_STEP_w) \
        const tw_vec b1 = tw_load(b + 8); \
        TW_REPEAT_##ROWS(TW_STEP_x) \
        const tw_vec b2 = tw_load(b + 16); \
        TW_REPEAT_##ROWS(TW_STEP_y) \
        const tw_vec b3 = tw_load(b + 24); \
        TW_REPEAT_##ROWS(TW_STEP_z) \
    }

/* sums[r][0..TW_PANEL) (+)= sum over k < depth of a[r*stride + k] * b[k*TW_PANEL + ...]; resume: continue what is there.
 * `ahead` is memory that will be read soon; some of it is fetched into the second-level cache. */
#define TW_ROW_POINTER(r) const float *const a##r = a + r * stride;
#if TW_LANES * 2 < TW_PANEL
#define TW_TILE_ROWS 3 /* rows of a tile of float32 */
#define TW_NEXT_STEPS_WIDE(ROWS) TW_STEPS_WIDE(ROWS) k++, b += TW_PANEL;
#define TW_DEFINE_PRODUCT(ROWS) \
    static __attribute__((unused, noinline)) void tw_product_##ROWS( \
        const float *a, int64_t stride, const float *b, int64_t depth, float *sums, int resume, const char *ahead) { \
        TW_REPEAT_##ROWS(TW_ROW_POINTER) \
        TW_REPEAT_##ROWS(TW_ZERO_WIDE) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME_WIDE) } \
        int64_t k = 0; \
        for (int64_t left = depth / 4; left > 0; left--, ahead += 64) { \
            __builtin_prefetch(ahead, 0, 2); \
            TW_NEXT_STEPS_WIDE(ROWS) TW_NEXT_STEPS_WIDE(ROWS) TW_NEXT_STEPS_WIDE(ROWS) TW_NEXT_STEPS_WIDE(ROWS) \
        } \
        if (depth & 2) { TW_NEXT_STEPS_WIDE(ROWS) TW_NEXT_STEPS_WIDE(ROWS) } \
        if (depth & 1) { TW_NEXT_STEPS_WIDE(ROWS) } \
        TW_REPEAT_##ROWS(TW_FINISH_WIDE) \
    }
TW_DEFINE_PRODUCT(1)
TW_DEFINE_PRODUCT(2)
TW_DEFINE_PRODUCT(3)
#define TW_SWITCH_FLOATS(function, rows, ...) \
    switch (rows) { \
        TW_CASE(function, 1, __VA_ARGS__) TW_CASE(function, 2, __VA_ARGS__) TW_CASE(function, 3, __VA_ARGS__) \
    }
#else
#define TW_TILE_ROWS TW_MR
#define TW_DEFINE_PRODUCT(ROWS) \
    static __attribute__((unused, noinline)) void tw_product_##ROWS( \
        const float *a, int64_t stride, const float *b, int64_t depth, float *sums, int resume, const char *ahead) { \
        (void)ahead; \
        TW_REPEAT_##ROWS(TW_ROW_POINTER) \
        TW_REPEAT_##ROWS(TW_ZERO) \
        if (resume) { TW_REPEAT_##ROWS(TW_RESUME) } \
        for (int64_t k = 0; k < depth; k++, b += TW_PANEL) { \
            const tw_vec b0 = tw_load(b), b1 = tw_load(b + TW_LANES); \
            TW_REPEAT_##ROWS(TW_STEP) \
        } \
        TW_REPEAT_##ROWS(TW_FINISH) \
    }
TW_FOR_EACH_ROWS(TW_DEFINE_PRODUCT)
#define TW_SWITCH_FLOATS TW_SWITCH_ROWS
#endif

/* sums[rows][TW_PANEL] (+)= a[rows][depth] * b[depth][TW_PANEL] for any number of rows, which are `stride` floats apart,
 * cut into near-equal tiles of at most TW_TILE_ROWS. */
static inline void tw_product_rows_ahead(
    int64_t rows, const float *a, int64_t stride, const float *b, int64_t depth, float *sums, int resume,
    const char *ahead) {
    const int64_t tiles = tw_ceildiv(rows, TW_TILE_ROWS);
    for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t next = rows * (t + 1) / tiles;
        TW_SWITCH_FLOATS(
            tw_product_, next - row, a + row * stride, stride, b, depth, sums + row * TW_PANEL, resume, ahead)
        row = next;
    }
}

/* The same where what comes next is not known, or in cache. */
static inline void tw_product_rows(
    int64_t rows, const float *a, int64_t stride, const float *b, int64_t depth, float *sums, int resume) {
    tw_product_rows_ahead(rows, a, stride, b, depth, sums, resume, (const char *)b);
}

#endif

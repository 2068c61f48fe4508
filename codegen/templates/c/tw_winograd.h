/* Winograd's minimal filtering of 3x3 windows: the transforms of images and sums, and the products between them.
 *
 * A tile of T x T outputs (T is 4 or 2) is computed from T+2 x T+2 inputs d and a filter g by
 *
 *     y = A' [ (G g G') . (B' d B) ] A        (Lavin and Gray 2015, equation 8; ' transposes, . is by element)
 *
 * with (T+2)^2 multiplications where direct convolution has 9 T^2: 36 for 144, or 16 for 36. The matrices follow from
 * polynomials (Toom and Cook) through the points 0, p, -p, q, -q and infinity for T = 4, and 0, 1, -1 and infinity for
 * T = 2. Lavin and Gray take 1 and 2 for p and q. 2/3 and 3/2 cost as much and lose about a fifth of the digits that
 * those lose: their powers lie close to 1, and the product of their squares is 1. Filters are transformed when the
 * artifact is written (codegen/c/winograd_matrices.py).
 *
 * Each function handles vectors of channels; sums over input channels run in the order of channels.
 */
#ifndef TW_WINOGRAD_H
#define TW_WINOGRAD_H

#include "tw_convolution.h"

#define TW_P (2.0f / 3.0f)
#define TW_Q (3.0f / 2.0f)
#define TW_P2 (4.0f / 9.0f)
#define TW_Q2 (9.0f / 4.0f)
#define TW_P3 (8.0f / 27.0f)
#define TW_Q3 (27.0f / 8.0f)
#define TW_PQ2 (97.0f / 36.0f) /* p^2 + q^2 */

/* B' times six vectors that lie `from_step` apart. */
static inline void tw_winograd_in_4(const float *from, int64_t from_step, float *to, int64_t to_step) {
    const tw_vec d0 = tw_load(from), d1 = tw_load(from + from_step), d2 = tw_load(from + 2 * from_step);
    const tw_vec d3 = tw_load(from + 3 * from_step), d4 = tw_load(from + 4 * from_step);
    const tw_vec d5 = tw_load(from + 5 * from_step);
    const tw_vec even_p = d4 - TW_Q2 * d2, odd_p = d3 - TW_Q2 * d1;
    const tw_vec even_q = d4 - TW_P2 * d2, odd_q = d3 - TW_P2 * d1;
    tw_store(to, (d0 + d4) - TW_PQ2 * d2);
    tw_store(to + to_step, even_p + TW_P * odd_p);
    tw_store(to + 2 * to_step, even_p - TW_P * odd_p);
    tw_store(to + 3 * to_step, even_q + TW_Q * odd_q);
    tw_store(to + 4 * to_step, even_q - TW_Q * odd_q);
    tw_store(to + 5 * to_step, (d1 + d5) - TW_PQ2 * d3);
}

/* A' times six vectors. */
static inline void tw_winograd_out_4(const float *from, int64_t from_step, float *to, int64_t to_step) {
    const tw_vec m0 = tw_load(from), m1 = tw_load(from + from_step), m2 = tw_load(from + 2 * from_step);
    const tw_vec m3 = tw_load(from + 3 * from_step), m4 = tw_load(from + 4 * from_step);
    const tw_vec m5 = tw_load(from + 5 * from_step);
    const tw_vec even_p = m1 + m2, odd_p = m1 - m2, even_q = m3 + m4, odd_q = m3 - m4;
    tw_store(to, m0 + (even_p + even_q));
    tw_store(to + to_step, TW_P * odd_p + TW_Q * odd_q);
    tw_store(to + 2 * to_step, TW_P2 * even_p + TW_Q2 * even_q);
    tw_store(to + 3 * to_step, (m5 + TW_P3 * odd_p) + TW_Q3 * odd_q);
}

/* The same for T = 2: four vectors each. */
static inline void tw_winograd_in_2(const float *from, int64_t from_step, float *to, int64_t to_step) {
    const tw_vec d0 = tw_load(from), d1 = tw_load(from + from_step);
    const tw_vec d2 = tw_load(from + 2 * from_step), d3 = tw_load(from + 3 * from_step);
    tw_store(to, d2 - d0);
    tw_store(to + to_step, d2 + d1);
    tw_store(to + 2 * to_step, d2 - d1);
    tw_store(to + 3 * to_step, d3 - d1);
}

static inline void tw_winograd_out_2(const float *from, int64_t from_step, float *to, int64_t to_step) {
    const tw_vec m0 = tw_load(from), m1 = tw_load(from + from_step);
    const tw_vec m2 = tw_load(from + 2 * from_step), m3 = tw_load(from + 3 * from_step);
    tw_store(to, m0 + (m1 + m2));
    tw_store(to + to_step, (m1 - m2) + m3);
}

/* Both dimensions, for 16 channels: columns into a square that stays in the first cache, then its rows.
 *
 * input: from[i*row + j*16 + lane], i, j < T+2, to to[(i*(T+2) + j)*step + lane].
 * output: from[(i*(T+2) + j)*step + lane] to to[(i*T + j)*16 + lane], i, j < T.
 */
#define TW_DEFINE_WINOGRAD(T, S) \
    static __attribute__((unused, noinline)) void tw_winograd_input_##T( \
        const float *from, int64_t row, float *to, int64_t step) { \
        float square[S * S * TW_LANES] TW_ALIGNED; \
        for (int64_t lane = 0; lane < 16; lane += TW_LANES) { \
            for (int64_t j = 0; j < S; j++) { \
                tw_winograd_in_##T(from + j * 16 + lane, row, square + j * TW_LANES, S * TW_LANES); \
            } \
            for (int64_t i = 0; i < S; i++) { \
                tw_winograd_in_##T(square + i * S * TW_LANES, TW_LANES, to + i * S * step + lane, step); \
            } \
        } \
    } \
    static __attribute__((unused, noinline)) void tw_winograd_output_##T( \
        const float *from, int64_t step, float *to) { \
        float square[T * S * TW_LANES] TW_ALIGNED; \
        for (int64_t lane = 0; lane < 16; lane += TW_LANES) { \
            for (int64_t j = 0; j < S; j++) { \
                tw_winograd_out_##T(from + j * step + lane, S * step, square + j * TW_LANES, S * TW_LANES); \
            } \
            for (int64_t i = 0; i < T; i++) { \
                tw_winograd_out_##T(square + i * S * TW_LANES, TW_LANES, to + i * T * 16 + lane, 16); \
            } \
        } \
    }
TW_DEFINE_WINOGRAD(4, 6)
TW_DEFINE_WINOGRAD(2, 4)

/* Copies size x size pixels of 16 channels from the plane of h x w, zeros where (y + i, x + j) lies outside. */
static __attribute__((unused, noinline)) void tw_winograd_border(
    const float *plane, int64_t h, int64_t w, int64_t y, int64_t x, int64_t size, float *to) {
    for (int64_t i = 0; i < size; i++) {
        for (int64_t j = 0; j < size; j++, to += 16) {
            if (y + i >= 0 && y + i < h && x + j >= 0 && x + j < w) {
                memcpy(to, plane + ((y + i) * w + x + j) * 16, 64);
            } else {
                memset(to, 0, 64);
            }
        }
    }
}

/* sums[rows][32] = a times b, any number of rows, of which at least the first `columns` of 32 are computed: rows are 16
 * floats apart in each of `blocks` blocks of 16 channels, which are `plane` floats apart; the last block has `last`
 * channels. b is packed [channels][32]. For the sums a point of a tile is a pixel of a kernel of one tap. */
TW_POINTWISE(f32)

static inline void tw_winograd_product(
    int64_t rows, int64_t columns, const float *a, int64_t plane, int64_t blocks, int64_t last, const float *b,
    float *sums) {
    enum { MOST = TW_LANES * 2 < TW_PANEL ? TW_MR / 2 : TW_MR }; /* of 32 columns */
    tw_kernel_window window = {.image = a, .plane = plane, .blocks = blocks, .last = last, .kh = 1, .kw = 1};
    const float *const next_point = b + ((blocks - 1) * 16 + last) * TW_PANEL;
    const int64_t tiles = tw_ceildiv(rows, columns > 16 ? MOST : TW_MR);
    tw_fetch_ahead(&window, (next_point - b) * 4, rows);
    for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t next = rows * (t + 1) / tiles;
        window.ahead = (const char *)next_point + row * window.share;
        tw_pointwise_f32(next - row, columns, &window, row, b, sums + row * TW_PANEL, 0);
        row = next;
    }
}

#endif

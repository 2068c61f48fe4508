#include "tw_math.h"
#define TW_PANEL 32
#include "tw_simd.h"

void matmul_linear_relu_add_batchx8(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    const float *restrict x1 = buf[1];
    const float *restrict x2 = buf[2];
    const float *restrict x3 = buf[3];
    float *restrict y0 = buf[4];
    const int64_t n_batch = dim[0];
    (void)n_batch;
    enum { TW_DEPTH = 6, TW_GROUP = 1 };
    enum { TW_BLOCK = 48, TW_PER_WORD = 1 };
    /* Rows a multiple of 4 KB apart share a set of the first-level cache, which holds 8 lines. */
    enum { TW_TILE = 6 % 1024 == 0 && TW_MR > 8 ? 8 : TW_MR };
    /* Sums of a row tile are kept, or of a whole block, if they wait for the rest of k. */
    enum { TW_ONCE = 6 <= TW_DEPTH * TW_PER_WORD, TW_KEPT = TW_ONCE ? TW_TILE : TW_BLOCK };
    const int64_t tw_m = (n_batch), tw_n = 8, tw_k = 6, tw_words = tw_ceildiv(tw_k, TW_PER_WORD);
    const int64_t tw_panels = tw_ceildiv(tw_n, TW_PANEL), tw_blocks = tw_ceildiv(tw_m, TW_BLOCK);
    float tw_tile[TW_GROUP * TW_KEPT * TW_PANEL] TW_ALIGNED;
    (void)buf, (void)dim, (void)fault;

    for (int64_t tw_unit = begin, tw_run; tw_unit < end; tw_unit += tw_run) {
        /* The run: units of one batch entry, one group of panels and one block of rows. */
        const int64_t b = tw_unit / (tw_panels * tw_blocks), tw_within = tw_unit % (tw_panels * tw_blocks);
        (void)b;
        const int64_t tw_group = tw_within / (TW_GROUP * tw_blocks) * TW_GROUP;
        const int64_t tw_width = tw_smaller(TW_GROUP, tw_panels - tw_group);
        const int64_t tw_block = (tw_within - tw_group * tw_blocks) / tw_width;
        const int64_t tw_first = tw_group + (tw_within - tw_group * tw_blocks) % tw_width;
        tw_run = tw_smaller(tw_group + tw_width - tw_first, end - tw_unit);
        const int64_t tw_top = tw_m * tw_block / tw_blocks, tw_rows = tw_m * (tw_block + 1) / tw_blocks - tw_top;

        for (int64_t tw_k0 = 0; tw_k0 == 0 || tw_k0 < tw_words; tw_k0 += TW_DEPTH) {
            const int64_t tw_depth = tw_smaller(TW_DEPTH, tw_words - tw_k0);
            const int64_t tw_stride = (6) / TW_PER_WORD;
            const float *const tw_rows_of_a = (const float *)(x0 + 0) + tw_top * tw_stride + tw_k0;
            const float *const tw_panels_of_b =
                (const float *)(x3) + (tw_first * tw_words + tw_k0) * TW_PANEL;
            const int64_t tw_next_panel = tw_words * TW_PANEL;
            /* A row tile at a time: its rows stay in the first-level cache for all panels, its sums for the epilogue, and
               its stores drain while the next tile is multiplied. */
            const int64_t tw_tiles = tw_ceildiv(tw_rows, TW_TILE);
            for (int64_t tw_at = 0, tw_row = 0; tw_at < tw_tiles; tw_at++) {
                const int64_t tw_end = tw_rows * (tw_at + 1) / tw_tiles;
                const int64_t tw_kept = TW_ONCE ? 0 : tw_row;
                for (int64_t tw_panel = 0; tw_panel < tw_run; tw_panel++) {
                    tw_product_rows(tw_end - tw_row, tw_rows_of_a + tw_row * tw_stride, tw_stride,
                        tw_panels_of_b + tw_panel * tw_next_panel, tw_depth,
                        tw_tile + (tw_panel * TW_KEPT + tw_kept) * TW_PANEL, tw_k0 > 0);
                }
                for (int64_t m = tw_top + tw_row; m < tw_top + tw_end && tw_k0 + TW_DEPTH >= tw_words; m++) {
                    
                    for (int64_t tw_panel = 0; tw_panel < tw_run; tw_panel++) {
                        const int64_t tw_left = (tw_first + tw_panel) * TW_PANEL;
                        const int64_t tw_right = tw_smaller(tw_left + TW_PANEL, tw_n);
                        const float *const tw_sums =
                            tw_tile + (tw_panel * TW_KEPT + tw_kept + m - tw_top - tw_row) * TW_PANEL;
#pragma omp simd
                        for (int64_t n = tw_left; n < tw_right; n++) {
                            const float acc = tw_sums[n - tw_left];
                            const float t0 = x1[n];
                            const float t1 = acc + t0;
                            const float t2 = (t1 <= 0.0f) ? 0.0f : t1;
                            const float t3 = x2[n + (m * 8)];
                            const float t4 = t2 + t3;
                            y0[n + (m * 8)] = t4;
                        }
                    }
                }
                tw_row = tw_end;
            }
        }
    }
}

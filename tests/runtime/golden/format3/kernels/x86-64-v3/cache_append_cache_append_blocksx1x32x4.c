#include "tw_math.h"
#include "tw_simd.h"
#include "tw_paged.h"

void cache_append_cache_append_blocksx1x32x4(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,
                int32_t *restrict fault) {
    const float *restrict x0 = buf[0];
    const int32_t *restrict x1 = buf[1];
    const int32_t *restrict x2 = buf[2];
    const int32_t *restrict x3 = buf[3];
    float *restrict y0 = buf[4];
    const int64_t n_tokens = dim[0];
    const int64_t n_sequences = dim[1];
    const int64_t n_width = dim[2];
    const int64_t n_blocks = dim[3];
    (void)n_tokens;
    (void)n_sequences;
    (void)n_width;
    (void)n_blocks;
    enum { TW_D = 4, TW_TILE = 16, TW_STEP = 1 };
    const int64_t tw_tokens = (n_tokens), tw_heads = 1, tw_tiles = tw_ceildiv(tw_tokens, TW_TILE);
    const int64_t tw_sequences = (n_sequences), tw_width = (n_width), tw_blocks = (n_blocks);
    (void)dim;
    if (!tw_is_partition(x2, tw_sequences, tw_tokens, fault)) {
        return;
    }
    for (int64_t tw_unit = begin; tw_unit < end; tw_unit++) {
        const int64_t h = tw_unit / tw_tiles, tw_first = tw_unit % tw_tiles * TW_TILE;
        const int64_t tw_last = tw_smaller(tw_first + TW_TILE, x2[tw_sequences]);
        for (int64_t t = tw_first; t < tw_last; t++) {
            const int64_t tw_sequence = tw_sequence_of(x2, tw_sequences, t);
            const int64_t tw_position = x1[t];
            const int64_t tw_block = tw_block_of(
                x3 + tw_sequence * tw_width, tw_width, tw_blocks, tw_position, fault);
            if (tw_block < 0) {
                continue;
            }
            float *restrict const tw_to = y0
                + (tw_block * tw_heads + h) * (TW_D * TW_BLOCK)
                + tw_position % TW_BLOCK * TW_D;
            {
                
#pragma omp simd
                for (int64_t d = 0; d < 4; d++) {
                    const float t0 = x0[d + (h * 4) + (t * 4)];
                    const float element = t0;
                    tw_to[(0 + d) * TW_STEP] = element;
                }
            }
        }
    }
}

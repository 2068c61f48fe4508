/* Where the tokens of a step lie in a paged cache of keys or values.
 *
 * Tokens starts[s] .. starts[s + 1] - 1 are those of sequence s; its position p lies in block table[s][p / 32], place
 * p % 32. Tokens from starts[sequences] on are padding. All numbers come from the caller of the model and are checked.
 */
#ifndef TW_PAGED_H
#define TW_PAGED_H

#include <stdint.h>

enum { TW_BLOCK = 32 }; /* positions in a block */

static inline void tw_set_fault(int32_t *fault) { __atomic_store_n(fault, 1, __ATOMIC_RELAXED); }

/* Whether `starts` cuts the first tokens of a step into sequences; a fault if it does not. */
static inline int tw_is_partition(const int32_t *starts, int64_t sequences, int64_t tokens, int32_t *fault) {
    int good = starts[0] == 0 && starts[sequences] <= tokens;
    for (int64_t s = 0; s < sequences; s++) {
        good &= starts[s] <= starts[s + 1];
    }
    if (!good) {
        tw_set_fault(fault);
    }
    return good;
}

/* The sequence of a token that is no padding: the last s < sequences with starts[s] <= token. */
static inline int64_t tw_sequence_of(const int32_t *starts, int64_t sequences, int64_t token) {
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (starts[middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* The block of a position, from its sequence's row of the table; -1 and a fault if there is none. */
static inline int64_t tw_block_of(
    const int32_t *row, int64_t width, int64_t blocks, int64_t position, int32_t *fault) {
    if (position >= 0 && position / TW_BLOCK < width) {
        const int64_t block = row[position / TW_BLOCK];
        if (block >= 0 && block < blocks) {
            return block;
        }
    }
    tw_set_fault(fault);
    return -1;
}

#endif

import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def cache_append_cache_append_blocksx1x32x4(y0, x0, x1, x2, x3, fault, n_tokens, n_sequences, n_width, n_blocks):
    program = tl.cast(tl.program_id(0), tl.int32)
    t = program // 1
    h = program % 1
    d = tl.arange(0, 16)
    s = tl.cast(0, tl.int32)
    wrong = tl.load(x2) != 0
    for chunk in range(0, n_sequences, 64):
        number = chunk + tl.arange(0, 64)
        within = number < n_sequences
        begins = tl.load(x2 + number, mask=within, other=0)
        ends = tl.load(x2 + number + 1, mask=within, other=2147483647)
        wrong = wrong | (tl.max(tl.cast(begins > ends, tl.int32), 0) != 0)
        s += tl.sum(tl.cast(ends <= t, tl.int32), 0)
    used = tl.load(x2 + n_sequences)
    wrong = wrong | (used > n_tokens)
    tl.store(fault, 1, mask=wrong)
    live = (t < used) & (wrong == 0)
    position = tl.load(x1 + t)
    wanted = live & (position >= 0)
    tl.store(fault, 1, mask=live & (position < 0))
    column = position // 32
    place = position % 32
    block = tl.load(x3 + s * n_width + column, mask=wanted & (column >= 0) & (column < n_width), other=-1)
    known = (block >= 0) & (block < n_blocks)
    tl.store(fault, 1, mask=wanted & (known == 0))
    block = tl.cast(tl.where(known, block, 0), tl.int32)
    t1_0 = tl.load(x0 + (d + (h * 4) + (t * 4)), mask=d < 4, other=0.0)
    row = t1_0
    cell = (block * 1 + h) * 128
    cell += place * 4 + d
    tl.store(y0 + cell, row, mask=(d < 4) & known & wanted)

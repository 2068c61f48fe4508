import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def loop_sum_4(y0, x0, n_blocks, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    x = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    in_x = x < 4
    a0 = tl.full((XBLOCK, RBLOCK), 0.0, tl.float32)
    for start1 in range(0, (n_blocks * 32), RBLOCK):
        p2 = start1 + tl.arange(0, RBLOCK)[None, :]
        in3 = p2 < (n_blocks * 32)
        t4 = tl.load(x0 + (x + (p2 * 4)), mask=in_x & in3, other=0.0)
        a0 = a0 + tl.where(in3, t4, 0.0)
    r5 = tw.reduce_sum(a0)
    tl.store(y0 + (x), r5, mask=in_x)

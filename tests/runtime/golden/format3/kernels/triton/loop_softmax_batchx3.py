import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def loop_softmax_batchx3(y0, x0, n_batch, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    x = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    in_x = x < n_batch
    r = tl.arange(0, RBLOCK)[None, :]
    in_r = r < 3
    t0 = tl.load(x0 + (r + (x * 3)), mask=in_x & in_r, other=0.0)
    t2 = tl.where(in_r, tl.broadcast_to(t0, (XBLOCK, RBLOCK)), float("-inf"))
    r1 = tw.reduce_max(t2)
    t3 = t0 - r1
    t4 = tw.exp(t3)
    t6 = tl.where(in_r, tl.broadcast_to(t4, (XBLOCK, RBLOCK)), 0.0)
    r5 = tw.reduce_sum(t6)
    t7 = 1.0 / r5
    t8 = t4 * t7
    tl.store(y0 + (r + (x * 3)), t8, mask=in_x & in_r)

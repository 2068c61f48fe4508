import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def loop_softmax_2xn(y0, x0, n_blocks, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr):
    x = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]
    in_x = x < 2
    a4 = tl.full((XBLOCK, RBLOCK), float("-inf"), tl.float32)
    for start5 in range(0, (n_blocks * 8), RBLOCK):
        p6 = start5 + tl.arange(0, RBLOCK)[None, :]
        in7 = p6 < (n_blocks * 8)
        t8 = tl.load(x0 + (p6 + (x * n_blocks * 8)), mask=in_x & in7, other=0.0)
        a4 = tw.maximum(a4, tl.where(in7, t8, float("-inf")))
    r9 = tw.reduce_max(a4)
    a12 = tl.full((XBLOCK, RBLOCK), 0.0, tl.float32)
    for start13 in range(0, (n_blocks * 8), RBLOCK):
        p14 = start13 + tl.arange(0, RBLOCK)[None, :]
        in15 = p14 < (n_blocks * 8)
        t16 = tl.load(x0 + (p14 + (x * n_blocks * 8)), mask=in_x & in15, other=0.0)
        t17 = t16 - r9
        t18 = tw.exp(t17)
        a12 = a12 + tl.where(in15, t18, 0.0)
    r19 = tw.reduce_sum(a12)
    t20 = 1.0 / r19
    for start0 in range(0, (n_blocks * 8), RBLOCK):
        p1 = start0 + tl.arange(0, RBLOCK)[None, :]
        in2 = p1 < (n_blocks * 8)
        t3 = tl.load(x0 + (p1 + (x * n_blocks * 8)), mask=in_x & in2, other=0.0)
        t10 = t3 - r9
        t11 = tw.exp(t10)
        t21 = t11 * t20
        tl.store(y0 + (p1 + (x * n_blocks * 8)), t21, mask=in_x & in2)

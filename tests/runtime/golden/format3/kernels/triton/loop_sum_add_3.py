import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def loop_sum_add_3(y0, x0, x1, n_batch, BLOCK: tl.constexpr):
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = x < 3
    t0 = tl.load(x1 + (x), mask=inside, other=0.0)
    r1 = tl.full((BLOCK,), 0.0, tl.float32)
    for w2 in range(0, n_batch):
        t3 = tl.load(x0 + (x + (w2 * 3)), mask=inside, other=0.0)
        r1 = r1 + t3
    t4 = t0 + r1
    tl.store(y0 + (x), t4, mask=inside)

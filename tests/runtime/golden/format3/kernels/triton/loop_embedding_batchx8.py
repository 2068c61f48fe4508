import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def loop_embedding_batchx8(y0, x0, x1, fault, n_batch, BLOCK: tl.constexpr):
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = x < n_batch * 8
    i1 = x % 8
    i0 = x // 8
    t0 = tl.load(x1 + (i0), mask=inside, other=0)
    t1 = tl.cast(t0, tl.int64)
    t2 = tl.where(t1 < 0, t1 + 10, t1)
    t3 = (t2 >= 0) & (t2 < 10)
    tl.store(fault + t2 * 0, 1, mask=inside & (t3 == 0))
    t4 = tl.where(t3, t2, 0)
    t5 = tl.load(x0 + (i1 + (t4 * 8)), mask=inside, other=0.0)
    tl.store(y0 + (x), t5, mask=inside)

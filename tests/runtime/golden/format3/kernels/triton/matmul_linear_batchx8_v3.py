import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def matmul_linear_batchx8_v3(y0, x0, x1, x2, n_batch, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    down = tl.cdiv(n_batch, BLOCK_M)
    across = tl.cdiv(8, BLOCK_N)
    tile = tl.program_id(0).to(tl.int32)
    within = tile
    band = within // (8 * across) * 8
    height = tl.minimum(down - band, 8)
    within = within - band * across
    top = (band + within % height) * BLOCK_M
    left = within // height * BLOCK_N
    m = top + tl.arange(0, BLOCK_M)
    n = left + tl.arange(0, BLOCK_N)
    row = tl.minimum(m, n_batch - 1)
    column = tl.minimum(n, 8 - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(6, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        t1_0 = tl.load(x0 + ((k[None, :]) + ((row[:, None]) * 6)), mask=(k < 6)[None, :], other=0.0)
        a = t1_0
        t2_0 = tl.load(x2 + ((k[:, None]) + ((column[None, :]) * 8)), mask=(k < 8)[:, None], other=0.0)
        w = t2_0
        acc = tw.dot(a, w, acc, "ieee")

    t3_0 = tl.load(x1 + (n[None, :]), mask=(n < 8)[None, :], other=0.0)
    t3_1 = acc + t3_0
    tl.store(y0 + ((n[None, :]) + ((m[:, None]) * 8)), t3_1, mask=(m < n_batch)[:, None] & (n < 8)[None, :])

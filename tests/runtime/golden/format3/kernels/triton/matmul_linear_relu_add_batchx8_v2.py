import triton
import triton.language as tl

import tw_math as tw


@triton.jit
def matmul_linear_relu_add_batchx8_v2(y0, x0, x1, x2, x3, n_batch, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    across = tl.cdiv(8, BLOCK_N)
    program = tl.program_id(0).to(tl.int32)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    row = tl.minimum(m, n_batch - 1)
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    for step in range(0, tl.cdiv(6, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        t1_0 = tl.load(x0 + ((k[None, None, :]) + ((row[:, None, None]) * 6)), mask=(k < 6)[None, None, :], other=0.0)
        a = t1_0
        t2_0 = tl.load(x3 + ((k[None, None, :]) + ((n[None, :, None]) * 8)), mask=(k < 8)[None, None, :], other=0.0)
        w = t2_0
        total += a * w
    acc = tl.sum(total, axis=2)
    t3_0 = tl.load(x1 + (n[None, :]))
    t3_1 = acc + t3_0
    t3_2 = t3_1 <= 0.0
    t3_3 = tl.where(t3_2, 0.0, t3_1)
    t3_4 = tl.load(x2 + ((n[None, :]) + ((m[:, None]) * 8)), mask=(m < n_batch)[:, None], other=0.0)
    t3_5 = t3_3 + t3_4
    tl.store(y0 + ((n[None, :]) + ((m[:, None]) * 8)), t3_5, mask=(m < n_batch)[:, None])

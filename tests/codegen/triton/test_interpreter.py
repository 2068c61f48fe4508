"""What templates rely on in the interpreter: types, atomics, descriptors, products, reductions, loops, bounds."""

import ml_dtypes
import numpy as np
import pytest

from tilewright.runtime.errors import InterpreterError

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_computes_in_float32_and_rounds_to_nearest(interpret, dtype):
    source = HEAD + (
        "def k(x, y, z, n, BLOCK: tl.constexpr):\n"
        "    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        "    a = tl.load(x + at, mask=at < n, other=0).to(tl.float32)\n"
        "    b = tl.load(y + at, mask=at < n, other=0).to(tl.float32)\n"
        "    tl.store(z + at, (a * b + 1).to(z.dtype.element_ty), mask=at < n)\n"
    )
    random = np.random.default_rng(0)
    x, y = (random.standard_normal(1003).astype(dtype) for _ in range(2))
    z = interpret(source, "k", [x, y, np.zeros_like(x)], [1003], {"BLOCK": 128}, 8)[2]
    expected = x.astype(np.float32) * y.astype(np.float32) + 1
    np.testing.assert_array_equal(z, expected.astype(dtype))


def test_bfloat16_arithmetic_is_not_on_the_bits(interpret):
    source = HEAD + (
        "def k(x, y, sums, larger, least):\n"
        "    at = tl.arange(0, 64)\n"
        "    a, b = tl.load(x + at), tl.load(y + at)\n"
        "    tl.store(sums + at, a + b)\n"
        "    tl.store(larger + at, a > b)\n"
        "    tl.store(least, tl.min(a, 0))\n"
    )
    random = np.random.default_rng(1)
    x, y = (random.standard_normal(64).astype(ml_dtypes.bfloat16) for _ in range(2))
    arrays = [x, y, np.zeros_like(x), np.zeros(64, np.bool_), np.zeros_like(x[:1])]
    _, _, sums, larger, least = interpret(source, "k", arrays)
    np.testing.assert_array_equal(sums, x + y)
    np.testing.assert_array_equal(larger, x > y)
    assert least[0] == x.min()


def test_operands_of_several_types_are_converted_as_on_a_device(interpret):
    source = HEAD + (
        "def k(y, n, B: tl.constexpr):\n"
        "    i = tl.arange(0, B)\n"
        "    f = i.to(tl.float32)\n"
        "    tl.store(y + 0 * B + i, i + 0.5)\n"
        "    tl.store(y + 1 * B + i, 7 - f)\n"
        "    tl.store(y + 2 * B + i, i.to(tl.int64) * f)\n"
        "    tl.store(y + 3 * B + i, f.to(tl.float16) + f)\n"
        "    tl.store(y + 4 * B + i, i / 4)\n"
        "    tl.store(y + 5 * B + i, (f > 2) & (i != 5))\n"
        "    tl.store(y + 6 * B + i, tl.where((2 <= f) | (i == 0), f, -f))\n"
        "    tl.store(y + 7 * B + i, (n - i) * B)\n"
        "    tl.static_assert((i + 0.5).dtype == tl.float32)\n"
        "    tl.static_assert((n * i).dtype == tl.int64)\n"
        "    tl.static_assert((f.to(tl.float16) * 2.5).dtype == tl.float16)\n"
        "    tl.static_assert((i < f).dtype == tl.int1)\n"
    )
    y = interpret(source, "k", [np.zeros((8, 8), np.float32)], [9], {"B": 8})[0]
    i = np.arange(8)
    expected = [i + 0.5, 7 - i, i * i, i + i, i / 4, (i > 2) & (i != 5), np.where((i >= 2) | (i == 0), i, -i)]
    np.testing.assert_array_equal(y, [*expected, (9 - i) * 8])


def test_integers_and_bools(interpret):
    source = HEAD + (
        "def k(flags, big, small, y, n, BLOCK: tl.constexpr):\n"
        "    at = tl.arange(0, BLOCK)\n"
        "    kept = tl.load(flags + at, mask=at < n, other=0) != 0\n"
        "    value = tl.load(big + at, mask=at < n, other=0) + tl.load(small + at, mask=at < n, other=0)\n"
        "    tl.store(y + at, tl.where(kept, value, -1), mask=at < n)\n"
        "    tl.store(flags + at, (~kept).to(tl.uint8), mask=at < n)\n"
    )
    random = np.random.default_rng(2)
    flags = random.random(13) < 0.5
    big, small = random.integers(-(2**60), 2**60, 13), random.integers(-128, 128, 13).astype(np.int8)
    after = interpret(source, "k", [flags, big, small, np.zeros_like(big)], [13], {"BLOCK": 16})
    np.testing.assert_array_equal(after[3], np.where(flags, big + small, -1))
    np.testing.assert_array_equal(after[0], ~flags)
    assert after[0].dtype == np.bool_


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_quotients_round_to_zero_and_rests_have_the_sign_of_what_is_divided(interpret, dtype):
    source = HEAD + (
        "def k(x, y, z, n, B: tl.constexpr):\n"
        "    i = tl.arange(0, B)\n"
        "    a, b = tl.load(x + i), tl.load(y + i)\n"
        "    tl.store(z + 0 * B + i, a // 3)\n"
        "    tl.store(z + 1 * B + i, a % 3)\n"
        "    tl.store(z + 2 * B + i, a // b)\n"
        "    tl.store(z + 3 * B + i, a % b)\n"
        "    tl.store(z + 4 * B + i, 100 // b)\n"
        "    tl.store(z + 5 * B + i, -100 % b)\n"
        "    tl.store(z + 6 * B + i, a // n)\n"
        "    tl.store(z + 7 * B + i, n % b)\n"
    )
    x = np.arange(-32, 32, dtype=dtype)
    y = np.where(x % 5 == 0, 7, x % 11 - 12).astype(dtype)
    z = interpret(source, "k", [x, y, np.zeros((8, 64), dtype)], [9], {"B": 64})[2]
    pairs = [(x, 3), (x, y), (100, y), (-100, y), (x, 9), (9, y)]
    quotients = [np.trunc(np.true_divide(a, b)).astype(dtype) for a, b in pairs]
    rests = [a - b * quotient for (a, b), quotient in zip(pairs, quotients, strict=True)]
    want = [quotients[0], rests[0], quotients[1], rests[1], quotients[2], rests[3], quotients[4], rests[5]]
    np.testing.assert_array_equal(z, want)


def test_atomics_count_across_programs(interpret):
    source = HEAD + (
        "def k(counters, total, last):\n"
        "    tl.atomic_add(total + tl.arange(0, 4), 0.5)\n"
        "    before = tl.atomic_add(counters, 1)\n"
        "    if before == tl.num_programs(0) - 1:\n"
        "        tl.store(last, tl.program_id(0))\n"
        "        tl.atomic_xchg(counters, 0)\n"
    )
    after = interpret(source, "k", [np.zeros(1, np.int32), np.zeros(4, np.float32), np.zeros(1, np.int32)], grid=5)
    assert after[0][0] == 0 and after[2][0] == 4
    np.testing.assert_array_equal(after[1], 2.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_descriptors_pad_with_zeros(interpret, dtype):
    source = HEAD + (
        "def k(x, y, m, n, M: tl.constexpr, N: tl.constexpr):\n"
        "    a = tl.make_tensor_descriptor(x, shape=[m, n], strides=[n, 1], block_shape=[M, N])\n"
        "    b = tl.make_tensor_descriptor(y, shape=[m, n], strides=[n, 1], block_shape=[M, N])\n"
        "    row = tl.program_id(0) * M\n"
        "    for column in tl.range(0, n, N):\n"
        "        block = a.load([row.to(tl.int32), column])\n"
        "        b.store([row.to(tl.int32), column], block + tl.sum(block.to(tl.float32)).to(block.dtype) * 0)\n"
    )
    x = np.random.default_rng(3).standard_normal((19, 40)).astype(dtype)
    y = interpret(source, "k", [x, np.zeros_like(x)], [19, 40], {"M": 8, "N": 16}, 3, "i32")[1]
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_products(interpret, dtype):
    source = HEAD + (
        "def k(a, b, c, k_size, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):\n"
        "    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)\n"
        "    acc = tl.zeros((M, N), dtype=tl.float32)\n"
        "    for start in range(0, k_size, K):\n"
        "        kept = start + k < k_size\n"
        "        left = tl.load(a + m[:, None] * k_size + (start + k)[None, :], mask=kept[None, :], other=0)\n"
        "        right = tl.load(b + (start + k)[:, None] * N + n[None, :], mask=kept[:, None], other=0)\n"
        "        acc = tl.dot(left, right, acc, input_precision='ieee')\n"
        "    tl.store(c + m[:, None] * N + n[None, :], acc)\n"
    )
    random = np.random.default_rng(4)
    a, b = random.standard_normal((16, 50)).astype(dtype), random.standard_normal((50, 32)).astype(dtype)
    c = interpret(source, "k", [a, b, np.zeros((16, 32), np.float32)], [50], {"M": 16, "N": 32, "K": 16})[2]
    expected = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(c - expected).max() <= 1e-6 * np.abs(expected).max()


REDUCTIONS = """
@triton.jit
def welford(mean_a, square_a, count_a, mean_b, square_b, count_b):
    count = count_a + count_b
    delta = mean_b - mean_a
    part = tl.where(count > 0, count_b / tl.maximum(count, 1.0), 0.0)
    return mean_a + delta * part, square_a + square_b + delta * delta * count_a * part, count


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def k(x, sums, places, means, variances, firsts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(x + r[:, None] * COLUMNS + c[None, :])
    total = tl.sum(block, axis=1, keep_dims=True)
    tl.store(sums + r[:, None], total)
    tl.store(places + r, tl.argmax(block, axis=1))
    one = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    mean, square, count = tl.reduce((block, block * 0, one), 1, welford, keep_dims=True)
    tl.store(means + r[:, None], mean)
    tl.store(variances + r[:, None], square / count)
    tl.store(firsts + c, tl.reduce(block, 0, first_of))
"""


def test_reductions(interpret):
    x = np.random.default_rng(5).standard_normal((8, 32)).astype(np.float32)
    empty = np.zeros(8, np.float32)
    arrays = [x, empty, np.zeros(8, np.int32), empty, empty, np.zeros(32, np.float32)]
    source = HEAD.removesuffix("@triton.jit\n") + REDUCTIONS.strip() + "\n"
    _, sums, places, means, variances, firsts = interpret(source, "k", arrays, [], {"ROWS": 8, "COLUMNS": 32})
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(places, x.argmax(1))
    np.testing.assert_allclose(means, x.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variances, x.var(1), rtol=1e-5)
    np.testing.assert_array_equal(firsts, x[0])


def test_scans(interpret):
    source = HEAD.removesuffix("@triton.jit\n") + (
        "@triton.jit\n"
        "def affine(a, b, c, d):\n"
        "    return a * c, b * c + d\n\n\n"
        "@triton.jit\n"
        "def k(x, y, z, flat, R: tl.constexpr, C: tl.constexpr):\n"
        "    r, c = tl.arange(0, R), tl.arange(0, C)\n"
        "    at = r[:, None] * C + c[None, :]\n"
        "    tl.store(y + at, tl.cumsum(tl.load(x + at), 1))\n"
        "    factor, term = tl.associative_scan((tl.load(x + at), tl.load(x + at)), 0, affine)\n"
        "    tl.store(z + at, term)\n"
        "    factor, term = tl.associative_scan((tl.load(x + c), tl.load(x + c)), 0, affine, reverse=True)\n"
        "    tl.store(flat + c, factor)\n"
    )
    x = np.random.default_rng(6).random((8, 4)).astype(np.float32)
    arrays = [x, np.zeros_like(x), np.zeros_like(x), x[0] * 0]
    _, y, z, flat = interpret(source, "k", arrays, [], {"R": 8, "C": 4})
    expected = [x[0]]
    for row in x[1:]:
        expected.append(expected[-1] * row + row)
    np.testing.assert_allclose(y, x.cumsum(1), rtol=1e-6)
    np.testing.assert_allclose(z, expected, rtol=1e-6)
    np.testing.assert_allclose(flat, x[0, ::-1].cumprod()[::-1], rtol=1e-6)


def test_loops_and_branches_over_loaded_scalars(interpret):
    source = HEAD + (
        "def k(starts, x, y):\n"
        "    row = tl.program_id(0)\n"
        "    begin, end = tl.load(starts + row), tl.load(starts + row + 1)\n"
        "    acc = 0.0\n"
        "    for at in range(begin, end):\n"
        "        acc += tl.load(x + at)\n"
        "    if end - begin > 2:\n"
        "        acc = -acc\n"
        "    tl.store(y + row, acc)\n"
    )
    starts, x = np.array([0, 2, 2, 7]), np.arange(7, dtype=np.float32)
    y = interpret(source, "k", [starts, x, np.zeros(3, np.float32)], grid=3)[2]
    np.testing.assert_array_equal(y, [1, 0, -20])


@pytest.mark.parametrize("text", ["tl.load(x + at, mask=at < n + 1)", "tl.load(x + at - 1, mask=at < n)"])
def test_an_access_out_of_bounds_is_named(interpret, text):
    source = (
        HEAD
        + f"def reads(x, n):\n    at = tl.arange(0, 16)\n    value = {text}\n    tl.store(x + at, value, mask=at < n)\n"
    )
    with pytest.raises(InterpreterError, match=r"kernel reads failed in program 0 of 1: IndexError(.|\n)*:8: value = "):
        interpret(source, "reads", [np.zeros(9, np.float32)], [9])

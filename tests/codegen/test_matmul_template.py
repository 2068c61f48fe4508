"""matmul.c.jinja against torch in double precision."""

import numpy as np
import pytest
import torch

from tilewright.codegen.c.packing import matmul_units, pack_matmul

POINTERS = "const float *restrict x = buf[0]; const float *restrict w = buf[1]; float *restrict y = buf[2];"
BOTH = pytest.mark.parametrize("target", ["v3", "v4"])
EVERY = pytest.mark.parametrize(("target", "compiler"), [(t, c) for c in ("gcc", "zig") for t in ("v3", "v4")])


def random(new_array, *shape, seed=0):
    array = new_array(shape)
    array[...] = np.random.default_rng(seed).standard_normal(shape)
    return array


def check(got, expected, depth):
    """Terms are added one by one in single precision: the error grows with the square root of their number."""
    assert got.shape == tuple(expected.shape)
    if got.size:
        error = np.abs(got - expected.numpy()).max() / max(float(expected.abs().max()), 1e-3)
        assert error < 3e-7 * (1 + depth**0.5), error


def packed_kernel(native, n, k, target, compiler="gcc", stride=None, epilogue=None):
    """y[m, n] = x @ w + bias, rows of x `stride` apart, M in dim[0]."""
    epilogue = epilogue or native.Hole(f"float *restrict to = y + m * {n};", "to[n] = acc + bias[n];")
    source = native.render(
        "matmul.c.jinja",
        name="product",
        prelude=POINTERS + "\nconst float *restrict bias = buf[3];\nconst int64_t rows = dim[0];",
        BATCH=1, M="rows", N=n, K=k,
        a_direct=True, a_base="x", a_stride=stride or k,
        b_packed=True, b_base="w",
        epilogue=epilogue,
    )  # fmt: skip
    return native.build(source, "product", target, compiler)


@pytest.mark.parametrize(
    ("n", "k", "target", "compiler"),
    [(n, k, target, "gcc") for n, k in [(1, 1), (32, 1), (33, 18), (130, 500)] for target in ("v3", "v4")]
    + [(70, 129, target, "zig") for target in ("v3", "v4")],
)
def test_packed(native, new_array, n, k, target, compiler):
    kernel = packed_kernel(native, n, k, target, compiler)
    weight, bias = random(new_array, k, n, seed=1), random(new_array, n, seed=2)
    packed = pack_matmul(weight)
    for m in (0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 25, 96, 97, 200):
        x, y = random(new_array, m, k), new_array((m + 1, n))
        assert kernel([x, packed, y, bias], [m], matmul_units(1, m, n)) == 0
        check(y[:m], torch.from_numpy(x).double() @ torch.from_numpy(weight).double() + torch.from_numpy(bias), k)
        assert np.isnan(y[m]).all(), "wrote beyond the last row"


@pytest.mark.sanitize("1024-v3")
@BOTH
@pytest.mark.parametrize(("n", "k", "stride"), [(40, 5000, 5000), (64, 300, 1024), (64, 300, 1100), (20, 1024, 2048)])
def test_deep_and_strided_rows(native, new_array, target, n, k, stride):
    """Several blocks along k; rows a multiple of 4 KB apart, which are packed first; rows further apart than k."""
    kernel = packed_kernel(native, n, k, target, stride=stride)
    weight, bias = random(new_array, k, n, seed=1), random(new_array, n, seed=2)
    for m in (1, 29, 110):
        x, y = random(new_array, m, stride), new_array((m, n))
        kernel([x, pack_matmul(weight), y, bias], [m], matmul_units(1, m, n))
        check(y, torch.from_numpy(x[:, :k]).double() @ torch.from_numpy(weight).double() + torch.from_numpy(bias), k)


@EVERY
def test_same_bits_however_units_are_split(native, new_array, target, compiler):
    m, n, k = 230, 200, 700
    kernel = packed_kernel(native, n, k, target, compiler)
    arrays = [
        random(new_array, m, k),
        pack_matmul(random(new_array, k, n, seed=1)),
        new_array((m, n)),
        new_array(n, 0.5),
    ]
    units = matmul_units(1, m, n)
    kernel(arrays, [m], units)
    whole = arrays[2].copy()
    for step in (1, 2, 3, 5, 8):
        arrays[2][...] = np.nan
        for begin in reversed(range(0, units, step)):
            kernel(arrays, [m], begin, min(units, begin + step))
        np.testing.assert_array_equal(arrays[2], whole)


@EVERY
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(native, new_array, target, compiler):
    m, n, k = 101, 96, 1000
    kernel = packed_kernel(native, n, k, target, compiler)
    x, packed, bias = (
        random(new_array, m, k),
        pack_matmul(random(new_array, k, n, seed=1)),
        random(new_array, n, seed=2),
    )
    together = new_array((m, n))
    kernel([x, packed, together, bias], [m], matmul_units(1, m, n))
    for rows in (1, 2, 4, 7):
        alone = new_array((rows, n))
        kernel([x[40 : 40 + rows].copy(), packed, alone, bias], [rows], matmul_units(1, rows, n))
        np.testing.assert_array_equal(alone, together[40 : 40 + rows])


@BOTH
def test_static_sizes_and_batch(native, new_array, target):
    """All sizes known, one packed B for each batch entry, an epilogue with a residual and an activation."""
    batch, m, n, k = 3, 20, 48, 36
    source = native.render(
        "matmul.c.jinja",
        name="product",
        prelude=POINTERS + " const float *restrict residual = buf[3];",
        BATCH=batch, M=m, N=n, K=k,
        a_direct=True, a_base=f"x + b * {m * k}", a_stride=k,
        b_packed=True, b_base=f"w + b * {2 * k * 32}",
        epilogue=native.Hole(
            f"const int64_t at = (b * {m} + m) * {n};",
            "const float sum = acc + residual[at + n];\ny[at + n] = sum > 0 ? sum : 0;",
        ),
    )  # fmt: skip
    kernel = native.build(source, "product", target)
    x, weight, residual = (random(new_array, batch, *shape, seed=i) for i, shape in enumerate([(m, k), (k, n), (m, n)]))
    y = new_array((batch, m, n))
    kernel([x, pack_matmul(weight), y, residual], [], matmul_units(batch, m, n))
    expected = torch.relu(torch.from_numpy(x).double() @ torch.from_numpy(weight).double() + torch.from_numpy(residual))
    check(y, expected, k)


@pytest.mark.sanitize("sizes1", "sizes4")
@EVERY
@pytest.mark.parametrize("sizes", [(2, 5, 3, 1), (3, 100, 70, 33), (1, 40, 33, 450), (2, 1, 64, 200), (4, 12, 1, 7)])
def test_packs_both_operands(native, new_array, target, compiler, sizes):
    """A transposed and shifted by one, B transposed: both through their holes, every size a variable."""
    batch, m, n, k = sizes
    source = native.render(
        "matmul.c.jinja",
        name="product",
        prelude=POINTERS + "\nconst int64_t M = dim[1], N = dim[2], K = dim[3];",
        BATCH="dim[0]", M="M", N="N", K="K",
        pack_a=native.Hole("const float *restrict from = x + b * M * K + m;", "const float a_value = from[k * M] + 1;"),
        pack_b=native.Hole("const float *restrict from = w + b * N * K + k;", "const float b_value = from[n * K];"),
        epilogue=native.Hole("float *restrict to = y + (b * M + m) * N;", "to[n] = 2 * acc;"),
    )  # fmt: skip
    kernel = native.build(source, "product", target, compiler)
    x, weight, y = random(new_array, batch, k, m), random(new_array, batch, n, k, seed=1), new_array((batch, m, n))
    units = matmul_units(batch, m, n)
    kernel([x, weight, y], sizes, units)
    expected = 2 * (torch.from_numpy(x).double().mT + 1) @ torch.from_numpy(weight).double().mT
    check(y, expected, k)
    whole = y.copy()
    y[...] = np.nan
    for unit in range(units):
        kernel([x, weight, y], sizes, unit, unit + 1)
    np.testing.assert_array_equal(y, whole)


@BOTH
def test_no_depth_gives_the_epilogue_of_zero(native, new_array, target):
    kernel = packed_kernel(native, 40, 0, target)
    y, bias = new_array((3, 40)), random(new_array, 40)
    kernel([new_array((3, 0)), pack_matmul(np.zeros((0, 40), np.float32)), y, bias], [3], matmul_units(1, 3, 40))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (3, 40)))


@pytest.mark.sanitize
@BOTH
def test_columns_beyond_n_are_not_stored(native, new_array, target):
    """The output's rows have other data after their N columns."""
    kernel = packed_kernel(
        native, 37, 50, target, epilogue=native.Hole("float *restrict to = y + m * 40;", "to[n] = acc + bias[n];")
    )
    x, weight, y = random(new_array, 14, 50), random(new_array, 50, 37), new_array((14, 40), 7.0)
    kernel([x, pack_matmul(weight), y, new_array(37, 0.0)], [14], matmul_units(1, 14, 37))
    check(y[:, :37], torch.from_numpy(x).double() @ torch.from_numpy(weight).double(), 50)
    assert (y[:, 37:] == 7).all()

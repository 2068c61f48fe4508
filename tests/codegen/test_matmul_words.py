"""matmul.c.jinja over words of bfloat16 (against torch in double precision) and int8 (exactly)."""

import numpy as np
import pytest
import torch

from tilewright.codegen.c.packing import NARROW_PANEL, PANEL, matmul_units, pack_bytes, pack_words
from tilewright.codegen.storage import to_numpy

TARGETS = ("v3", "v4base", "v4")
EVERY = pytest.mark.parametrize(
    ("target", "panel", "compiler"),
    [("v3", NARROW_PANEL, "gcc"), *((target, PANEL, "gcc") for target in TARGETS)]
    + [("v3", NARROW_PANEL, "zig"), ("v4", PANEL, "zig")],
)
TYPES = {"float32": "float", "bfloat16": "uint16_t", "int8": "int8_t"}


def bfloat16(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def int8(*shape, seed):
    """The whole range, its ends often."""
    generator = np.random.default_rng(seed)
    ends = generator.choice(np.array([-128, 127], np.int8), shape)
    return np.where(generator.random(shape) < 0.3, ends, generator.integers(-128, 128, shape, np.int8))


def check(got, a, b, extra=0.0):
    """Products of two bfloat16 are exact; each addition rounds to float32."""
    expected = a.double() @ b.double() + extra
    assert got.shape == tuple(expected.shape)
    if got.size:
        error = np.abs(got - expected.numpy()).max() / max(float(expected.abs().max()), 1e-3)
        assert error < 3e-7 * (1 + a.shape[-1] ** 0.5), error


def packed_kernel(native, kind, n, k, target, compiler="gcc", *, storage=None, stride=None, panel=PANEL):
    """y[m, n] = x @ w (+ 1 for int8), rows of x `stride` apart, M in dim[0]."""
    storage, stride = storage or kind, stride or k
    result = "int32_t" if kind == "int8" else "float"
    source = native.render(
        "matmul.c.jinja",
        name="product",
        kind=kind,
        prelude=f"const {TYPES[storage]} *restrict x = buf[0]; const {TYPES[kind]} *restrict w = buf[1];\n"
        f"{result} *restrict y = buf[2]; const int64_t rows = dim[0];",
        BATCH=1, M="rows", N=n, K=k, panel=panel,
        a_direct=True, a_base="x", a_stride=stride, a_storage=storage, a_words=k % 2 == stride % 2 == 0,
        b_packed=True, b_base="w", depth=40,
        epilogue=native.Hole(f"{result} *restrict to = y + m * {n};", f"to[n] = acc + {int(kind == 'int8')};"),
    )  # fmt: skip
    return native.build(source, "product", target, compiler)


@pytest.mark.sanitize("33-170")
@pytest.mark.parametrize(
    ("n", "k", "storage", "stride"),
    [(1, 1, "bfloat16", 1), (33, 170, "bfloat16", 170), (70, 171, "bfloat16", 173), (33, 171, "float32", 200)]
    + [(40, 100, "bfloat16", 2048), (33, 2001, "float32", 2001)],
)
@EVERY
def test_packed_bfloat16(native, target, panel, compiler, n, k, storage, stride):
    """Rows read in place, of odd length, in float32, long, a multiple of 4 KB apart; NaNs beyond them are not read."""
    if compiler == "zig" and stride != 170:
        pytest.skip("one shape is enough for the second compiler")
    kernel = packed_kernel(native, "bfloat16", n, k, target, compiler, storage=storage, stride=stride, panel=panel)
    weight = bfloat16(k, n, seed=1)
    packed = pack_words(to_numpy(weight), panel)
    for m in (0, 1, 2, 5, 7, 13, 25, 97, 200):
        x = torch.full((m, stride), torch.nan).bfloat16()
        x[:, :k] = bfloat16(m, k, seed=m)
        y = np.full((m + 1, n), np.nan, np.float32)
        given = x.float().numpy() if storage == "float32" else to_numpy(x)
        assert kernel([given, packed, y], [m], matmul_units(1, m, n, panel=panel)) == 0
        check(y[:m], x[:, :k], weight)
        assert np.isnan(y[m]).all(), "wrote beyond the last row"


@EVERY
def test_float32_is_rounded_to_nearest_even(native, target, panel, compiler):
    """Ties, overflow to infinity, infinities and NaN: a row times the identity."""
    kernel = packed_kernel(native, "bfloat16", 33, 33, target, compiler, storage="float32", panel=panel)
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    x.view(torch.int32)[::2] = (x.view(torch.int32)[::2] & ~0xFFFF) | 0x8000
    y, identity = np.empty((64, 33), np.float32), pack_words(to_numpy(torch.eye(33).bfloat16()), panel)
    kernel([x.numpy(), identity, y], [64], matmul_units(1, 64, 33, panel=panel))
    np.testing.assert_array_equal(y, x.bfloat16().float().numpy())
    for value in (3.3961775e38, torch.inf, -torch.inf, torch.nan):
        x[5] = 0
        x[5, 7] = value
        kernel([x.numpy(), identity, y], [64], matmul_units(1, 64, 33, panel=panel))
        np.testing.assert_array_equal(y[5, 7], x.bfloat16().float()[5, 7].numpy())


@pytest.mark.sanitize("33-1")
@EVERY
@pytest.mark.parametrize(("n", "k"), [(33, 1), (70, 331)])
def test_packed_int8(native, target, panel, compiler, n, k):
    kernel = packed_kernel(native, "int8", n, k, target, compiler, panel=panel)
    weight = int8(k, n, seed=1)
    for m in (0, 1, 3, 6, 12, 29, 97):
        x, y = int8(m, k, seed=m), np.full((m + 1, n), 77, np.int32)
        kernel([x, pack_bytes(weight, panel), y], [m], matmul_units(1, m, n, panel=panel))
        np.testing.assert_array_equal(y[:m], x.astype(np.int64) @ weight.astype(np.int64) + 1)
        assert (y[m] == 77).all(), "wrote beyond the last row"


@pytest.mark.parametrize("target", TARGETS)
def test_int8_wraps_like_pytorch(native, target):
    k = (1 << 17) + 3
    kernel = packed_kernel(native, "int8", 2, k, target)
    x, weight, y = np.full((1, k), -128, np.int8), np.full((k, 2), -128, np.int8), np.empty((1, 2), np.int32)
    kernel([x, pack_bytes(weight), y], [1], 1)
    np.testing.assert_array_equal(y, torch._int_mm(torch.from_numpy(x), torch.from_numpy(weight)).numpy() + 1)


@pytest.mark.sanitize
@EVERY
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_packs_both_operands(native, target, panel, compiler, kind):
    """A and B transposed, both through their holes, every size a variable; the same bits however units are split."""
    value = "int32_t" if kind == "int8" else "float"
    load = "{}" if kind == "int8" else "tw_bf16_to_f32({})"
    source = native.render(
        "matmul.c.jinja",
        name="product",
        kind=kind,
        panel=panel,
        prelude=f"const {TYPES[kind]} *restrict x = buf[0], *restrict w = buf[1]; {value} *restrict y = buf[2];\n"
        "const int64_t M = dim[1], N = dim[2], K = dim[3];",
        BATCH="dim[0]", M="M", N="N", K="K", depth=48,
        pack_a=native.Hole(f"const {TYPES[kind]} *restrict from = x + b * M * K + m;",
                           f"const {value} a_value = {load.format('from[k * M]')};"),
        pack_b=native.Hole(f"const {TYPES[kind]} *restrict from = w + b * N * K + k;",
                           f"const {value} b_value = {load.format('from[n * K]')};"),
        epilogue=native.Hole(f"{value} *restrict to = y + (b * M + m) * N;", "to[n] = 2 * acc;"),
    )  # fmt: skip
    kernel = native.build(source, "product", target, compiler)
    for batch, m, n, k in [(2, 5, 3, 1), (3, 100, 70, 203), (2, 1, 64, 30), (1, 12, 1, 7), (1, 2, 2, 0)]:
        make = int8 if kind == "int8" else bfloat16
        x, weight = make(batch, k, m, seed=2), make(batch, n, k, seed=3)
        y = np.zeros((batch, m, n), np.int32 if kind == "int8" else np.float32)
        units = matmul_units(batch, m, n, panel=panel)
        arrays = [array if kind == "int8" else to_numpy(array) for array in (x, weight)]
        kernel([*arrays, y], [batch, m, n, k], units)
        if kind == "int8":
            turned = x.astype(np.int64).swapaxes(1, 2) @ weight.astype(np.int64).swapaxes(1, 2)
            np.testing.assert_array_equal(y, 2 * turned)
        else:
            check(y / 2, x.mT, weight.mT)
        whole = y.copy()
        y[...] = -1
        for unit in range(units):
            kernel([*arrays, y], [batch, m, n, k], unit, unit + 1)
        np.testing.assert_array_equal(y, whole)


@EVERY
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(native, target, panel, compiler):
    m, n, k = 101, 96, 1000
    kernel = packed_kernel(native, "bfloat16", n, k, target, compiler, panel=panel)
    x, packed, together = (
        bfloat16(m, k, seed=4),
        pack_words(to_numpy(bfloat16(k, n, seed=5)), panel),
        np.empty((m, n), "f4"),
    )
    kernel([to_numpy(x), packed, together], [m], matmul_units(1, m, n, panel=panel))
    for rows in (1, 2, 4, 7):
        alone = np.empty((rows, n), np.float32)
        kernel([to_numpy(x[40 : 40 + rows]), packed, alone], [rows], matmul_units(1, rows, n, panel=panel))
        np.testing.assert_array_equal(alone, together[40 : 40 + rows])

"""quantize_rows.c.jinja and quantized_matmul.c.jinja against dequantized weights in double precision."""

import numpy as np
import pytest
import torch

from tilewright.codegen.c.quantized_packing import (
    TILE,
    block_rows,
    group_steps,
    pack_quantized,
    panel_bytes,
    piece_steps,
    quantize_units,
    quantized_units,
    row_bytes,
    steps_of,
)
from tilewright.passes.graph.quantized_ops import dequantize, quantize_rows, quantize_weight
from tilewright.passes.graph.quantized_rows import RowFormat

TARGETS = ("v3", "v4base", "v4")
EVERY = pytest.mark.parametrize(("target", "compiler"), [*((target, "gcc") for target in TARGETS), ("v3", "zig")])
ROWS = (0, 1, 3, 4, 5, 7, 33, 43)
FORMATS = {
    "int4-g32": (4, 32, True, 32),
    "int4-g64-z": (4, 64, False, 32),
    "int4-g128": (4, 128, True, 0),
    "int4": (4, 0, True, 0),
    "int8": (8, 0, True, 0),
    "int8-by-32": (8, 0, True, 32),
    "int8-g64-z": (8, 64, False, 32),
    "int4-g32-z-float": (4, 32, False, -1),
    "int8-float": (8, 0, True, -1),
    "int8-g128-float": (8, 128, True, -1),
}


def weight_of(n, k, bits, group, symmetric, seed):
    """Rows of numbers of different sizes, with a row of zeros, quantized."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.logspace(-3, 3, n)[:, None]
    weight[n // 2] = 0
    return quantize_weight(weight, bits, group, symmetric, False)


def activations_of(m, k, seed):
    """Rows of different sizes; the second is zero, the third has one number that dwarfs the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-4, 4, m)[:, None]
    x[1:2] = 0
    x[2:3, k // 3] = 1e20
    return x


def kernel_of(native, form, n, activations, target, compiler="gcc", *, direct=True, block=None):
    """y[m, n] = x @ w.T + bias, rows of x three elements further apart than they are long, M in dim[0]."""
    k, shared = form.columns, activations // 32 or steps_of(form.columns)
    most = block or block_rows(k, gathered=not direct)
    if direct:
        x = {"x_direct": True, "x_base": "x", "x_stride": k + 3}
    else:
        x = {"read_x": native.Hole(f"const float *restrict from = x + m * {k + 3};", "const float x_value = from[k];")}
    quantize = None
    common = {"M": "rows", "K": k, "bits": form.bits, "zeros": not form.symmetric, "block": most}
    if activations >= 0:
        source = native.render(
            "quantize_rows.c.jinja",
            name="quantize",
            prelude="const float *restrict x = buf[0]; uint8_t *restrict q = buf[1]; const int64_t rows = dim[0];",
            activations=shared, piece=piece_steps(k, shared), tile=TILE, rows_at="q", **common, **x,
        )  # fmt: skip
        quantize = native.build(source, "quantize", target, compiler)
        x = {"rows_at": "x"}
    source = native.render(
        "quantized_matmul.c.jinja",
        name="product",
        prelude=f"const {'uint8_t' if quantize else 'float'} *restrict x = buf[0];\n"
        "const float *restrict bias = buf[2];\n"
        "const uint8_t *restrict w = buf[1]; float *restrict y = buf[3]; const int64_t rows = dim[0];",
        N=n, per=group_steps(form), activations=shared if quantize else 0, weight="w", panel_bytes=panel_bytes(form),
        epilogue=native.Hole(f"float *restrict to = y + m * {n};", "to[n] = acc + bias[n];"), **common, **x,
    )  # fmt: skip
    kernel = native.build(source, "product", target, compiler)

    def call(x, packed, bias):
        m = len(x)
        wide = np.full((m, k + 3), np.nan, np.float32)
        wide[:, :k] = x
        if quantize:
            rows = np.full(m * row_bytes(k, form.bits) + 64, 0x5A, np.uint8)
            units = quantize_units(m, k, shared)
            for begin in range(units - 1, -1, -1):  # units are independent
                assert quantize([wide, rows], [m], begin, begin + 1) == 0
            assert (rows[m * row_bytes(k, form.bits) :] == 0x5A).all(), "wrote beyond the last row"
            wide = rows
        y = np.full((m + 1, n), np.nan, np.float32)
        assert kernel([wide, packed, bias, y], [m], quantized_units(m, n, most)) == 0
        assert np.isnan(y[m]).all(), "wrote beyond the last row"
        return y[:m]

    return call


def exact(x, rows, form, activations):
    """The product in double precision, and the size of what is summed (for the error)."""
    weight = dequantize(rows, form.columns, form.bits, form.group, form.symmetric).double()
    if activations >= 0:
        codes, scales = quantize_rows(x, activations)
        x = (codes.double() * scales.double()[..., None]).flatten(1)[:, : form.columns]
    return (x.double() @ weight.T).numpy(), (x.double().abs() @ weight.abs().T).numpy()


@pytest.mark.sanitize("int4-g64-z-v3-gcc", "int8-v3-gcc", "float-v3-gcc", "int8-g64-z-v3-gcc")
@EVERY
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(76, 1067)], ids=[""])
def test_product(native, target, compiler, name, n, k):
    """Few rows and many, in blocks of 16, alone and together; columns and terms end inside a panel, a
    chunk and a step."""
    bits, group, symmetric, activations = FORMATS[name]
    form = RowFormat(k, bits, group, symmetric)
    if compiler == "zig" and name not in ("int4-g64-z", "int8", "int8-float"):
        pytest.skip("three formats are enough for the second compiler")
    rows = weight_of(n, k, bits, group, symmetric, seed=1)
    packed = pack_quantized(rows.numpy(), form)
    bias = np.linspace(-1, 1, n, dtype=np.float32)
    call = kernel_of(native, form, n, activations, target, compiler, direct=group != 64, block=16)
    for m in ROWS:
        x = activations_of(m, k, seed=m)
        got = call(x.numpy(), packed, bias)
        expected, size = exact(x, rows, form, activations)
        assert (np.abs(got - (expected + bias)) <= 2e-6 * (size + np.abs(bias))).all()
        for row in range(0, m, 5):
            np.testing.assert_array_equal(call(x[row : row + 1].numpy(), packed, bias)[0], got[row])


@EVERY
def test_sums_beyond_16_bits(native, target, compiler):
    """The largest codes of 8 bits, of one sign and of many; beside them rows whose sums of four products fit."""
    n, k = 40, 1100
    form = RowFormat(k, 8, 0, True)
    signs = torch.randn(n, k, generator=torch.Generator().manual_seed(3)).sign()
    signs[:20] = 1
    rows = quantize_weight(signs * torch.linspace(1, 2, n)[:, None], 8, 0, True, False)
    x = torch.cat([torch.ones(1, k), -torch.ones(1, k), signs[30:36], 0.01 * signs[20:28]])
    x[8:, 77] = -1
    call = kernel_of(native, form, n, 0, target, compiler)
    packed, bias = pack_quantized(rows.numpy(), form), np.zeros(n, np.float32)
    got = call(x.numpy(), packed, bias)
    expected, size = exact(x, rows, form, 0)
    assert (np.abs(got - expected) <= 2e-6 * size).all()
    for row in range(len(x)):
        np.testing.assert_array_equal(call(x[row : row + 1].numpy(), packed, bias)[0], got[row])


@EVERY
@pytest.mark.parametrize("name", ["int4-g32", "int4-g64-z", "int8", "int8-by-32"])
def test_a_row_that_is_no_number_stays_alone(native, target, compiler, name):
    """A NaN or an infinity makes its own row NaN, and leaves the bits of the rows in its tile as they were."""
    n, k = 40, 300
    bits, group, symmetric, activations = FORMATS[name]
    form = RowFormat(k, bits, group, symmetric)
    packed = pack_quantized(weight_of(n, k, bits, group, symmetric, seed=2).numpy(), form)
    call, bias = kernel_of(native, form, n, activations, target, compiler), np.zeros(n, np.float32)
    for m in (3, 4, 13):
        x = activations_of(m, k, seed=m)
        clean = call(x.numpy(), packed, bias)
        x[1, k // 2], x[2, k - 1] = np.nan, np.inf
        got = call(x.numpy(), packed, bias)
        others = [row for row in range(m) if row not in (1, 2)]
        np.testing.assert_array_equal(got[others], clean[others])
        assert np.isnan(got[1]).all() and not np.isfinite(got[2]).any()

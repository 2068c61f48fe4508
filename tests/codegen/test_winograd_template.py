"""winograd.c.jinja against torch in double precision, and its matrices."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tilewright.codegen.c.packing import block_channels
from tilewright.codegen.c.winograd import BANDS, MOST, Choice, scratch_floats, winograd_units
from tilewright.codegen.c.winograd_matrices import filter_matrix, pack_winograd

POINTERS = """const float *restrict x = buf[0]; const float *restrict w = buf[1]; float *restrict y = buf[2];
const float *restrict bias = buf[3]; const float *restrict add = buf[4]; float *restrict scratch = buf[5];
const int64_t batch = dim[0], height = dim[1], width = dim[2], out_height = dim[3], out_width = dim[4];"""
BOTH = pytest.mark.parametrize("target", ["v3", "v4"])
TILES = pytest.mark.parametrize("tile", [2, 4])


@dataclass(frozen=True)
class Case:
    """A 3x3 convolution; padding above and at the left, below and at the right."""

    channels: int
    outputs: int
    padding: tuple[int, int] = (1, 1)
    groups: int = 1


CASES = {
    "3 to 20": Case(3, 20),
    "40 to 33, no padding, groups of panels": Case(40, 33, (0, 0), groups=2),
    "20 to 48, wide padding": Case(20, 48, (1, 2)),
}
IMAGES = [(2, (7, 7)), (1, (13, 9)), (1, (1, 1)), (2, (2, 3)), (1, (4, 37)), (3, (3, 3))]


def build(native, case, tile, target, compiler="gcc"):
    """y = max(conv(x) + bias + add, 0)."""
    blocks = -(-case.outputs // 16)
    hole = native.Hole(
        f"const int64_t at = ((n * {blocks} + cb) * out_height * out_width + p) * 16;",
        "const float sum = acc + bias[cb * 16 + lane] + add[at + lane]; y[at + lane] = sum > 0.0f ? sum : 0.0f;",
    )
    source = native.render(
        "winograd.c.jinja", name="convolve", prelude=POINTERS, N="batch", H="height", W="width", OH="out_height",
        OW="out_width", IC=case.channels, OC=case.outputs, TILE=tile, GROUPS=case.groups, MOST=MOST, BANDS=BANDS,
        padding=case.padding, x_base="x", w_base="w", scratch="scratch", epilogue=hole,
    )  # fmt: skip
    return native.build(source, "convolve", target, compiler)


def blocked(x, new_array):
    """Channels-blocked, with NaN in the lanes beyond the last channel: they must never be read as data."""
    image = block_channels(x)
    result = new_array(image.shape)
    result[...] = image
    if tail := x.shape[1] % 16:
        result[:, -1, ..., tail:] = np.nan
    return result


def arguments(case, tile, batch, image, new_array, seed=0):
    """Arrays, sizes, number of units and the expected output."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((batch, case.channels, *image)).astype(np.float32)
    w = generator.standard_normal((case.outputs, case.channels, 3, 3)).astype(np.float32)
    bias = generator.standard_normal(case.outputs).astype(np.float32)
    out = tuple(size + 2 * margin - 2 for size, margin in zip(image, case.padding, strict=True))
    add = generator.standard_normal((batch, case.outputs, *out)).astype(np.float32)
    tensors = (torch.from_numpy(array).double() for array in (x, w, bias))
    expected = (torch.conv2d(*tensors, padding=case.padding) + torch.from_numpy(add)).relu().numpy()
    y = new_array((batch, -(-case.outputs // 16), *out, 16))
    units = winograd_units(batch, *out, Choice(tile, case.groups))
    scratch = new_array((max(units, 1), scratch_floats(case.channels, tile)))
    arrays = [blocked(x, new_array), pack_winograd(w, tile), y, bias, blocked(add, new_array), scratch]
    return arrays, [batch, *image, *out], units, expected


def check(case, y, expected):
    """All channels right, and nothing written in the lanes beyond the last one.

    The bound is that of direct convolution's test: tiles of 2x2 are more precise, those of 4x4 lose one bit, which sums
    of random numbers leave unused.
    """
    n, blocks, h, w, _ = y.shape
    flat = y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * 16, h, w)
    got, rest = flat[:, : case.outputs], flat[:, case.outputs :]
    assert not np.isnan(got).any()
    error = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert error < 3e-7 * (1 + (case.channels * 9) ** 0.5), error
    assert np.isnan(rest).all()


@pytest.mark.sanitize("wide padding-4")
@BOTH
@TILES
@pytest.mark.parametrize("key", CASES)
def test_against_torch(native, new_array, key, tile, target):
    case = CASES[key]
    kernel = build(native, case, tile, target)
    for batch, image in IMAGES:
        if min(size + 2 * margin for size, margin in zip(image, case.padding, strict=True)) < 3:
            continue
        arrays, sizes, units, expected = arguments(case, tile, batch, image, new_array)
        assert kernel(arrays, sizes, units) == 0
        check(case, arrays[2], expected)


@pytest.mark.parametrize(("target", "tile"), [("v3", 4), ("v4", 2), ("v4", 4)])
def test_with_clang(native, new_array, tile, target):
    case = CASES["20 to 48, wide padding"]
    kernel = build(native, case, tile, target, "zig")
    for batch, image in IMAGES:
        arrays, sizes, units, expected = arguments(case, tile, batch, image, new_array)
        kernel(arrays, sizes, units)
        check(case, arrays[2], expected)


@BOTH
def test_same_bits_however_units_are_split_and_alone_as_in_a_batch(native, new_array, target):
    case, tile = CASES["40 to 33, no padding, groups of panels"], 4
    kernel = build(native, case, tile, target)
    arrays, sizes, units, _ = arguments(case, tile, 3, (19, 18), new_array)
    assert units >= 8
    kernel(arrays, sizes, units)
    whole = arrays[2].copy()
    for step in (1, 2, 5):
        arrays[2][...], arrays[5][...] = np.nan, np.nan
        for begin in reversed(range(0, units, step)):
            kernel(arrays, sizes, begin, min(units, begin + step))
        np.testing.assert_array_equal(arrays[2], whole)
    x, w, y, bias, add, scratch = arrays
    alone = new_array(y[:1].shape)
    own = winograd_units(1, *sizes[3:], Choice(tile, case.groups))
    kernel([x[1:2].copy(), w, alone, bias, add[1:2].copy(), scratch], [1, *sizes[1:]], own)
    np.testing.assert_array_equal(alone, whole[1:2])


def test_empty_batch(native, new_array):
    case = CASES["3 to 20"]
    arrays, sizes, units, _ = arguments(case, 4, 0, (5, 5), new_array)
    assert units == 0
    assert build(native, case, 4, "v3")(arrays, sizes, units) == 0


@TILES
def test_filters_of_one_dimension(tile):
    """Multiplying by points is exact for polynomials: with the input's transform from the definition, no error is left.

    ``B' d`` is what makes ``A' [(G g) . (B' d)]`` the convolution of every ``g``, so solving for it must succeed.
    """
    matrix = filter_matrix(tile)
    points = [row[1] / row[0] for row in matrix[:-1]]
    back = np.array([[point**power for point in points] + [float(power == tile - 1)] for power in range(tile)])
    shifts = np.zeros((tile, 3, tile + 2))
    for output in range(tile):
        for tap in range(3):
            shifts[output, tap, output + tap] = 1.0
    system = np.einsum("op,pt->otp", back, matrix).reshape(tile * 3, tile + 2)
    found, *_ = np.linalg.lstsq(system, shifts.reshape(tile * 3, tile + 2), rcond=None)
    np.testing.assert_allclose(system @ found, shifts.reshape(tile * 3, tile + 2), atol=1e-12)


def test_packing_keeps_dtype_and_fills_up_with_zeros():
    weight = np.random.default_rng(0).standard_normal((33, 5, 3, 3)).astype(np.float32)
    packed = pack_winograd(weight, 4)
    assert packed.dtype == np.float32 and packed.shape == (2, 36, 5, 32)
    matrix = filter_matrix(4)
    np.testing.assert_allclose(packed[1, :, 4, 0].reshape(6, 6), matrix @ weight[32, 4] @ matrix.T, rtol=1e-6)
    assert not packed[1, :, :, 1:].any()

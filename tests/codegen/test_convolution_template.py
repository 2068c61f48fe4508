"""convolution.c.jinja and convolution_gathered.c.jinja against torch in double precision."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tilewright.codegen.c.packing import (
    block_channels,
    can_convolve_blocked,
    convolution_gathered_units,
    convolution_units,
    pack_convolution,
    pack_convolution_gathered,
    tile_rows,
)

POINTERS = "const float *restrict x = buf[0]; const float *restrict w = buf[1]; float *restrict y = buf[2];"
SIZES = "const int64_t height = dim[0], width = dim[1], out_height = dim[2], out_width = dim[3], images = dim[4];"
PRELUDES = {"f32": f"{POINTERS}\nconst float *restrict bias = buf[3];\n{SIZES}"}
PRELUDES["bf16"] = (
    PRELUDES["f32"]
    .replace("const float *restrict x", "const uint16_t *restrict x")
    .replace("const float *restrict w", "const uint16_t *restrict w")
)
BOTH = pytest.mark.parametrize("target", ["v3", "v4"])
EVERY = pytest.mark.parametrize("target", ["v3", "v4base", "v4"])
TWO = pytest.mark.parametrize(("target", "compiler"), [("v3", "gcc"), ("v4", "zig")], ids=lambda text: text)


@dataclass(frozen=True)
class Case:
    """A convolution; pairs are (height, width)."""

    channels: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output(self, image):
        """Size of the output image, symmetric padding."""
        sizes = zip(image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)

    def context(self):
        """What both templates take, with the image's sizes as variables."""
        blocks = -(-self.outputs // 16)
        return {
            "name": "convolve", "N": "images",
            "H": "height", "W": "width", "OH": "out_height", "OW": "out_width",
            "IC": self.channels, "OC": self.outputs, "groups": self.groups,
            "KH": self.kernel[0], "KW": self.kernel[1],
            "stride": self.stride, "padding": self.padding, "dilation": self.dilation,
            "w_base": "w",
            "row": f"float *restrict to = y + ((n * {blocks} + cb) * out_height * out_width + p) * 16;",
        }  # fmt: skip


def bits(array):
    """bfloat16 as the kernels read it, of numbers that are such already."""
    return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)


def data(case, batch, image, kind="f32", seed=0):
    """Input, weight and bias as float32; of bf16 kernels, numbers that bfloat16 has."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((batch, case.channels, *image)).astype(np.float32)
    w = generator.standard_normal((case.outputs, case.channels // case.groups, *case.kernel)).astype(np.float32)
    bias = generator.standard_normal(case.outputs).astype(np.float32)
    if kind == "bf16":
        x, w = (torch.from_numpy(array).bfloat16().float().numpy() for array in (x, w))
    return x, w, bias


def reference(case, x, w, bias):
    tensors = (torch.from_numpy(array).double() for array in (x, w, bias))
    return torch.conv2d(*tensors, case.stride, case.padding, case.dilation, case.groups).numpy()


def blocked(x, new_array):
    """Channels-blocked, with NaN in the lanes beyond the last channel: they must never be read."""
    image = block_channels(x)
    result = new_array(image.shape)
    result[...] = image
    if tail := x.shape[1] % 16:
        result[:, -1, ..., tail:] = np.nan
    return result


def check(case, y, expected):
    """All channels right, and nothing written in the lanes beyond the last one."""
    n, blocks, h, w, _ = y.shape
    flat = y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * 16, h, w)
    got, rest = flat[:, : case.outputs], flat[:, case.outputs :]
    terms = case.channels // case.groups * case.kernel[0] * case.kernel[1]
    assert not np.isnan(got).any()
    error = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert error < 3e-7 * (1 + terms**0.5), error
    assert np.isnan(rest).all()


def blocked_kernel(native, case, target, compiler="gcc", kind="f32", pixels=None):
    """With ``pixels``, only the tiles of an output image of so many."""
    context = case.context()
    if pixels is not None:
        context["rows_used"] = {rows: tile_rows(pixels, rows) for rows in (6, 12)}
    row = context.pop("row")
    hole = native.Hole(row, "to[lane] = acc + bias[cb * 16 + lane];")
    source = native.render(
        "convolution.c.jinja", prelude=PRELUDES[kind], kind=kind, x_base="x", epilogue=hole, **context,
    )  # fmt: skip
    return native.build(source, "convolve", target, compiler)


def gathered_kernel(native, case, target, compiler="gcc", kind="f32"):
    """Reads the input, float32, as [N, H, W, C] and halves it on the way."""
    context = case.context()
    del context["N"]
    hole = native.Hole(context.pop("row"), "to[lane] = acc + bias[cb * 16 + lane];")
    load = native.Hole(
        f"const float *restrict from = x + (n * height + ih) * width * {case.channels} + ic;",
        f"const float x_value = 0.5f * from[iw * {case.channels}];",
    )
    prelude = PRELUDES[kind].replace("const uint16_t *restrict x", "const float *restrict x") + " (void)images;"
    source = native.render(
        "convolution_gathered.c.jinja", prelude=prelude, kind=kind, load_x=load, epilogue=hole, **context
    )
    return native.build(source, "convolve", target, compiler)


def arguments(native, case, batch, image, new_array, gathered=False, kind="f32"):
    """Arrays, sizes, number of units and the expected output."""
    x, w, bias = data(case, batch, image, kind)
    out = case.output(image)
    y = new_array((batch, -(-case.outputs // 16), *out, 16))
    weight = bits(w) if kind == "bf16" else w
    if gathered:
        packed = pack_convolution_gathered(weight, case.groups)
        arrays = [np.ascontiguousarray(2 * x.transpose(0, 2, 3, 1)), packed, y, bias]
        geometry = (case.kernel, case.stride, case.dilation)
        units = convolution_gathered_units(batch, *out, case.outputs, case.groups, *geometry)
    else:
        image_of_x = blocked(x, new_array)
        arrays = [bits(image_of_x) if kind == "bf16" else image_of_x, pack_convolution(weight), y, bias]
        units = convolution_units(batch, *out, case.outputs)
    return arrays, [*image, *out, batch], units, reference(case, x, w, bias)


BLOCKED = {
    "pointwise": (Case(40, 72, (1, 1)), [(2, (13, 11)), (1, (1, 1)), (1, (7, 7))]),
    "pointwise, one channel": (Case(1, 1, (1, 1)), [(1, (5, 3))]),
    "pointwise, stride": (Case(32, 32, (1, 1), (2, 2)), [(1, (14, 13))]),
    "3x3": (Case(48, 33, padding=(1, 1)), [(2, (14, 14)), (1, (7, 7)), (1, (1, 1)), (1, (2, 30)), (1, (40, 3))]),
    "3x3, stride": (Case(16, 64, stride=(2, 2), padding=(1, 1)), [(1, (28, 27)), (1, (3, 2))]),
    "3x3, no padding": (Case(17, 20), [(1, (9, 8)), (1, (3, 3))]),
    "5x2, dilation": (Case(20, 40, (5, 2), (1, 3), (4, 2), (2, 3)), [(1, (12, 17))]),
    "padding wider than the image": (Case(16, 16, (7, 7), padding=(6, 6)), [(1, (2, 1))]),
    "groups": (Case(64, 128, padding=(1, 1), groups=2), [(2, (6, 5))]),
    "deep": (Case(256, 32, padding=(1, 1)), [(1, (5, 5))]),
    "chunks, the last one odd": (Case(130, 33, padding=(1, 1)), [(1, (8, 7)), (1, (13, 11))]),
    "chunks, pointwise": (Case(1030, 40, (1, 1)), [(2, (7, 7)), (1, (1, 1))]),
}


@pytest.mark.sanitize("5x2", "groups", "chunks, the")
@BOTH
@pytest.mark.parametrize("key", BLOCKED)
def test_blocked(native, new_array, key, target):
    case, images = BLOCKED[key]
    kernel = blocked_kernel(native, case, target)
    for batch, image in images:
        arrays, sizes, units, expected = arguments(native, case, batch, image, new_array)
        assert kernel(arrays, sizes, units) == 0
        check(case, arrays[2], expected)


@EVERY
@pytest.mark.parametrize("pixels", [1, 2, 13, 49, 100, 196, 784])
def test_only_the_tiles_of_an_image(native, new_array, target, pixels):
    """A kernel for one size of image has no code for other tiles, and would stop where it met one."""
    case = Case(32, 48, (1, 1))
    kernel = blocked_kernel(native, case, target, pixels=pixels)
    arrays, sizes, units, expected = arguments(native, case, 1, (1, pixels), new_array)
    assert kernel(arrays, sizes, units) == 0
    check(case, arrays[2], expected)


@BOTH
@pytest.mark.parametrize("key", ["pointwise", "3x3"])
def test_blocked_with_clang(native, new_array, key, target):
    case, images = BLOCKED[key]
    kernel = blocked_kernel(native, case, target, "zig")
    for batch, image in images:
        arrays, sizes, units, expected = arguments(native, case, batch, image, new_array)
        kernel(arrays, sizes, units)
        check(case, arrays[2], expected)


WORDS = {
    "pointwise": (Case(42, 72, (1, 1)), [(2, (13, 11)), (1, (1, 1))]),
    "two channels": (Case(2, 1, (1, 1)), [(1, (5, 3))]),
    "3x3, stride": (Case(18, 40, stride=(2, 2), padding=(1, 1)), [(1, (28, 27)), (1, (3, 2))]),
    "groups": (Case(64, 128, padding=(1, 1), groups=2), [(2, (6, 5))]),
}


@pytest.mark.sanitize("groups")
@EVERY
@pytest.mark.parametrize("key", WORDS)
def test_blocked_bfloat16(native, new_array, key, target):
    case, images = WORDS[key]
    kernel = blocked_kernel(native, case, target, kind="bf16")
    for batch, image in images:
        arrays, sizes, units, expected = arguments(native, case, batch, image, new_array, kind="bf16")
        assert kernel(arrays, sizes, units) == 0
        check(case, arrays[2], expected)


@EVERY
def test_many_groups_of_panels(native, new_array, target):
    """More weights than the second-level cache takes: units go through groups of panels."""
    for kind, case in (("f32", Case(304, 168, padding=(1, 1))), ("bf16", Case(304, 328, padding=(1, 1)))):
        kernel = blocked_kernel(native, case, target, kind=kind)
        arrays, sizes, units, expected = arguments(native, case, 2, (11, 10), new_array, kind=kind)
        for begin, end in ((0, 3), (3, 4), (4, units - 5), (units - 5, units)):
            assert kernel(arrays, sizes, begin, end) == 0
        check(case, arrays[2], expected)


GATHERED = {
    "stem 7x7 of RGB": (
        Case(3, 64, (7, 7), (2, 2), (3, 3)),
        [(1, (56, 56)), (2, (23, 18)), (1, (1, 1)), (1, (16, 250))],
    ),
    "patches": (Case(3, 70, (16, 16), (16, 16)), [(1, (224, 224)), (2, (33, 47))]),
    "pointwise": (Case(5, 3, (1, 1)), [(1, (9, 200))]),
    "many channels": (Case(600, 20, (3, 3), padding=(1, 1)), [(1, (9, 8))]),
    "groups of 3 to 5": (Case(12, 20, (3, 2), (1, 2), (1, 1), groups=4), [(2, (8, 9))]),
    "one channel to two": (Case(6, 12, (3, 3), padding=(1, 1), groups=6), [(1, (5, 6))]),
    "groups of 40 to 40": (Case(80, 80, (3, 3), padding=(1, 1), groups=2), [(1, (5, 6))]),
    "dilation": (Case(4, 33, (3, 4), (2, 1), (5, 6), (5, 3)), [(1, (12, 17)), (1, (3, 4))]),
    "padding wider than the image": (Case(2, 16, (7, 7), padding=(6, 6)), [(1, (2, 1))]),
    "one long window": (Case(1, 2, (1, 1000), (1, 160), (0, 300)), [(3, (1, 5000))]),
}


@pytest.mark.sanitize("dilation")
@BOTH
@pytest.mark.parametrize("key", GATHERED)
def test_gathered(native, new_array, key, target):
    case, images = GATHERED[key]
    kernel = gathered_kernel(native, case, target)
    for batch, image in images:
        arrays, sizes, units, expected = arguments(native, case, batch, image, new_array, gathered=True)
        assert kernel(arrays, sizes, units) == 0
        check(case, arrays[2], expected)


@BOTH
@pytest.mark.parametrize("key", ["stem 7x7 of RGB", "groups of 3 to 5"])
def test_gathered_with_clang(native, new_array, key, target):
    case, images = GATHERED[key]
    kernel = gathered_kernel(native, case, target, "zig")
    for batch, image in images:
        arrays, sizes, units, expected = arguments(native, case, batch, image, new_array, gathered=True)
        kernel(arrays, sizes, units)
        check(case, arrays[2], expected)


SEGMENTS = {
    "stem 7x7 of RGB": (Case(3, 64, (7, 7), (2, 2), (3, 3)), [(1, (56, 56)), (2, (23, 18)), (1, (1, 1))]),
    "patches": (Case(3, 70, (16, 16), (16, 16)), [(1, (224, 224)), (2, (33, 47))]),
    "many channels": (Case(601, 20, (3, 3), padding=(1, 1)), [(1, (9, 8))]),
    "groups of 3 to 5": (Case(12, 20, (3, 2), (1, 2), (1, 1), groups=4), [(2, (8, 9))]),
    "one long window": (Case(1, 2, (1, 1000), (1, 160), (0, 300)), [(3, (1, 5000))]),
}


@pytest.mark.sanitize("long window")
@EVERY
@pytest.mark.parametrize("key", SEGMENTS)
def test_gathered_bfloat16(native, new_array, key, target):
    case, images = SEGMENTS[key]
    kernel = gathered_kernel(native, case, target, kind="bf16")
    for batch, image in images:
        arrays, sizes, units, expected = arguments(native, case, batch, image, new_array, gathered=True, kind="bf16")
        assert kernel(arrays, sizes, units) == 0
        check(case, arrays[2], expected)


@TWO
@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("gathered", [False, True], ids=["blocked", "gathered"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_same_bits_however_units_are_split_and_alone_as_in_a_batch(
    native, new_array, target, compiler, gathered, kernel_size, kind
):
    case = Case(36, 72, (kernel_size,) * 2, padding=(kernel_size // 2,) * 2)
    kernel = (gathered_kernel if gathered else blocked_kernel)(native, case, target, compiler, kind)
    arrays, sizes, units, _ = arguments(native, case, 3, (13, 12), new_array, gathered, kind)
    kernel(arrays, sizes, units)
    whole = arrays[2].copy()
    for step in (1, 2, 5):
        arrays[2][...] = np.nan
        for begin in reversed(range(0, units, step)):
            kernel(arrays, sizes, begin, min(units, begin + step))
        np.testing.assert_array_equal(arrays[2], whole)
    alone = new_array(arrays[2][:1].shape)
    kernel([arrays[0][1:2].copy(), arrays[1], alone, arrays[3]], [*sizes[:-1], 1], units // 3)
    np.testing.assert_array_equal(alone, whole[1:2])


@BOTH
@pytest.mark.parametrize("gathered", [False, True], ids=["blocked", "gathered"])
def test_empty_batch(native, new_array, target, gathered):
    case = Case(16, 16)
    kernel = (gathered_kernel if gathered else blocked_kernel)(native, case, target)
    arrays, sizes, units, _ = arguments(native, case, 0, (5, 5), new_array, gathered)
    assert units == 0
    assert kernel(arrays, sizes, units) == 0


def test_what_the_blocked_kernel_takes():
    assert can_convolve_blocked(7, 5, 1, (3, 3))
    assert can_convolve_blocked(64, 64, 2, (3, 3))
    assert not can_convolve_blocked(64, 32, 2, (3, 3))
    assert not can_convolve_blocked(24, 64, 2, (3, 3))
    assert not can_convolve_blocked(16, 16, 1, (65, 1))

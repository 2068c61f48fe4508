"""depthwise.c.jinja against torch in double precision."""

import numpy as np
import pytest
import torch

from tilewright.codegen.c.packing import block_channels, can_convolve_depthwise, depthwise_units, pack_depthwise

POINTERS = "const float *restrict x = buf[0]; const float *restrict w = buf[1]; float *restrict y = buf[2];"
SIZES = "const int64_t height = dim[0], width = dim[1], out_height = dim[2], out_width = dim[3];"

# channels, kernel, stride, padding, dilation
CASES = {
    "3x3": (32, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, stride": (40, (3, 3), (2, 2), (1, 1), (1, 1)),
    "5x5": (17, (5, 5), (1, 1), (2, 2), (1, 1)),
    "one channel": (1, (3, 2), (2, 3), (0, 1), (1, 1)),
    "dilation": (16, (3, 3), (1, 2), (4, 3), (4, 3)),
    "far apart": (16, (5, 5), (1, 1), (36, 36), (18, 18)),
    "stride beyond the kernel": (16, (2, 2), (5, 4), (0, 0), (1, 1)),
    "large": (16, (31, 31), (1, 1), (15, 15), (1, 1)),
}
IMAGES = [(1, (7, 7)), (2, (14, 13)), (1, (1, 1)), (1, (20, 150)), (1, (45, 44))]


def kernel_of(native, case, target, compiler, kind):
    channels, kernel, stride, padding, dilation = case
    hole = native.Hole(
        f"float *restrict to = y + ((n * {-(-channels // 16)} + cb) * out_height * out_width + p) * 16;",
        "to[lane] = acc + bias[cb * 16 + lane];",
    )
    pointers = POINTERS.replace("const float *restrict x", "const uint16_t *restrict x") if kind == "bf16" else POINTERS
    source = native.render(
        "depthwise.c.jinja",
        name="depthwise",
        prelude=f"{pointers}\nconst float *restrict bias = buf[3];\n{SIZES}",
        C=channels, H="height", W="width", OH="out_height", OW="out_width",
        KH=kernel[0], KW=kernel[1], stride=stride, padding=padding, dilation=dilation,
        kind=kind, x_base="x", w_base="w", epilogue=hole,
    )  # fmt: skip
    return native.build(source, "depthwise", target, compiler)


def arguments(case, batch, image, new_array, kind):
    """Arrays, sizes, number of units and the expected output; None when the output would be empty."""
    channels, kernel, stride, padding, dilation = case
    sizes = zip(image, kernel, stride, padding, dilation, strict=True)
    out = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
    if min(out) < 1:
        return None
    generator = np.random.default_rng(0)
    x = generator.standard_normal((batch, channels, *image)).astype(np.float32)
    if kind == "bf16":
        x = torch.from_numpy(x).bfloat16().float().numpy()
    w = generator.standard_normal((channels, 1, *kernel)).astype(np.float32)
    bias = generator.standard_normal(channels).astype(np.float32)
    tensors = (torch.from_numpy(array).double() for array in (x, w, bias))
    expected = torch.conv2d(*tensors, stride, padding, dilation, channels).numpy()
    y = new_array((batch, -(-channels // 16), *out, 16))
    units = depthwise_units(batch, channels, *out, kernel, stride, dilation)
    blocked = block_channels(x)
    if kind == "bf16":
        blocked = (blocked.view(np.uint32) >> 16).astype(np.uint16)
    return [blocked, pack_depthwise(w), y, bias], [*image, *out], units, expected


def check(case, y, expected):
    n, blocks, h, w, _ = y.shape
    flat = y.transpose(0, 1, 4, 2, 3).reshape(n, blocks * 16, h, w)
    assert not np.isnan(flat[:, : case[0]]).any()
    assert np.isnan(flat[:, case[0] :]).all()
    error = np.abs(flat[:, : case[0]] - expected).max() / np.abs(expected).max()
    assert error < 3e-7 * (1 + case[1][0] * case[1][1]) ** 0.5, error


@pytest.mark.sanitize("5x5", "bf16")
@pytest.mark.parametrize(
    ("key", "target", "compiler", "kind"),
    [(key, target, "gcc", "f32") for key in CASES for target in ("v3", "v4")]
    + [("3x3", "v3", "zig", "f32"), ("5x5", "v4", "zig", "f32")]
    + [("3x3, stride", target, "gcc", "bf16") for target in ("v3", "v4base", "v4")]
    + [("dilation", "v4", "gcc", "bf16"), ("5x5", "v3", "zig", "bf16")],
    ids=lambda text: text,
)
def test_depthwise(native, new_array, key, target, compiler, kind):
    case = CASES[key]
    kernel = kernel_of(native, case, target, compiler, kind)
    for batch, image in IMAGES:
        prepared = arguments(case, batch, image, new_array, kind)
        if prepared is None:
            continue
        arrays, sizes, units, expected = prepared
        assert kernel(arrays, sizes, units) == 0
        check(case, arrays[2], expected)
        whole = arrays[2].copy()
        arrays[2][...] = np.nan
        step = max(1, units // 50)
        for begin in range(0, units, step):
            kernel(arrays, sizes, begin, min(units, begin + step))
        np.testing.assert_array_equal(arrays[2], whole)


def test_what_fits_its_scratch():
    assert can_convolve_depthwise((31, 31), (1, 1))
    assert can_convolve_depthwise((5, 5), (18, 18))
    assert not can_convolve_depthwise((40, 40), (1, 1))

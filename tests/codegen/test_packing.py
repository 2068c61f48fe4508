"""Packed layouts, element by element, and unit formulas on symbolic sizes."""

import numpy as np
import pytest

from tilewright.codegen.c import packing
from tilewright.runtime import sizes


def numbers(*shape):
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 70])
def test_panels(n):
    weight = numbers(5, n)
    packed = packing.pack_matmul(weight)
    assert packed.shape == (-(-n // 32), 5, 32) and packed.flags.c_contiguous and packed.dtype == np.float32
    for k in range(5):
        for column in range(packed.shape[0] * 32):
            expected = weight[k, column] if column < n else 0
            assert packed[column // 32, k, column % 32] == expected


def test_panels_of_a_batch():
    weight = numbers(2, 3, 4, 40)
    packed = packing.pack_matmul(weight)
    assert packed.shape == (2, 3, 2, 4, 32)
    np.testing.assert_array_equal(packed[1, 2], packing.pack_matmul(weight[1, 2]))


@pytest.mark.parametrize(("dtype", "per"), [(np.uint16, 2), (np.int8, 4)])
def test_panels_of_words(dtype, per):
    weight = np.arange(1, 1 + 7 * 40).reshape(7, 40).astype(dtype)
    packed = packing.pack_words(weight)
    assert packed.shape == (2, -(-7 // per), 32, per) and packed.flags.c_contiguous and packed.dtype == dtype
    for k in range(packed.shape[1] * per):
        for column in range(64):
            expected = weight[k, column] if k < 7 and column < 40 else 0
            assert packed[column // 32, k // per, column % 32, k % per] == expected


def test_panels_of_bytes_end_with_the_offsets_of_their_columns():
    weight = np.random.default_rng(0).integers(-128, 128, (2, 9, 33), np.int8)
    packed = packing.pack_bytes(weight)
    assert packed.shape == (2, 2, 4, 32, 4)
    np.testing.assert_array_equal(packed[..., :-1, :, :], packing.pack_words(weight))
    offsets = packed[..., -1, :, :].copy().view("<i4").reshape(2, 64)
    np.testing.assert_array_equal(offsets[:, :33], 128 * weight.astype(np.int32).sum(1))
    assert not offsets[:, 33:].any()


def test_convolution_weights_run_over_blocks_then_taps_then_channels():
    weight = numbers(34, 20, 2, 3)
    packed = packing.pack_convolution(weight)
    assert packed.shape == (2, 20 * 6, 32)
    row = 0
    for block, size in ((0, 16), (1, 4)):
        for i in range(2):
            for j in range(3):
                for channel in range(size):
                    for output in range(64):
                        expected = weight[output, block * 16 + channel, i, j] if output < 34 else 0
                        assert packed[output // 32, row, output % 32] == expected
                    row += 1


def test_gathered_weights_pad_every_group():
    weight = numbers(6, 2, 2, 2)
    packed = packing.pack_convolution_gathered(weight, groups=3)
    assert packed.shape == (3, 1, 8, 32)
    for output in range(6):
        np.testing.assert_array_equal(packed[output // 2, 0, :, output % 2], weight[output].ravel())
    assert not packed[..., 2:].any()


def test_depthwise_weights():
    weight = numbers(18, 1, 3, 2)
    packed = packing.pack_depthwise(weight)
    assert packed.shape == (2, 3, 2, 16)
    for channel in range(18):
        np.testing.assert_array_equal(packed[channel // 16, ..., channel % 16], weight[channel, 0])
    assert not packed[1, ..., 2:].any()


def test_blocked_channels_and_back():
    image = numbers(2, 19, 3, 4)
    blocked = packing.block_channels(image)
    assert blocked.shape == (2, 2, 3, 4, 16)
    assert blocked[1, 1, 2, 3, 2] == image[1, 18, 2, 3]
    np.testing.assert_array_equal(packing.unblock_channels(blocked, 19), image)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
def test_packing_keeps_the_dtype(dtype):
    weight = np.ones((32, 16, 1, 1), dtype)
    for packed in (
        packing.pack_matmul(weight[..., 0, 0]),
        packing.pack_convolution(weight),
        packing.block_channels(weight),
    ):
        assert packed.dtype == dtype


@pytest.mark.parametrize("batch, height, width", [(1, 1, 1), (2, 7, 9), (3, 112, 200), (1, 5, 1000)])
def test_symbolic_units_equal_those_of_numbers(batch, height, width):
    geometry = ((3, 5), (2, 1), (1, 2))
    formulas = (
        lambda n, h, w: packing.matmul_units(n, sizes.mul(h, w), h),
        lambda n, h, w: packing.convolution_units(n, h, w, 70),
        lambda n, h, w: packing.convolution_gathered_units(n, h, w, 70, 2, *geometry),
        lambda n, h, w: packing.depthwise_units(n, 70, h, w, *geometry),
        lambda n, h, w: packing.depthwise_units(n, 70, h, w, (3, 5), (2, 1), (2, 2)),
    )
    for formula in formulas:
        symbolic = sizes.evaluate(formula("n", "h", "w"), {"n": batch, "h": height, "w": width})
        assert symbolic == formula(batch, height, width) > 0

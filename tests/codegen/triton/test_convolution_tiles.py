"""How the convolution kernels of the Triton dialect cut their work."""

from __future__ import annotations

import itertools

import pytest

from tilewright.codegen.triton.convolution_tiles import SHARED_MEMORY, Shape, depthwise_tiles, product_tiles
from tilewright.runtime.plan import COUNTERS

PIXELS, CHANNELS, TERMS = (1, 49, 3136, 802816), (1, 3, 24, 64, 1000), ((0, 27), (0, 147), (9, 16), (1, 72), (9, 512))
SHAPES = [
    Shape(pixels, 2 * pixels, outputs, groups, runs, run, 4 if unit != "half" else 2, unit)
    for pixels, outputs, groups, (runs, run), unit in itertools.product(
        PIXELS, CHANNELS, (1, 4), TERMS, ("half", "tf32", "ieee")
    )
]


def test_every_shape_has_tiles_that_fit():
    for shape in SHAPES:
        tiles = product_tiles(shape, 3)
        assert 1 <= len(tiles) <= 3
        assert len({tile.name for tile in tiles}) == len(tiles)
        assert len({tile.values()["BLOCK_K"] for tile in tiles}) == 1
        for tile in tiles:
            values = tile.values()
            m, n, k, split = (values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
            assert (m + n) * k * shape.item * tile.stages <= SHARED_MEMORY
            assert n == 16 or n < 2 * shape.outputs
            count = -(-shape.most // m) * -(-shape.outputs // n) * shape.groups
            assert split == 1 or count <= COUNTERS
            assert split <= shape.steps(k)


def test_what_is_chosen():
    """Few pixels and many terms are split; many pixels take large tiles."""
    few = product_tiles(Shape(49, 49, 512, 1, 9, 512, 2, "half"), 1)[0].values()
    many = product_tiles(Shape(200704, 200704, 256, 1, 9, 256, 2, "half"), 1)[0].values()
    assert few["SPLIT_K"] > 1 and few["BLOCK_M"] <= 64
    assert many["SPLIT_K"] == 1 and many["BLOCK_M"] * many["BLOCK_N"] >= 128 * 64


@pytest.mark.parametrize("channels", [1, 6, 17, 24, 72, 960])
@pytest.mark.parametrize("taps", [1, 9, 25, 49])
def test_depthwise_tiles(channels, taps):
    tiles = depthwise_tiles(channels, taps)
    assert tiles and len({tile.name for tile in tiles}) == len(tiles)

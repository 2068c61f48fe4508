"""How the convolution kernels of the Triton dialect cut their work."""

from __future__ import annotations

import itertools

import pytest

from tilewright.codegen.triton.convolution_tiles import SHARED_MEMORY, Shape, depthwise_tiles, product_tiles
from tilewright.runtime.plan import COUNTERS

PIXELS, CHANNELS, TERMS = (1, 49, 3136, 802816), (1, 3, 24, 64, 1000), ((0, 27), (0, 147), (9, 16), (1, 72), (9, 512))
SHAPES = [
    Shape(pixels, outputs, groups, runs, run, 4 if unit != "half" else 2, unit)
    for pixels, outputs, groups, (runs, run), unit in itertools.product(
        PIXELS, CHANNELS, (1, 4), TERMS, ("half", "tf32", "ieee")
    )
]


@pytest.mark.parametrize("smaller", [1, 7, 4096])
def test_every_shape_has_tiles_that_fit(smaller):
    for shape in SHAPES:
        choices = product_tiles(shape, shape.pixels // smaller)
        tiles = [choice.tile for choice in choices]
        assert 1 <= len(tiles) <= 4
        assert len({tile.name for tile in tiles}) == len(tiles)
        assert len({tile.values()["BLOCK_K"] for tile in tiles}) == 1
        assert choices[0].most >= shape.pixels, "the default tile may always be used"
        for choice in choices:
            values = choice.tile.values()
            m, n, k, split = (values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
            assert (m + n) * k * shape.item * choice.tile.stages <= SHARED_MEMORY
            assert n == 16 or n < 2 * shape.outputs
            count = -(-choice.most // m) * -(-shape.outputs // n) * shape.groups
            assert split == 1 or count <= COUNTERS
            assert split <= shape.steps(k)


def test_what_is_chosen():
    """Few pixels and many terms are split; many pixels take large tiles; both where there may be few or many."""
    few = product_tiles(Shape(49, 512, 1, 9, 512, 2, "half"), 49)[0].tile.values()
    many = product_tiles(Shape(200704, 256, 1, 9, 256, 2, "half"), 200704)[0].tile.values()
    assert few["SPLIT_K"] > 1 and few["BLOCK_M"] <= 64
    assert many["SPLIT_K"] == 1 and many["BLOCK_M"] * many["BLOCK_N"] >= 128 * 64
    both = [choice.tile.values() for choice in product_tiles(Shape(49 * 4096, 512, 1, 9, 512, 2, "half"), 49)]
    assert both[0]["SPLIT_K"] == 1 and few in both


@pytest.mark.parametrize("channels", [1, 6, 17, 24, 72, 960])
@pytest.mark.parametrize("taps", [1, 9, 25, 49])
def test_depthwise_tiles(channels, taps):
    tiles = depthwise_tiles(channels, taps)
    assert tiles and len({tile.name for tile in tiles}) == len(tiles)

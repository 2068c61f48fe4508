"""Which of the real tiles the cost model chooses on real GPUs: the choices that nobody would dispute."""

from __future__ import annotations

import pytest

from tilewright.codegen.triton.matmul_tiles import Extents, matmul_tiles
from tilewright.runtime import sizes, tiles
from tilewright.runtime.binaries import Binary
from tilewright.runtime.gpus import ARCHITECTURES, Gpu
from tilewright.runtime.plan import Tile, TileConstant, Variant

GPUS = {
    "sm_90": Gpu("NVIDIA H200", 9, 0, 132, 1.98e9, 4.8e12, 141 << 30, 227 << 10, 50 << 20),
    "sm_80": Gpu("NVIDIA A100", 8, 0, 108, 1.41e9, 1.555e12, 40 << 30, 163 << 10, 40 << 20),
}
BOTH = pytest.mark.parametrize("architecture", GPUS)


def binary(tile: Tile, shared: int, registers: int) -> Binary:
    return Binary(
        tile=tile.name, cubin="", ptx="", function="f", warps=tile.warps, cluster=1, shared=shared, static_shared=0,
        registers=registers, spill_stores=0, spill_loads=0, stack=0, global_scratch=0, global_scratch_alignment=1,
        profile_scratch=0, profile_scratch_alignment=1,
    )  # fmt: skip


def product(architecture: str, m: int, n: int, k: int, most: int = 8192) -> dict[str, int]:
    """The constants of the tile for a bfloat16 product ``[m, k] @ [k, n]`` whose rows vary up to ``most``."""
    extents = Extents("bfloat16", True, 1, "m", n, k, {"m": (1, most)}, descriptors=architecture == "sm_90")
    options = [
        one
        for one in matmul_tiles(extents, few=most <= 16)
        if not one.architectures or architecture in one.architectures
    ]
    named = {name for one in options for name in one.values()}
    units = sizes.mul(sizes.ceildiv(n, "BLOCK_N"), sizes.ceildiv("m", "BLOCK_M"))
    if "SPLIT_K" in named:
        units = sizes.mul(units, "SPLIT_K")
    if "PROGRAMS" in named:
        units = sizes.minimum(units, "PROGRAMS")
    traffic = sizes.add(sizes.mul("m", 2 * (n + k)), 2 * n * k)
    variant = Variant("product", (), (), units, 1, sizes.mul("m", 2 * n * k), traffic, tuple(options))
    binaries = {}
    for one in options:
        values = one.values()
        rows, columns = values["BLOCK_M"], values["BLOCK_N"]
        shared = one.stages * (rows + columns) * values["BLOCK_K"] * 2
        binaries[one.name] = binary(one, shared, min(255, 40 + rows * columns // (32 * one.warps)))
    gpu, traits = GPUS[architecture], tiles.Traits(2, True)
    return tiles.choose(variant, {"m": m}, binaries, architecture, gpu, traits).values()


@BOTH
@pytest.mark.parametrize(("m", "n", "k"), [(4096, 4096, 4096), (8192, 8192, 8192), (2048, 32000, 4096)])
def test_large_products(architecture, m, n, k):
    chosen = product(architecture, m, n, k)
    assert chosen["BLOCK_M"] * chosen["BLOCK_N"] >= 128 * 128
    assert chosen.get("PROGRAMS", 0) == (132 if architecture == "sm_90" else 0)
    assert chosen.get("SPLIT_K", 1) == 1


@BOTH
@pytest.mark.parametrize("m", [17, 32, 64])
def test_few_rows_of_many(architecture, m):
    """Weights are what takes time: there must be programs enough to read them."""
    chosen = product(architecture, m, 4096, 4096)
    assert chosen["BLOCK_M"] == 64 and not 1 < chosen.get("PROGRAMS", 1) < 2**31 - 1


@BOTH
@pytest.mark.parametrize("m", [1, 5, 16])
def test_at_most_sixteen_rows(architecture, m):
    assert product(architecture, m, 4096, 4096, most=16)["BLOCK_M"] == 16
    assert product(architecture, m, 512, 16384, most=16)["SPLIT_K"] > 1


@BOTH
def test_few_results_of_many_terms(architecture):
    assert product(architecture, 128, 768, 3072, most=128)["SPLIT_K"] > 1
    assert product(architecture, 4096, 768, 3072).get("SPLIT_K", 1) == 1


@BOTH
@pytest.mark.parametrize("n", [1, 1000, 128 * 1024])
def test_small_loops_take_small_blocks(architecture, n):
    """Nothing is won with large ones."""
    options = [Tile(str(size), (TileConstant("BLOCK", size),), size // 256, 1) for size in (1024, 4096)]
    count = sizes.ceildiv("n", "BLOCK")
    variant = Variant("loop", (), (), count, 1, "n", sizes.mul("n", 8), tuple(options))
    binaries = {one.name: binary(one, 0, 32) for one in options}
    gpu, traits = GPUS[architecture], tiles.Traits(4, False)
    assert tiles.choose(variant, {"n": n}, binaries, architecture, gpu, traits).name == "1024"


@BOTH
def test_estimates_are_near_the_roofs(architecture):
    """A product of 8192 is bound by arithmetic, a sum of two vectors by memory."""
    gpu, one = GPUS[architecture], ARCHITECTURES[architecture]
    tile = Tile("t", (TileConstant("BLOCK_M", 128), TileConstant("BLOCK_N", 256)), 8, 3)
    units = sizes.mul(sizes.ceildiv("n", "BLOCK_M"), sizes.ceildiv("n", "BLOCK_N"))
    cube = Variant("product", (), (), units, 1, 2 * 8192**3, 6 * 8192**2, (tile,))
    model = tiles.CostModel(cube, {"n": 8192}, one, gpu, tiles.Traits(2, True))
    seconds = model.seconds(tile, binary(tile, 144 << 10, 255), model.capacity(tile))
    peak = gpu.multiprocessors * gpu.clock * one.tensor
    assert 0.75 < 2 * 8192**3 / seconds / peak <= 1
    assert {"sm_90": 0.9e15, "sm_80": 0.29e15}[architecture] < peak < {"sm_90": 1.1e15, "sm_80": 0.33e15}[architecture]
    flat = Tile("f", (TileConstant("BLOCK", 1024),), 4, 1)
    add = Variant("loop", (), (), sizes.ceildiv("n", "BLOCK"), 1, "n", sizes.mul("n", 12), (flat,))
    model = tiles.CostModel(add, {"n": 1 << 28}, one, gpu, tiles.Traits(4, False))
    seconds = model.seconds(flat, binary(flat, 0, 32), model.capacity(flat))
    assert 0.75 < 12 * (1 << 28) / seconds / gpu.bandwidth <= 1

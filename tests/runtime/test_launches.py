"""From GPU plans to launches, and the choice among tiles: what depends on sizes alone, without any GPU."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest

from tilewright.runtime import binaries, gpus, sizes, tiles
from tilewright.runtime.binaries import Binary
from tilewright.runtime.errors import ArtifactError, ShapeError
from tilewright.runtime.gpus import ARCHITECTURES, Gpu
from tilewright.runtime.launches import Operand, cached_launches, make_launches
from tilewright.runtime.plan import COUNTERS, Tile, TileConstant, Variant

H200 = Gpu("H200", 9, 0, 132, 1.98e9, 4.8e12, 141 << 30, 227 << 10, 50 << 20)
HALF = tiles.Traits(2, tensor=True)


def first(step, variant, values):
    return tiles.allowed(variant, values)[0]


@pytest.fixture
def plans(gpu_parts):
    return {plan.entry: plan for plan in gpu_parts["plans"]["cuda"]}


# -- launches ----------------------------------------------------------------------------------------------------------


def test_launches(plans):
    found = make_launches(plans["main"], {"n": 40}, first)
    assert found.outputs == (((40, 4), 640),)
    assert (found.arena_bytes, found.offsets, found.values) == (640, (0,), {"n": 40})
    product, lookup = found.items
    assert (product.step, product.variant, product.kernel, product.tile.name) == (0, 1, "rows", "b32")
    assert (product.grid, product.sizes) == (2, (40,))
    assert product.operands == (
        Operand("input", 0, 0, 40 * 8 * 4, "float32"),
        Operand("constant", 0, 0, 128, "float32"),
        Operand("buffer", 0, 0, 640, "float32"),
    )
    assert lookup.operands[1:] == (
        Operand("constant", 1, 128, 160, "float32"),
        Operand("input", 1, 0, 320, "int64"),
        Operand("output", 0, 0, 640, "float32"),
        Operand("fault", 1, 4, 4, "int32"),
    )
    assert make_launches(plans["main"], {"n": 1}, first).items[0].kernel == "one_row"
    (count,) = make_launches(plans["count"], {}, first).items
    assert count.operands[3:] == (
        Operand("counters", 0, 0, 4 * COUNTERS, "int32"),
        Operand("state", 1, 0, 16, "int64"),
    )
    (empty,) = make_launches(plans["half"], {"h": 0}, first).items
    assert empty.grid == 0


def test_buffers_have_their_offsets(plans):
    chain = plans["chain"]
    (low,) = chain.buffers
    high = dataclasses.replace(low, name="u", below=(0,))
    operands = chain.steps[0].variants[0].operands
    above = tuple(dataclasses.replace(ref, index=1) if ref.kind == "buffer" else ref for ref in operands)
    step = dataclasses.replace(
        chain.steps[0], variants=(dataclasses.replace(chain.steps[0].variants[0], operands=above),)
    )
    found = make_launches(dataclasses.replace(chain, buffers=(low, high), steps=(step,)), {"n": 17}, first)
    assert found.offsets == (0, 128) and found.arena_bytes == 256
    assert found.items[0].operands[1] == Operand("buffer", 1, 128, 68, "float32")


def test_launches_are_remembered_by_shape(plans):
    asked = []

    def choose(step, variant, values):
        asked.append(step)
        return variant.tiles[0]

    launches = cached_launches(plans["main"], choose)
    assert launches(((3, 8), (3,)), ()) is launches(((3, 8), (3,)), ())
    assert asked == [0, 1]
    with pytest.raises(ShapeError, match="axis 1"):
        launches(((3, 7), (3,)), ())


def test_grids_have_a_limit(plans):
    chain = plans["chain"]
    variant = dataclasses.replace(chain.steps[0].variants[0], units=sizes.mul("n", 1 << 20))
    changed = dataclasses.replace(chain, steps=(dataclasses.replace(chain.steps[0], variants=(variant,)),))
    with pytest.raises(ShapeError, match=r"step 0 \(increment_0; origin unknown\) needs 2147483648 programs"):
        make_launches(changed, {"n": 2048}, first)
    assert make_launches(changed, {"n": 2047}, first).items[0].grid == 2047 << 20


# -- architectures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "ptx", "capability", "expected"),
    [
        (["sm_80", "sm_90"], [], (9, 0), ("sm_90", False)),
        (["sm_90", "sm_80"], [], (8, 9), ("sm_80", False)),
        (["sm_89", "sm_80"], [], (8, 6), ("sm_80", False)),
        (["sm_80", "sm_86"], [], (8, 9), ("sm_86", False)),
        (["sm_90"], ["sm_90"], (10, 0), None),
        (["sm_80"], ["sm_80"], (10, 0), ("sm_80", True)),
        (["sm_80", "sm_89"], ["sm_80", "sm_89"], (12, 0), ("sm_89", True)),
        (["sm_80", "sm_90"], ["sm_80"], (9, 0), ("sm_90", False)),
        (["sm_89"], ["sm_89"], (8, 0), None),
        (["sm_999"], ["sm_999"], (9, 0), None),
        ([], [], (9, 0), None),
    ],
)
def test_which_architecture_runs(names, ptx, capability, expected):
    assert gpus.fitting(names, *capability, ptx) == expected


# -- tiles -------------------------------------------------------------------------------------------------------------


def tile(m: int, n: int, warps: int = 4, guard: sizes.Size = 1, **more: int) -> Tile:
    constants = {"BLOCK_M": m, "BLOCK_N": n, **more}
    name = "x".join(map(str, constants.values()))
    return Tile(name, tuple(TileConstant(*item) for item in constants.items()), warps, 3, guard)


def matmul(*options: Tile, split: bool = False, m: sizes.Size = "m", n: int = 4096, k: int = 4096) -> Variant:
    units = sizes.mul(sizes.ceildiv(m, "BLOCK_M"), sizes.ceildiv(n, "BLOCK_N"))
    if split:
        units = sizes.mul(units, "SPLIT_K")
    work = sizes.mul(m, 2 * n * k)
    traffic = sizes.add(sizes.mul(m, 2 * (n + k)), 2 * n * k)
    return Variant("matmul", (), ("m",), units, 1, work, traffic, options)


def binary(one: Tile, **facts: int) -> Binary:
    m, n = one.values()["BLOCK_M"], one.values()["BLOCK_N"]
    registers = min(255, 40 + m * n // (32 * one.warps))
    made = sys.modules["tilewright_tests_cuda_toy"].binary(
        "matmul", one.name, registers=registers, shared=3 * 64 * 2 * (m + n), warps=one.warps
    )
    return dataclasses.replace(made, **facts)


def choice(variant: Variant, gpu: Gpu = H200, architecture: str = "sm_90", **values: int) -> str:
    found = {one.name: binary(one) for one in variant.tiles}
    return tiles.choose(variant, values, found, architecture, gpu, HALF).name


@pytest.fixture(autouse=True)
def _toy(gpu_parts):
    """``cuda_toy`` is loaded."""


def test_large_products_take_large_blocks():
    variant = matmul(tile(16, 64), tile(64, 64), tile(128, 128, 8), tile(128, 256, 8))
    assert choice(variant, m=8192) in ("128x128", "128x256")
    assert choice(variant, m=16) == "16x64"
    assert choice(variant, m=1) == "16x64"


def test_few_programs_split_their_sums():
    options = [tile(16, 64, SPLIT_K=split) for split in (1, 4)]
    assert choice(matmul(*options, split=True, n=512, k=16384), m=8) == "16x64x4"
    assert choice(matmul(*options, split=True, n=65536, k=512), m=16) == "16x64x1"


def test_what_reaches_over_the_edge_is_computed_in_vain():
    variant = matmul(tile(256, 128, 8), tile(64, 256, 8), n=256 * 250)
    assert choice(variant, m=320) == "64x256"
    assert choice(variant, m=512) == "256x128"


def test_persistent_programs_are_weighed_by_their_blocks():
    persistent = matmul(tile(128, 128, 8, PROGRAMS=132))
    persistent = dataclasses.replace(persistent, units=sizes.minimum(persistent.units, "PROGRAMS"))
    model = tiles.CostModel(persistent, {"m": 4096}, ARCHITECTURES["sm_90"], H200, HALF)
    (one,) = persistent.tiles
    assert (model.count(one), model.capacity(one)) == (32 * 32, 4096 * 4096)
    assert sizes.evaluate(persistent.units, {"m": 4096, **one.values()}) == 132


def test_persistent_programs_that_do_not_run_at_once_take_turns():
    """A GPU with fewer multiprocessors than the binary has programs runs some of these after all others."""
    options = [tile(128, 128, 8, PROGRAMS=132), tile(128, 128, 8, PROGRAMS=2**31 - 1)]
    variant = matmul(*options)
    variant = dataclasses.replace(variant, units=sizes.minimum(variant.units, "PROGRAMS"))
    assert choice(variant, m=8192).endswith("x132")
    fewer = dataclasses.replace(H200, multiprocessors=114)
    assert not choice(variant, gpu=fewer, m=8192).endswith("x132")


def test_capacity_is_what_is_covered():
    variant = matmul(tile(64, 64, SPLIT_K=4), split=True, n=100)
    model = tiles.CostModel(variant, {"m": 100}, ARCHITECTURES["sm_90"], H200, HALF)
    assert (model.count(variant.tiles[0]), model.capacity(variant.tiles[0])) == (16, 128 * 128)


def test_residency():
    variant = matmul(tile(64, 64))
    model = tiles.CostModel(variant, {"m": 64}, ARCHITECTURES["sm_90"], H200, HALF)
    (one,) = variant.tiles
    for facts, expected in (
        ({"registers": 32, "shared": 0, "warps": 4}, 16),
        ({"registers": 255, "shared": 0, "warps": 8}, 1),
        ({"registers": 128, "shared": 0, "warps": 4}, 4),
        ({"registers": 32, "shared": 75 << 10, "warps": 4}, 3),
        ({"registers": 32, "shared": 0, "warps": 1}, 32),
        ({"registers": 255, "shared": 227 << 10, "warps": 16}, 1),
    ):
        assert model.resident(one, binary(one, **facts)) == expected, facts


def test_guards_and_missing_binaries_exclude():
    always, large = tile(16, 64), tile(128, 128, guard=sizes.compare("le", 128, "m"))
    variant = matmul(large, always)
    assert [one.name for one in tiles.allowed(variant, {"m": 8})] == ["16x64"]
    assert [one.name for one in tiles.allowed(variant, {"m": 128})] == ["128x128", "16x64"]
    only = {large.name: binary(large)}
    assert tiles.choose(variant, {"m": 128}, only, "sm_90", H200, HALF) is large
    with pytest.raises(ArtifactError, match="kernel matmul: no binary of it fits the sizes of this call"):
        tiles.choose(variant, {"m": 8}, only, "sm_90", H200, HALF)


def test_equal_tiles_take_the_first():
    one, other = tile(64, 64), dataclasses.replace(tile(64, 64), name="again")
    assert choice(matmul(one, other), m=1000) == "64x64"
    assert choice(matmul(other, one), m=1000) == "again"


def test_costs_are_finite_and_grow_with_the_work():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        one = tile(2 ** rng.randrange(4, 9), 2 ** rng.randrange(4, 9), 2 ** rng.randrange(0, 4))
        variant = matmul(one, n=rng.randrange(1, 9000), k=rng.randrange(1, 9000))
        architecture = rng.choice(list(ARCHITECTURES.values()))
        gpu = dataclasses.replace(H200, multiprocessors=rng.randrange(1, 200))
        costs = []
        for m in (0, 1, 100, 10_000, 1_000_000):
            model = tiles.CostModel(variant, {"m": m}, architecture, gpu, HALF)
            costs.append(model.seconds(one, binary(one), model.capacity(one)))
        assert all(0 < cost < 1e6 for cost in costs)
        assert costs[-1] > costs[1]


def test_traits():
    assert tiles.traits_of(["bfloat16", "float32"], "matmul") == tiles.Traits(2, True)
    assert tiles.traits_of(["float32", "int64"], "matmul") == tiles.Traits(4, False)
    assert tiles.traits_of(["float16"], "loop") == tiles.Traits(2, False)
    assert tiles.traits_of(["int64"], "indexing") == tiles.Traits(4, False)


# -- the table of binaries ---------------------------------------------------------------------------------------------


def test_tables_come_back():
    table = sys.modules["tilewright_tests_cuda_toy"].table(ptx=True)
    table = dataclasses.replace(table, rejected=(binaries.RejectedTile("rows", "b256", "spills registers"),))
    content = binaries.dump(table)
    assert binaries.parse(content, "binaries.json") == table
    assert binaries.dump(binaries.parse(content, "binaries.json")) == content
    assert content.count(b"\n") < 20


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("architecture", "sm_9x", "architecture: 'sm_9x' is no architecture"),
        ("kernels.0.name", "../x", "kernels[0].name: '../x' is not a usable name"),
        ("kernels.1.name", "one_row", "kernels[1].name: 'one_row' is not a usable name, or occurs twice"),
        ("kernels.0.parameters.0", "*fp8", "kernels[0].parameters[0]: '*fp8' is no parameter type"),
        ("kernels.0.parameters.0", "i32", "kernels[0].parameters[1]: '*fp32' is no parameter type, or stands"),
        ("kernels.0.binaries", [], "kernels[0].binaries: a kernel needs a binary"),
        ("kernels.1.binaries.0.tile", "b128", "kernels[1].binaries: two binaries of one tile"),
        ("kernels.0.binaries.0.cubin", "../x.cubin", "kernels[0].binaries[0].cubin: path '../x.cubin' leaves"),
        ("kernels.0.binaries.0.cubin", "", "kernels[0].binaries[0].cubin: path '' is not in normal form"),
        ("kernels.0.binaries.0.ptx", "/x", "kernels[0].binaries[0].ptx: path '/x' leaves"),
        ("kernels.0.binaries.0.function", "a b", "kernels[0].binaries[0].function: 'a b' is not a usable name"),
        ("kernels.0.binaries.0.warps", 0, "kernels[0].binaries[0].warps: expected 1 to 64, got 0"),
        ("kernels.0.binaries.0.shared", -1, "kernels[0].binaries[0].shared: expected 0 to 1048576, got -1"),
        ("kernels.0.binaries.0.global_scratch_alignment", 3, "expected a power of two up to 4096, got 3"),
        ("kernels.0.binaries.0.registers", True, "kernels[0].binaries[0].registers: expected int, got True"),
    ],
)
def test_tables_are_checked(path, value, expected):
    import json

    data = json.loads(binaries.dump(sys.modules["tilewright_tests_cuda_toy"].table()))
    node = data
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parts:
        node = node[part]
    node[last] = value
    with pytest.raises(ArtifactError) as caught:
        binaries.parse(json.dumps(data).encode(), "binaries.json")
    assert str(caught.value).startswith("binaries.json: ") and expected in str(caught.value)
    with pytest.raises(ArtifactError, match="binaries.json: not valid JSON"):
        binaries.parse(b"{", "binaries.json")

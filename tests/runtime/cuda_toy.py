"""The toy model of ``conftest.py`` as GPU plans, with kernels in Python for the fake driver."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tilewright.codegen.artifact import TargetBinaries
from tilewright.runtime import sizes
from tilewright.runtime.binaries import Binaries, Binary, KernelBinaries, dump
from tilewright.runtime.plan import (
    COUNTERS,
    Buffer,
    Plan,
    Port,
    Ref,
    StateBuffer,
    Step,
    Symbol,
    Tile,
    TileConstant,
    Variant,
)


def tile(block: int, guard: sizes.Size = 1) -> Tile:
    return Tile(f"b{block}", (TileConstant("BLOCK", block),), 4, 2, guard)


BLOCKS = sizes.ceildiv("n", "BLOCK")
TILES = (tile(32), tile(128, sizes.compare("le", 64, "n")))


def main_plan(base: Plan) -> Plan:
    """Entry ``main`` of the CPU's toy, its kernels' arguments as a GPU has them."""
    product, lookup = base.steps
    one, many = product.variants
    tables = (*lookup.variants[0].operands, Ref("fault", 1))
    return dataclasses.replace(
        base,
        steps=(
            dataclasses.replace(
                product,
                variants=(
                    dataclasses.replace(one, units=1, tiles=(tile(32),)),
                    dataclasses.replace(many, units=BLOCKS, tiles=TILES, flops=sizes.mul("n", 64), bytes=1000),
                ),
            ),
            dataclasses.replace(
                lookup,
                variants=(Variant("add_rows", tables, ("n", 10), BLOCKS, tiles=(tile(32),)),),
                writes=(3,),
            ),
        ),
    )


def count_plan(base: Plan) -> Plan:
    (step,) = base.steps
    operands = (*step.variants[0].operands, Ref("counters", 0))
    return dataclasses.replace(
        base,
        states=(*base.states, StateBuffer("calls", "int64", (2,), 16)),
        steps=(
            dataclasses.replace(
                step, variants=(Variant("accumulate", (*operands, Ref("state", 1)), (), 1, tiles=(tile(4),)),)
            ),
        ),
    )


def half_plan(base: Plan) -> Plan:
    (step,) = base.steps
    (variant,) = step.variants
    units = sizes.ceildiv("h", "BLOCK")
    return dataclasses.replace(
        base,
        steps=(
            dataclasses.replace(
                step, variants=(dataclasses.replace(variant, sizes=("h",), units=units, tiles=(tile(32),)),)
            ),
        ),
    )


def chain_plan(steps: int = 5) -> Plan:
    """Many small steps through a buffer that grows with the sizes."""
    x, y, t = Ref("input", 0), Ref("output", 0), Ref("buffer", 0)
    operands = [(x, t), *[(t, t)] * (steps - 2), (t, y)]
    return Plan(
        "chain",
        (Symbol("n", 1, 1 << 20, 4, 0, 0),),
        (Port("x", "float32", ("n",)),),
        (Port("y", "float32", ("n",)),),
        {"tuple": [{"output": 0}, {"output": 0}]},
        (),
        (),
        (),
        (Buffer("t", "float32", ("n",), "rows", sizes.mul("n", 4), 0, steps - 1),),
        tuple(
            Step(f"increment_{index}", "loop", (Variant("increment", pair, ("n",), BLOCKS, tiles=(tile(32),)),), (1,))
            for index, pair in enumerate(operands)
        ),
    )


PARAMETERS = {
    "one_row": ("*fp32", "*fp32", "*fp32", "i32"),
    "rows": ("*fp32", "*fp32", "*fp32", "i32"),
    "add_rows": ("*fp32", "*fp32", "*i64", "*fp32", "*i32", "i32", "i64"),
    "accumulate": ("*fp32", "*fp32", "*fp32", "*i32", "*i64"),
    "copy16": ("*bf16", "*bf16", "i32"),
    "increment": ("*fp32", "*fp32", "i32"),
}


def binary(kernel: str, name: str, **changes: Any) -> Binary:
    facts: dict[str, Any] = dict(
        tile=name, cubin=f"{kernel}.{name}.cubin", ptx="", function=kernel, warps=4, cluster=1, shared=0,
        static_shared=0, registers=32, spill_stores=0, spill_loads=0, stack=0, global_scratch=0,
        global_scratch_alignment=1, profile_scratch=0, profile_scratch_alignment=1,
    )  # fmt: skip
    return Binary(**(facts | changes))


def table(architecture: str = "sm_90", ptx: bool = False) -> Binaries:
    tiles = {"rows": ("b32", "b128"), "accumulate": ("b4",)}
    special: dict[tuple[str, str], dict[str, Any]] = {
        ("rows", "b128"): {"shared": 100 << 10, "warps": 8},
        ("add_rows", "b32"): {"global_scratch": 24, "global_scratch_alignment": 16, "profile_scratch": 8},
        ("copy16", "b32"): {"cluster": 2},
    }
    kernels = []
    for kernel, parameters in PARAMETERS.items():
        found = []
        for name in tiles.get(kernel, ("b32",)):
            text = {"ptx": f"{kernel}.{name}.ptx"} if ptx else {}
            found.append(binary(kernel, name, **text, **special.get((kernel, name), {})))
        kernels.append(KernelBinaries(kernel, parameters, tuple(found)))
    return Binaries(architecture, "Triton 3.9.0", tuple(kernels))


def target(image: Any, architecture: str = "sm_90", ptx: bool = False, **replaced: bytes) -> TargetBinaries:
    """A target with a fake binary of every kernel."""
    listed = table(architecture, ptx)
    files = {"binaries.json": dump(listed)}
    for kernel in listed.kernels:
        for one in kernel.binaries:
            count = len(kernel.parameters) + 2
            files[one.cubin] = image(kernel.name, count, architecture)
            if ptx:
                files[one.ptx] = image(kernel.name, count, architecture, "ptx")
    return TargetBinaries(f"cuda:{architecture}", (), files | replaced, "binaries.json")


# -- kernels -----------------------------------------------------------------------------------------------------------


def view(address: int, dtype: Any, *shape: int) -> np.ndarray:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8).view(dtype).reshape(shape)


def rows(arguments: list[int], grid: int) -> None:
    x, w, t, n = arguments[:4]
    view(t, np.float32, n, 4)[:] = view(x, np.float32, n, 8) @ view(w, np.float32, 8, 4)


def add_rows(arguments: list[int], grid: int) -> None:
    t, words, idx, y, fault, n, count = arguments[:7]
    index = view(idx, np.int64, n)
    bad = (index < -count) | (index >= count)
    if bad.any():
        view(fault, np.int32, 1)[:] = 1
    chosen = view(words, np.float32, count, 4)[np.where(bad, 0, index)]
    view(y, np.float32, n, 4)[:] = view(t, np.float32, n, 4) + chosen
    assert arguments[7] % 16 == 0 and arguments[7] and arguments[8]
    view(arguments[7], np.uint8, 24 * grid)[:] = 1  # scratch: every program has its own
    view(arguments[8], np.uint8, 8 * grid)[:] = 2


def accumulate(arguments: list[int], grid: int) -> None:
    x, total, y, counters, calls = arguments[:5]
    assert not view(counters, np.int32, COUNTERS).any()
    view(total, np.float32, 4)[:] += view(x, np.float32, 4)
    view(y, np.float32, 4)[:] = view(total, np.float32, 4)
    view(calls, np.int64, 2)[:] += 1


def copy16(arguments: list[int], grid: int) -> None:
    view(arguments[1], bfloat16, 2 * arguments[2])[:] = view(arguments[0], bfloat16, 2 * arguments[2])


def increment(arguments: list[int], grid: int) -> None:
    view(arguments[1], np.float32, arguments[2])[:] = view(arguments[0], np.float32, arguments[2]) + 1


KERNELS = {
    "one_row": rows, "rows": rows, "add_rows": add_rows, "accumulate": accumulate, "copy16": copy16,
    "increment": increment,
}  # fmt: skip

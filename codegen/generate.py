"""From programs to the parts of an artifact: lower all entries, lay constants out, build the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..passes.graph.program import Program
from ..runtime.plan import Constant, Plan
from .artifact import ConstantData, TargetBinaries, layout_constants, weights_id
from .c.backend import Weights, build
from .c.families import FAMILIES
from .c.toolchain import Compiler
from .cache import Cache
from .lower import KernelSource, KernelTable, Lowered, lower
from .storage import ConstantTable
from .targets import Target


@dataclass(frozen=True)
class Generated:
    """What lowering gives: plans with their constants placed, kernel sources, and how to compute each constant."""

    plans: tuple[Plan, ...]
    kernels: tuple[KernelSource, ...]
    constants: tuple[ConstantData, ...]


def generate(programs: Sequence[Program]) -> Generated:
    """Lower entry points that share weights and kernels."""
    kernels, table = KernelTable(), ConstantTable()
    lowered: list[Lowered] = [lower(program, kernels, table, FAMILIES) for program in programs]
    data = [ConstantData(item.key, item.dtype, item.shape, item.load) for item in table.constants]
    places = layout_constants(data)
    constants = [
        Constant(item.key, item.key, item.dtype, item.shape, *places[item.key], sources=item.recipe.sources)
        for item in table.constants
    ]
    plans = tuple(entry.plan(constants) for entry in lowered)
    return Generated(plans, tuple(kernels.kernels), tuple(data))


def build_kernels(
    generated: Generated,
    targets: Sequence[Target],
    compiler: Compiler,
    cache: Cache | None,
    progress: Callable[[str], None] | None = None,
) -> list[TargetBinaries]:
    """Compile the kernels for every target."""
    identity, size = weights_id(generated.constants)
    return build(generated.plans, generated.kernels, Weights(identity, size), targets, compiler, cache, progress)

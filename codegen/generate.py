"""From programs to the parts of an artifact: lower all entries for each kind of device, lay constants out once.

Programs come rewritten per kind of device, since passes differ. All kinds share one table of constants, so a weight
that several want in the same form is stored once; a plan lists those that its own kind of device needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..passes.graph.program import Program
from ..runtime.plan import Constant, Plan
from .artifact import ConstantData, TargetBinaries, layout_constants, weights_id
from .c.backend import Weights, build
from .c.packing import panel_of
from .c.tables import tied_tables
from .c.toolchain import Compiler
from .c.tuning import Tuner, Tunings
from .c.winograd_selection import Decision, select_winograd
from .cache import Cache
from .kernel_table import KernelSource, KernelTable
from .lower import lower
from .lowered import Lowered
from .regions import Family
from .storage import ConstantTable
from .targets import GpuTarget, Target


@dataclass(frozen=True)
class DeviceCode:
    """What lowering gives for one kind of device: a plan per entry point, and the sources of their kernels."""

    device: str
    plans: tuple[Plan, ...]
    kernels: tuple[KernelSource, ...]


@dataclass(frozen=True)
class Generated:
    """What lowering gives: the code per kind of device, how to compute each constant, and how CPUs convolve.

    ``tuned`` is what was measured of CPU kernels, if that was asked for.
    """

    devices: Mapping[str, DeviceCode]
    constants: tuple[ConstantData, ...]
    convolutions: tuple[Decision, ...] = ()
    tuned: Tunings | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of all kinds of device, those of the first one first."""
        return tuple(plan for code in self.devices.values() for plan in code.plans)


def generate(
    programs: Mapping[str, Sequence[Program]],
    precision: str = "ieee",
    tuner: Tuner | None = None,
    vector_bits: int = 512,
) -> Generated:
    """Lower entry points that share weights and kernels.

    Args:
        programs: after the passes, by kind of device (``"cpu"``, ``"cuda"``); regions of convolutions are annotated.
        precision: how GPU kernels multiply float32, ``"ieee"`` or ``"tf32"``.
        tuner: measures CPU kernels; without it the model of the machine chooses.
        vector_bits: of the CPU target that has the widest vectors; how weights are packed depends on it.

    Raises:
        UnsupportedOperator: a node has no kernel.
        CompileError: a size or a value cannot be expressed.
    """
    decisions = select_winograd(programs.get("cpu", ()))
    table = ConstantTable()
    lowered: dict[str, list[Lowered]] = {}
    panel = panel_of(vector_bits)
    kernels: dict[str, KernelTable] = {}
    for device, entries in programs.items():
        kernels[device] = KernelTable()
        families = families_of(device)
        chooser = tuner if device == "cpu" else None
        lowered[device] = [
            lower(
                program, kernels[device], table, families, precision, chooser, panel,
                tables=tied_tables(program, panel) if device == "cpu" else None,
            )
            for program in entries
        ]  # fmt: skip
    data = [ConstantData(item.key, item.dtype, item.shape, item.load) for item in table.constants]
    places = layout_constants(data)
    constants = [
        Constant(item.key, item.key, item.dtype, item.shape, *places[item.key], sources=item.recipe.sources)
        for item in table.constants
    ]
    devices = {
        device: DeviceCode(device, _plans(entries, constants), tuple(kernels[device].kernels))
        for device, entries in lowered.items()
    }
    tuned = tuner.finish(kernels["cpu"].add) if tuner is not None else None
    return Generated(devices, tuple(data), tuple(decisions), tuned)


def families_of(device: str) -> Mapping[str, Family]:
    """The kernel families of a kind of device, by the names that regions have."""
    if device == "cpu":
        from .c.families import FAMILIES

        return FAMILIES
    from .triton.families import FAMILIES as TRITON_FAMILIES

    return TRITON_FAMILIES


def build_kernels(
    generated: Generated,
    targets: Sequence[Target],
    compiler: Compiler,
    cache: Cache | None,
    progress: Callable[[str], None] | None = None,
) -> list[TargetBinaries]:
    """Compile the C kernels for every CPU target."""
    identity, size = weights_id(generated.constants)
    code = generated.devices["cpu"]
    return build(code.plans, code.kernels, Weights(identity, size), targets, compiler, cache, progress)


def build_gpu_kernels(
    generated: Generated,
    targets: Sequence[GpuTarget],
    cache: Cache | None,
    progress: Callable[[str], None] | None = None,
    ptx: bool = False,
) -> list[TargetBinaries]:
    """Compile the Triton kernels for every GPU target; ``ptx`` stores PTX for newer GPUs, too."""
    from .triton.backend import build as build_triton

    code = generated.devices["cuda"]
    return build_triton(code.kernels, targets, cache, progress, ptx, plans=code.plans)


def triton_sources(generated: Generated) -> dict[str, bytes]:
    """The files of the GPU kernels' sources by name: what every GPU target shares, and what the interpreter runs."""
    from .triton.backend import sources

    code = generated.devices.get("cuda")
    return sources(code.kernels) if code is not None else {}


def _plans(entries: Sequence[Lowered], constants: Sequence[Constant]) -> tuple[Plan, ...]:
    """The plans of one kind of device, all with the same list of constants: those that one of them reads."""
    used: set[int] = set()
    for entry in entries:
        used |= entry.constants()
    numbers = {old: new for new, old in enumerate(sorted(used))}
    return tuple(entry.plan([constants[old] for old in numbers], numbers) for entry in entries)

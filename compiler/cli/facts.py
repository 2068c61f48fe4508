"""What can be read from an artifact without executing it: sizes, kernels, memory. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...codegen.artifact import plan_name
from ...codegen.memory import measure
from ...runtime import sizes
from ...runtime.artifact import Artifact
from ...runtime.manifest import FILE_NAME
from ...runtime.plan import Plan, Port, Ref, Step


@dataclass
class KernelUse:
    """A kernel and the steps that run it; flops and bytes of one call of the model at the asked sizes."""

    kernel: str
    family: str
    steps: list[int] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    modules: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def plans_of(artifact: Artifact) -> dict[str, Plan]:
    """All plans by name: that of the entry point, followed by ``.cuda`` where the plan is for GPUs."""
    return {
        plan_name(entry, device): plan for device, plans in artifact.devices.items() for entry, plan in plans.items()
    }


def artifact_bytes(artifact: Artifact) -> int:
    """Size of all files, the manifest too."""
    return sum(record.size for record in artifact.manifest.files) + (artifact.path / FILE_NAME).stat().st_size


def sample_of(plan: Plan) -> dict[str, int]:
    """The values of the symbols that the model was compiled with as its sample."""
    return {symbol.name: symbol.sample for symbol in plan.symbols}


def memory_of(plan: Plan, asked: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Scratch memory at the smallest, the sample's and the largest sizes, and at those asked for.

    ``peak`` is what a call takes, ``total`` the sum of all buffers, ``bound`` the largest set of buffers that are alive
    together, all in bytes.
    """
    cases: dict[str, dict[str, int]] = {"sample": sample_of(plan)}
    if plan.symbols:
        cases = {
            "smallest": {symbol.name: symbol.minimum for symbol in plan.symbols},
            **cases,
            "largest": {symbol.name: symbol.maximum for symbol in plan.symbols},
        }
    if asked is not None:
        cases["asked"] = dict(asked)
    return [{"at": name, "sizes": values, **vars(measure(plan.buffers, values))} for name, values in cases.items()]


def kernels_of(plan: Plan, values: Mapping[str, int]) -> list[KernelUse]:
    """The kernels of an entry point in the order of their first step.

    A step counts towards the variant that its guards choose at these sizes; the others have no flops and bytes there.
    """
    found: dict[str, KernelUse] = {}
    for index, step in enumerate(plan.steps):
        chosen = chosen_variant(step, values)
        for position, variant in enumerate(step.variants):
            use = found.setdefault(variant.kernel, KernelUse(variant.kernel, step.family))
            use.steps.append(index)
            use.modules.append(where(step))
            if step.origin.source and step.origin.source not in use.sources:
                use.sources.append(step.origin.source)
            if len(step.variants) > 1:
                guard = "otherwise" if position == len(step.variants) - 1 else sizes.show(variant.guard)
                if guard not in use.guards:
                    use.guards.append(guard)
            if position == chosen:
                use.flops += sizes.evaluate(variant.flops, values)
                use.bytes += sizes.evaluate(variant.bytes, values)
    return list(found.values())


def chosen_variant(step: Step, values: Mapping[str, int]) -> int:
    """The position of the variant that runs at these sizes."""
    fitting = (index for index, variant in enumerate(step.variants) if sizes.evaluate(variant.guard, values))
    return next(fitting, len(step.variants) - 1)


def where(step: Step) -> str:
    """The step's module in the model, or else its nodes."""
    return step.origin.module or ", ".join(step.origin.nodes)


def show_port(port: Port) -> str:
    """``x: float32[batch, 128]``."""
    return f"{port.name}: {show_type(port.dtype, port.shape)}"


def show_type(dtype: str, shape: tuple[sizes.Size, ...]) -> str:
    """``float32[batch, 128]``."""
    return f"{dtype}[{', '.join(map(sizes.show, shape))}]"


def show_ranges(plan: Plan) -> str:
    """``batch 1..64 (sample 2), seq 1..512 (sample 8)``."""
    return ", ".join(
        f"{symbol.name} {symbol.minimum}..{symbol.maximum} (sample {symbol.sample})" for symbol in plan.symbols
    )


def name_of(plan: Plan, ref: Ref) -> str:
    """The name of an operand."""
    if ref.kind in ("fault", "counters"):
        return ref.kind
    table: dict[str, tuple[Any, ...]] = {
        "input": plan.inputs,
        "output": plan.outputs,
        "state": plan.states,
        "constant": plan.constants,
        "buffer": plan.buffers,
    }
    return str(table[ref.kind][ref.index].name)

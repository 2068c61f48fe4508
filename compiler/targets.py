"""The targets of a compilation, by kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..codegen import targets
from ..codegen.roles import DEVICES
from ..codegen.targets import GpuTarget, Target
from ..runtime import cpu


@dataclass(frozen=True)
class Targets:
    """The machines to compile for, in the order given.

    Attributes:
        cpu: processors.
        cuda: GPUs.
    """

    cpu: tuple[Target, ...]
    cuda: tuple[GpuTarget, ...]


def parse_targets(names: Sequence[str]) -> Targets:
    """The machines that names such as ``"cpu:x86-64-v3"`` and ``"cuda:sm_90"`` stand for.

    Raises:
        UsageError: one of them does not exist, or none was named; lists those that do.
    """
    found = targets.parse_list(",".join(names), cpu.features())
    return Targets(
        tuple(target for target in found if isinstance(target, Target)),
        tuple(target for target in found if isinstance(target, GpuTarget)),
    )


def device_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The kinds of device among targets, the CPU first; whether each target exists is not asked."""
    kinds = {part.strip().partition(":")[0] for text in names for part in text.split(",")}
    return tuple(device for device in DEVICES if device in kinds)

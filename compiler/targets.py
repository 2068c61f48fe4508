"""What ``--target`` names, taken apart by kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..codegen import targets
from ..codegen.roles import DEVICES
from ..codegen.targets import Target
from ..runtime import cpu
from ..runtime.errors import UsageError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""NVIDIA's, that kernels can be compiled for; what each stands for: docs/command_line.md."""


@dataclass(frozen=True)
class Targets:
    """The machines to compile for.

    Attributes:
        devices: their kinds, in the order of their first mention.
        cpu: processors, in the order given.
        cuda: architectures of GPUs, in the order given.
    """

    devices: tuple[str, ...]
    cpu: tuple[Target, ...]
    cuda: tuple[str, ...]


def parse_targets(names: Sequence[str]) -> Targets:
    """The machines that names such as ``"cpu:x86-64-v3"`` and ``"cuda:sm_90"`` stand for.

    Raises:
        UsageError: one of them does not exist, or none was named; lists those that do.
    """
    devices = device_kinds(names)
    given = [part.strip() for text in names for part in text.split(",") if part.strip()]
    processors = ",".join(name for name in given if _kind(name) == "cpu")
    architectures = tuple(dict.fromkeys(_architecture(name) for name in given if _kind(name) == "cuda"))
    return Targets(devices, targets.parse_list(processors, cpu.features()) if processors else (), architectures)


def device_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The kinds of device among targets, without asking whether each target exists.

    Raises:
        UsageError: no target was named, or one of another kind.
    """
    kinds = dict.fromkeys(_kind(part.strip()) for text in names for part in text.split(",") if part.strip())
    if not kinds:
        raise UsageError(f"no target named.\n{listing()}")
    return tuple(kinds)


def listing() -> str:
    """All targets, for messages."""
    processors = ", ".join(target.name for target in targets.known())
    return (
        f"Targets: cpu (this machine), {processors}, cuda (the GPU of this machine), "
        f"{', '.join(f'cuda:{name}' for name in ARCHITECTURES)}"
    )


def _kind(name: str) -> str:
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise UsageError(f"unknown target {name!r}.\n{listing()}")
    return kind


def _architecture(name: str) -> str:
    _, colon, architecture = name.partition(":")
    if not colon:
        return _present()
    if architecture not in ARCHITECTURES:
        raise UsageError(f"target {name!r}: unknown architecture {architecture!r}.\n{listing()}")
    return architecture


def _present() -> str:
    """The architecture of this machine's GPU."""
    raise UsageError(f"target 'cuda' is the GPU of this machine, and there is none; name an architecture.\n{listing()}")

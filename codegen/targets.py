"""The targets: what ``--target`` may name, each compiler's flags for it, and what the processor must have.

A CPU target is a base instruction set and extensions: ``cpu:x86-64-v4+vnni+bf16``. ``cpu`` alone means this machine and
is resolved to one of the others before anything is compiled, so an artifact never says just ``cpu``. Feature names are
those of the ``flags`` line of ``/proc/cpuinfo``; the loader compares the two before it opens a library.

A GPU target is an architecture, ``cuda:sm_90``; what each can do is in :mod:`~tilewright.codegen.architectures`.
``cuda`` alone means the GPU of this machine, and only then a driver is asked.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from ..runtime.errors import UsageError
from ..runtime.gpus import ARCHITECTURES, Architecture
from .architectures import of_this_machine

CompilerKind = Literal["gcc", "clang", "zig"]

GLIBC_FLOOR = (2, 28)
"""Oldest C library (major, minor) on which compiled kernels must load."""


DeviceKind = Literal["cpu", "cuda"]


class AnyTarget(Protocol):
    """What targets of all kinds of device have."""

    @property
    def name(self) -> str:
        """Canonical spelling; also the name of its folder after the colon."""
        ...

    @property
    def device(self) -> DeviceKind:
        """The kind of device that its kernels run on."""
        ...


@dataclass(frozen=True)
class Base:
    """A base instruction set: its name with each compiler family, its vector width and what it needs."""

    name: str
    zig_cpu: str
    vector_bits: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Extension:
    """Instructions beyond a base."""

    name: str
    flag: str
    zig_feature: str
    features: tuple[str, ...]
    bases: tuple[str, ...]


_V3 = ("sse4_2", "popcnt", "cx16", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

BASES = (
    Base("x86-64-v3", "x86_64_v3", 256, _V3),
    Base("x86-64-v4", "x86_64_v4", 512, _V4),
)
EXTENSIONS = (
    Extension("vnni", "-mavx512vnni", "avx512vnni", ("avx512_vnni",), ("x86-64-v4",)),
    Extension("bf16", "-mavx512bf16", "avx512bf16", ("avx512_bf16",), ("x86-64-v4",)),
)


@dataclass(frozen=True)
class Target:
    """A resolved CPU target. Equal targets have equal names; extensions stand in the table's order."""

    base: Base
    extensions: tuple[Extension, ...] = ()
    device: ClassVar[DeviceKind] = "cpu"

    @property
    def name(self) -> str:
        """Canonical spelling, such as ``cpu:x86-64-v4+vnni``; also the name of its folder after the colon."""
        return "cpu:" + "+".join((self.base.name, *(extension.name for extension in self.extensions)))

    @property
    def features(self) -> tuple[str, ...]:
        """What the processor must have, in the names of ``/proc/cpuinfo``."""
        return (*self.base.features, *(name for extension in self.extensions for name in extension.features))

    @property
    def vector_bits(self) -> int:
        """Width of the vector registers that kernels use."""
        return self.base.vector_bits

    def has(self, extension: str) -> bool:
        """Whether the extension of that name is part of the target."""
        return any(extension == present.name for present in self.extensions)

    def flags(self, compiler: CompilerKind) -> tuple[str, ...]:
        """Command-line flags that select this target."""
        width = f"-mprefer-vector-width={self.vector_bits}"
        if compiler == "zig":
            cpu = "+".join((self.base.zig_cpu, *(extension.zig_feature for extension in self.extensions)))
            return ("-target", f"x86_64-linux-gnu.{GLIBC_FLOOR[0]}.{GLIBC_FLOOR[1]}", f"-mcpu={cpu}", width)
        return (f"-march={self.base.name}", *(extension.flag for extension in self.extensions), width)


@dataclass(frozen=True)
class GpuTarget:
    """A GPU target: kernels for one architecture."""

    architecture: Architecture
    device: ClassVar[DeviceKind] = "cuda"

    @property
    def name(self) -> str:
        """Canonical spelling, such as ``cuda:sm_90``."""
        return f"cuda:{self.architecture.name}"


def known() -> tuple[Target, ...]:
    """Every CPU target there is, weakest first."""
    targets = []
    for base in BASES:
        fitting = [extension for extension in EXTENSIONS if base.name in extension.bases]
        for subset in range(1 << len(fitting)):
            targets.append(Target(base, tuple(e for bit, e in enumerate(fitting) if subset >> bit & 1)))
    return tuple(targets)


def known_gpus() -> tuple[GpuTarget, ...]:
    """Every GPU target there is, oldest first."""
    return tuple(GpuTarget(architecture) for architecture in ARCHITECTURES.values())


def parse(text: str, machine: Collection[str]) -> Target | GpuTarget:
    """The target that a name stands for.

    Args:
        text: ``cpu`` or ``cuda`` (this machine), ``cpu:BASE[+EXTENSION...]``, extensions in any order, or
            ``cuda:ARCHITECTURE``.
        machine: the features of this processor, for ``cpu``.

    Raises:
        UsageError: no such target, this machine is below the weakest one or has no GPU; lists the targets.
    """
    text = text.strip()
    if text.partition(":")[0] == "cuda":
        return _parse_gpu(text)
    return parse_cpu(text, machine)


def parse_cpu(text: str, machine: Collection[str]) -> Target:
    """The CPU target that a name stands for; see :func:`parse`.

    Raises:
        UsageError: no such target, or this machine is below the weakest one; lists the targets.
    """
    text = text.strip()
    if text == "cpu":
        return best(machine)
    if text in ("cpu:aarch64", "cpu:arm64"):
        raise UsageError(f"target {text!r}: 64-bit ARM is not supported yet.\n{_listing()}")
    device, _, rest = text.partition(":")
    base_name, *extension_names = rest.split("+")
    base = next((base for base in BASES if base.name == base_name), None)
    if device != "cpu" or base is None:
        raise UsageError(f"unknown target {text!r}.\n{_listing()}")
    for name in extension_names:
        extension = next((extension for extension in EXTENSIONS if extension.name == name), None)
        if extension is None:
            raise UsageError(f"target {text!r}: unknown extension {name!r}.\n{_listing()}")
        if base.name not in extension.bases:
            raise UsageError(f"target {text!r}: {name!r} needs {' or '.join(extension.bases)}.\n{_listing()}")
    return Target(base, tuple(extension for extension in EXTENSIONS if extension.name in extension_names))


def _parse_gpu(text: str) -> GpuTarget:
    if text == "cuda":
        return GpuTarget(of_this_machine())
    target = next((target for target in known_gpus() if target.name == text), None)
    if target is None:
        raise UsageError(f"unknown target {text!r}.\n{_listing()}")
    return target


def parse_list(text: str, machine: Collection[str]) -> tuple[Target | GpuTarget, ...]:
    """Comma-separated targets in the order given, each once.

    Raises:
        UsageError: one of them does not exist, or none was named.
    """
    targets = dict.fromkeys(parse(part, machine) for part in text.split(",") if part.strip())
    if not targets:
        raise UsageError(f"no target named.\n{_listing()}")
    return tuple(targets)


def best(machine: Collection[str]) -> Target:
    """The strongest target whose features are all there.

    Raises:
        UsageError: the processor has not even those of the weakest.
    """
    fitting = [target for target in known() if set(target.features) <= set(machine)]
    if not fitting:
        missing = sorted(set(BASES[0].features) - set(machine))
        raise UsageError(
            f"target 'cpu': this processor lacks {', '.join(missing)}, which {BASES[0].name} needs; "
            f"name the target of the machine that will run the model.\n{_listing()}"
        )
    return max(fitting, key=lambda target: len(target.features))


def _listing() -> str:
    return (
        "Targets: cpu (this machine), "
        + ", ".join(target.name for target in known())
        + ", cuda (this machine), "
        + ", ".join(target.name for target in known_gpus())
    )

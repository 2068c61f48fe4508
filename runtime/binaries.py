"""The table of an architecture's GPU binaries: ``kernels/sm_90/binaries.json``, which a ``cuda:`` target names.

Beside it lie the binaries, ``<kernel>.<tile>.cubin``, and where asked for what they were assembled from,
``<kernel>.<tile>.ptx``. The sources, which all architectures share, are ``kernels/triton/<kernel>.py``.

A kernel's parameters are its operands (pointers), its sizes, and two pointers to scratch memory that Triton adds to
every kernel: its own and its profiler's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from . import typed_json
from .errors import ArtifactError
from .manifest import path_problem
from .plan import to_json

FILE_NAME = "binaries.json"

POINTERS = ("*fp64", "*fp32", "*fp16", "*bf16", "*i64", "*i32", "*i16", "*i8", "*u8")
INTEGERS = {"i32": 4, "i64": 8}
"""Types of sizes, with their bytes."""

_ARCHITECTURE = re.compile(r"sm_[1-9][0-9]{1,2}")
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*", re.ASCII)
_MOST = {
    "warps": 64, "cluster": 16, "shared": 1 << 20, "static_shared": 1 << 20, "registers": 256, "stack": 1 << 20,
    "spill_stores": 1 << 20, "spill_loads": 1 << 20, "global_scratch": 1 << 32, "profile_scratch": 1 << 32,
}  # fmt: skip
_LEAST = {"warps": 1, "cluster": 1}
_ALIGNMENTS = ("global_scratch_alignment", "profile_scratch_alignment")


@dataclass(frozen=True)
class Binary:
    """One binary: a kernel with the constants of one tile.

    Attributes:
        tile: name of the tile in the plans.
        cubin: its file, relative to the table's directory.
        ptx: the file of the PTX that it was assembled from, empty where the artifact has none.
        function: the kernel's name in the binary.
        warps: per program, of 32 threads each.
        cluster: programs that run together.
        shared: bytes of dynamic shared memory to launch with; ``static_shared`` comes on top.
        registers: per thread.
        spill_stores: bytes per thread, likewise ``spill_loads`` and ``stack``.
        global_scratch: bytes per program of what the last but one parameter points to, aligned to
            ``global_scratch_alignment``; ``profile_scratch`` likewise of the last one.
    """

    tile: str
    cubin: str
    ptx: str
    function: str
    warps: int
    cluster: int
    shared: int
    static_shared: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    global_scratch: int
    global_scratch_alignment: int
    profile_scratch: int
    profile_scratch_alignment: int


@dataclass(frozen=True)
class KernelBinaries:
    """The binaries of one kernel.

    Attributes:
        name: as plans have it.
        parameters: types of its operands and sizes in order: ``"*fp32"``, ``"*i64"``, ``"i32"``...
        binaries: one per tile that can be used on the architecture, the default one first.
    """

    name: str
    parameters: tuple[str, ...]
    binaries: tuple[Binary, ...]

    @cached_property
    def tiles(self) -> Mapping[str, Binary]:
        """Tile name → binary."""
        return {binary.tile: binary for binary in self.binaries}


@dataclass(frozen=True)
class RejectedTile:
    """A tile that was meant for the architecture and cannot be used on it, and why."""

    kernel: str
    tile: str
    reason: str


@dataclass(frozen=True)
class Binaries:
    """The whole table: what the binaries were made for and by, and all kernels of the artifact's GPU plans."""

    architecture: str
    compiler: str
    kernels: tuple[KernelBinaries, ...]
    rejected: tuple[RejectedTile, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, KernelBinaries]:
        """Kernel name → its binaries."""
        return {kernel.name: kernel for kernel in self.kernels}


def dump(table: Binaries) -> bytes:
    """The content of ``binaries.json``, a line per kernel."""
    data = to_json(table)
    lines = [f" {json.dumps(name)}: {json.dumps(data[name])}" for name in ("architecture", "compiler")]
    for name in ("kernels", "rejected"):
        items = ",\n  ".join(json.dumps(item) for item in data[name])
        lines.append(f' "{name}": [\n  {items}\n ]' if items else f' "{name}": []')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def parse(content: bytes, file: str) -> Binaries:
    """Read and validate a table.

    Args:
        content: of the file.
        file: its path, for messages.

    Raises:
        ArtifactError: names the file and the field.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error})") from None
    try:
        table: Binaries = typed_json.read(Binaries, data)
        _check(table)
    except typed_json.FieldError as error:
        raise ArtifactError(f"{file}: {error}") from None
    return table


def _check(table: Binaries) -> None:
    if not _ARCHITECTURE.fullmatch(table.architecture):
        raise _fault("architecture", f"{table.architecture!r} is no architecture")
    seen: set[str] = set()
    for index, kernel in enumerate(table.kernels):
        where = f"kernels[{index}]"
        if not _NAME.fullmatch(kernel.name) or kernel.name in seen:
            raise _fault(f"{where}.name", f"{kernel.name!r} is not a usable name, or occurs twice")
        seen.add(kernel.name)
        _check_parameters(kernel, where)
        if not kernel.binaries:
            raise _fault(f"{where}.binaries", "a kernel needs a binary")
        if len(kernel.tiles) < len(kernel.binaries):
            raise _fault(f"{where}.binaries", "two binaries of one tile")
        for number, binary in enumerate(kernel.binaries):
            _check_binary(binary, f"{where}.binaries[{number}]")


def _check_parameters(kernel: KernelBinaries, where: str) -> None:
    """Pointers come first, integers after them."""
    integers = False
    for position, kind in enumerate(kernel.parameters):
        integers = integers or kind in INTEGERS
        if kind not in (INTEGERS if integers else POINTERS):
            raise _fault(
                f"{where}.parameters[{position}]", f"{kind!r} is no parameter type, or stands in the wrong place"
            )


def _check_binary(binary: Binary, where: str) -> None:
    for name in ("cubin", "ptx"):
        path = getattr(binary, name)
        if (path or name == "cubin") and (problem := path_problem(path)):
            raise _fault(f"{where}.{name}", problem)
    if not _NAME.fullmatch(binary.function):
        raise _fault(f"{where}.function", f"{binary.function!r} is not a usable name")
    for name, most in _MOST.items():
        if not _LEAST.get(name, 0) <= getattr(binary, name) <= most:
            raise _fault(f"{where}.{name}", f"expected {_LEAST.get(name, 0)} to {most}, got {getattr(binary, name)}")
    for name in _ALIGNMENTS:
        alignment = getattr(binary, name)
        if not 1 <= alignment <= 4096 or alignment & (alignment - 1):
            raise _fault(f"{where}.{name}", f"expected a power of two up to 4096, got {alignment}")


def _fault(path: str, problem: str) -> typed_json.FieldError:
    return typed_json.FieldError(problem).within(path)

"""What the C kernels' model of a processor knows: registers, rates and caches.

A target says which instructions a processor has, not which processor it is. So each base instruction set has the
numbers of the weakest processors that are commonly met with it, and what is chosen by them is chosen alike everywhere:
the same model compiles to the same kernels on any machine. Only ``--tune``, which measures anyway, looks at this
machine's caches (:func:`measured`) when it picks what to measure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..targets import BASES

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Machine:
    """A processor, as far as blocking depends on it.

    Attributes:
        base: the base instruction set that it stands for.
        lanes: float32 (or words of 32 bits) in a vector.
        rows: rows of a register tile (``TW_MR`` in ``tw_simd.h``), which leaves two registers for the right operand and
            one for the left.
        ports: multiply-adds of whole vectors per cycle.
        loads: vectors that are loaded per cycle.
        l1: bytes of the first-level data cache.
        l2: bytes of the second-level cache, which one core has for itself.
        l3_rate: bytes per cycle that a core reads from what comes after it.
    """

    base: str
    lanes: int
    rows: int
    ports: int
    loads: int
    l1: int
    l2: int
    l3_rate: float


# Caches: Haswell to Skylake clients for the first; Skylake servers and Zen 4 for the second, where a vector of 512 bits
# takes both halves of the multiply-add unit on Zen 4 and on client processors.
_NUMBERS = {
    "x86-64-v3": Machine("x86-64-v3", 8, 6, 2, 2, 32 << 10, 256 << 10, 8),
    "x86-64-v4": Machine("x86-64-v4", 16, 12, 1, 1, 32 << 10, 1 << 20, 8),
}

MACHINES = tuple(_NUMBERS[base.name] for base in BASES)
"""One for each base, the weakest first."""


def measured(machine: Machine, folder: Path = _CACHES) -> Machine:
    """The same with the second-level cache of the machine that this runs on, where its kernel tells that."""
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if level == "2" and kind in ("Data", "Unified") and size[-1:] in _UNITS and size[:-1].isdecimal():
            return replace(machine, l2=int(size[:-1]) * _UNITS[size[-1]])
    return machine

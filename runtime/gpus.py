"""GPU architectures as the runtime needs them: what fits on one multiprocessor, how fast it is, what runs where.

Limits are those of the table "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide;
rates are peak rates per multiprocessor and clock, from the white papers of the largest chip of each architecture. The
cost model (``tiles.py``) compares binaries of one kernel with them, so their ratios matter more than their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One multiprocessor of an architecture, and what its binaries run on.

    Attributes:
        name: such as ``"sm_90"``.
        major: of the compute capability, ``minor`` its second number.
        shared: bytes of shared memory that resident programs have together; each takes ``KIB`` more than it asks for.
        warps: that may be resident, ``programs`` likewise.
        tensor: operations per clock of the tensor cores on 16-bit floats (a multiply and an add are two); half as many
            on TensorFloat-32.
        scalar: operations per clock on float32 outside of the tensor cores.
        copies: bytes per clock between a multiprocessor and the second-level cache.
        exact: whether binaries, and their PTX, run on this compute capability alone; others run on later ones of the
            same major number, and their PTX on all later ones.
        registers: 32-bit ones.
    """

    name: str
    major: int
    minor: int
    shared: int
    warps: int
    programs: int
    tensor: int
    scalar: int
    copies: int
    exact: bool = False
    registers: int = 65536

    @property
    def capability(self) -> int:
        """The compute capability as one number, 90 for 9.0."""
        return 10 * self.major + self.minor

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may ask for."""
        return self.shared - KIB

    def runs_binary(self, major: int, minor: int) -> bool:
        """Whether cubins for this architecture run on a GPU of that compute capability."""
        return self.major == major and (self.minor == minor or (not self.exact and self.minor < minor))

    def runs_ptx(self, major: int, minor: int) -> bool:
        """Whether a driver can compile PTX for this architecture for a GPU of that compute capability."""
        same = (self.major, self.minor) == (major, minor)
        return same or (not self.exact and (self.major, self.minor) < (major, minor))


ARCHITECTURES = {
    item.name: item
    for item in (
        Architecture("sm_80", 8, 0, 164 * KIB, warps=64, programs=32, tensor=2048, scalar=128, copies=64),
        Architecture("sm_86", 8, 6, 100 * KIB, warps=48, programs=16, tensor=1024, scalar=256, copies=64),
        Architecture("sm_89", 8, 9, 100 * KIB, warps=48, programs=24, tensor=1024, scalar=256, copies=64),
        Architecture("sm_90", 9, 0, 228 * KIB, warps=64, programs=32, tensor=4096, scalar=256, copies=64, exact=True),
        Architecture("sm_100", 10, 0, 228 * KIB, warps=64, programs=32, tensor=8192, scalar=256, copies=64, exact=True),
        Architecture("sm_120", 12, 0, 100 * KIB, warps=48, programs=24, tensor=1024, scalar=256, copies=64, exact=True),
    )
}


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine, as its driver describes it.

    Attributes:
        name: such as ``"NVIDIA H200"``.
        major: of its compute capability, ``minor`` the second number.
        multiprocessors: how many.
        clock: of the multiprocessors, in hertz.
        bandwidth: of the memory, in bytes per second.
        memory: bytes in all.
        shared_limit: bytes of shared memory that one program may ask for.
        cache: bytes of the second-level cache.
    """

    name: str
    major: int
    minor: int
    multiprocessors: int
    clock: float
    bandwidth: float
    memory: int
    shared_limit: int
    cache: int

    @property
    def capability(self) -> str:
        """The compute capability, such as ``"9.0"``."""
        return f"{self.major}.{self.minor}"

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability})"


def fitting(names: Iterable[str], major: int, minor: int, ptx: Iterable[str] = ()) -> tuple[str, bool] | None:
    """The architecture whose code to load on a GPU of a compute capability.

    Args:
        names: of the architectures that there are binaries for.
        major: of the compute capability.
        minor: its second number.
        ptx: those of them that there is PTX for.

    Returns:
        The architecture and whether its PTX is what runs; binaries go first, then the latest. None where none fits.
    """
    known = sorted((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), key=lambda one: one.minor)
    if binaries := [one for one in known if one.runs_binary(major, minor)]:
        return binaries[-1].name, False
    later = {ARCHITECTURES[name] for name in ptx if name in ARCHITECTURES}
    if texts := [one for one in later if one.runs_ptx(major, minor)]:
        return max(texts, key=lambda one: (one.major, one.minor)).name, True
    return None

"""The GPU architectures: what one streaming multiprocessor of each holds, and which instructions it has.

The numbers are those of the table "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming
Guide.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One GPU architecture.

    Attributes:
        name: as NVIDIA's tools spell it, such as ``"sm_90"``.
        major: of the compute capability, ``minor`` its second number.
        shared_memory: bytes that one program may have at most (the opt-in limit).
        shared_memory_total: bytes of one multiprocessor.
        warps: resident on one multiprocessor at a time.
        programs: likewise.
        registers: 32-bit ones of one multiprocessor.
        descriptors: whether blocks are copied by descriptor (the tensor memory accelerator).
        wgmma: whether four warps multiply together from shared memory (only this one architecture does it so).
        exact: whether its binaries run on it alone; others also run on later ones of the same major number.
    """

    name: str
    major: int
    minor: int
    shared_memory: int
    shared_memory_total: int
    warps: int
    programs: int
    registers: int = 65536
    descriptors: bool = False
    wgmma: bool = False
    exact: bool = False

    @property
    def capability(self) -> int:
        """The compute capability as one number, 90 for 9.0."""
        return 10 * self.major + self.minor

    @property
    def threads(self) -> int:
        """Resident on one multiprocessor at a time."""
        return 32 * self.warps

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether binaries for this architecture run on a GPU of that compute capability."""
        return self.major == major and (self.minor == minor or (not self.exact and self.minor < minor))


ARCHITECTURES = (
    Architecture("sm_80", 8, 0, 163 * KIB, 164 * KIB, warps=64, programs=32),
    Architecture("sm_86", 8, 6, 99 * KIB, 100 * KIB, warps=48, programs=16),
    Architecture("sm_89", 8, 9, 99 * KIB, 100 * KIB, warps=48, programs=24),
    Architecture("sm_90", 9, 0, 227 * KIB, 228 * KIB, warps=64, programs=32, descriptors=True, wgmma=True, exact=True),
    Architecture("sm_100", 10, 0, 227 * KIB, 228 * KIB, warps=64, programs=32, descriptors=True, exact=True),
    Architecture("sm_120", 12, 0, 99 * KIB, 100 * KIB, warps=48, programs=24, descriptors=True, exact=True),
)


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        UsageError: there is none; lists those that there are.
    """
    found = next((architecture for architecture in ARCHITECTURES if architecture.name == name), None)
    if found is None:
        names = ", ".join(architecture.name for architecture in ARCHITECTURES)
        raise UsageError(f"unknown GPU architecture {name!r}; there are {names}")
    return found


def for_capability(major: int, minor: int) -> Architecture:
    """The architecture whose binaries fit a GPU of that compute capability best.

    Raises:
        UsageError: there is none; lists the architectures.
    """
    fitting = [architecture for architecture in ARCHITECTURES if architecture.runs_on(major, minor)]
    if not fitting:
        names = ", ".join(f"cuda:{architecture.name}" for architecture in ARCHITECTURES)
        raise UsageError(
            f"target 'cuda': the GPU of this machine has compute capability {major}.{minor}, for which there is no "
            f"target.\nTargets: {names}"
        )
    return fitting[-1]


def of_this_machine() -> Architecture:
    """The architecture of this machine's first GPU, which the driver is asked for.

    Raises:
        UsageError: no driver or no GPU; or one that no target fits.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        raise _no_gpu("the package cuda-bindings is not installed (pip install 'tilewright[cuda]')") from None

    def ask(name: str, *arguments: object) -> int:
        error, *result = getattr(driver, name)(*arguments)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise _no_gpu(f"the driver answered {name} with {error.name}")
        return int(result[0]) if result else 0

    try:
        ask("cuInit", 0)
        device = ask("cuDeviceGet", 0)
        attribute = driver.CUdevice_attribute
        major = ask("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = ask("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    except (RuntimeError, OSError) as error:  # the bindings find no driver library
        raise _no_gpu(str(error)) from None
    return for_capability(major, minor)


def _no_gpu(reason: str) -> UsageError:
    return UsageError(
        f"target 'cuda' means the GPU of this machine, but there is none to ask: {reason.rstrip('.')}.\n"
        f"Name the architecture of the machine that will run the model, such as 'cuda:{ARCHITECTURES[3].name}'."
    )

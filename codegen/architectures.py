"""GPU architectures as targets: by name, for a compute capability, of this machine. The table is the runtime's."""

from __future__ import annotations

from ..runtime.errors import UsageError
from ..runtime.gpus import ARCHITECTURES, Architecture


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        UsageError: there is none; lists those that there are.
    """
    if name not in ARCHITECTURES:
        raise UsageError(f"unknown GPU architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def for_capability(major: int, minor: int) -> Architecture:
    """The architecture whose binaries fit a GPU of that compute capability best.

    Raises:
        UsageError: there is none; lists the architectures.
    """
    fitting = [one for one in ARCHITECTURES.values() if one.runs_binary(major, minor)]
    if not fitting:
        names = ", ".join(f"cuda:{name}" for name in ARCHITECTURES)
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
    from ..runtime.cuda.driver import DriverError
    from ..runtime.cuda.probe import gpus_present

    try:
        present = gpus_present()
        problem = "" if present else "this machine has no GPU"
    except (UsageError, DriverError) as error:
        problem = str(error).rstrip(".")
    if problem:
        raise UsageError(
            f"target 'cuda' means the GPU of this machine, but there is none to ask: {problem}.\n"
            f"Name the architecture of the machine that will run the model, such as 'cuda:sm_90'."
        )
    return for_capability(present[0].major, present[0].minor)

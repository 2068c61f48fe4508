"""Whether this machine has a GPU that runs an artifact; what ``device="auto"`` asks."""

from __future__ import annotations

from ..artifact import Artifact
from ..errors import ArtifactError, UsageError
from ..gpus import Gpu
from .context import describe
from .driver import DriverError, open_driver
from .modules import choose_target


def gpus_present() -> list[Gpu]:
    """The GPUs of this machine, in the driver's order, without making contexts on them.

    Raises:
        UsageError: no bindings, no driver, no GPU, or a forked process.
    """
    driver = open_driver()
    return [describe(driver, driver("cuDeviceGet", ordinal)) for ordinal in range(driver("cuDeviceGetCount"))]


def why_not(artifact: Artifact) -> str:
    """Why the artifact cannot run on the first GPU of this machine; empty when it can."""
    try:
        present = gpus_present()
        if not present:
            return "this machine has no GPU"
        choose_target(artifact, present[0])
    except (UsageError, ArtifactError, DriverError) as error:
        return str(error)
    return ""

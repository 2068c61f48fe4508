"""From ``load(device=...)`` to a device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"interpreter"`` or ``"auto"``."""

from __future__ import annotations

import re
from typing import Any

from . import cpu
from .artifact import Artifact
from .device import Device
from .errors import ArtifactError, UsageError
from .manifest import FILE_NAME
from .threads import default_threads

_CUDA = r"cuda(?::(0|[1-9][0-9]{0,2}))?"  # compiled when it is first needed
MAX_THREADS = 512


def check_request(device: str, threads: int | None, stream: Any) -> None:
    """Refuse what no artifact can make right, before any file is read.

    Raises:
        UsageError: an unknown device, an impossible number of threads, or an option that the device does not have.
    """
    if not isinstance(device, str) or not (device in ("auto", "cpu", "interpreter") or re.fullmatch(_CUDA, device)):
        raise UsageError(f"unknown device {device!r}; expected 'auto', 'cpu', 'cuda', 'cuda:<number>' or 'interpreter'")
    if threads is not None and not (type(threads) is int and 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads must be a number from 1 to {MAX_THREADS}, got {threads!r}")
    if threads is not None and device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r} takes no number of threads")
    if stream is not None and not device.startswith("cuda"):
        raise UsageError(f"device {device!r} takes no stream; name a CUDA device, such as 'cuda:0'")


def open_device(artifact: Artifact, device: str, threads: int | None = None, stream: Any = None) -> Device[Any]:
    """The device that a model runs on, with the artifact's code and weights.

    Args:
        artifact: what to run.
        device: what :func:`check_request` accepts. ``"auto"`` takes the GPU where the artifact has kernels that run on
            the one that is there, and the CPU otherwise.
        threads: of the CPU; by default what the affinity mask and the control group's CPU quota allow.
        stream: a CUDA stream of the caller's to run in.

    Raises:
        ArtifactError: the artifact has no kernels for the device, or they cannot be loaded.
        UsageError: the device is not there.
    """
    if device == "auto":
        device = _choose(artifact)
    if device == "cpu":
        return _cpu(artifact, threads)
    if device == "interpreter":
        _require_plans(artifact, "the interpreter")
        from .interpreter.device import InterpreterDevice

        return InterpreterDevice(artifact)
    _require_plans(artifact, "a GPU")
    from .cuda.device import CudaDevice

    return CudaDevice(artifact, int(device.partition(":")[2] or 0), stream)


def _cpu(artifact: Artifact, threads: int | None) -> Device[Any]:
    from .cpu_device import CpuDevice

    if "cpu" not in artifact.devices:
        raise ArtifactError(
            f"{artifact.path / FILE_NAME}: holds no kernels for a CPU, but {_targets(artifact)}; "
            f"compile the model with --target cpu"
        )
    return CpuDevice(artifact, threads or default_threads())


def _require_plans(artifact: Artifact, what: str) -> None:
    if "cuda" not in artifact.devices:
        raise ArtifactError(
            f"{artifact.path / FILE_NAME}: holds no kernels for {what}, but {_targets(artifact)}; "
            f"compile the model with --target cuda:sm_90 or the like"
        )


def _choose(artifact: Artifact) -> str:
    """What ``"auto"`` stands for on this machine."""
    if "cuda" not in artifact.devices:
        return "cpu"
    from .cuda.probe import why_not

    reason = why_not(artifact)
    if not reason:
        return "cuda:0"
    if "cpu" not in artifact.devices:
        raise ArtifactError(f"{artifact.path / FILE_NAME}: holds kernels for {_targets(artifact)} only: {reason}")
    try:
        cpu.choose(artifact.manifest.targets, cpu.features(), str(artifact.path / FILE_NAME))
    except ArtifactError as error:
        raise ArtifactError(f"{error}. It holds kernels for GPUs too, but {reason}") from None
    return "cpu"


def _targets(artifact: Artifact) -> str:
    return ", ".join(target.name for target in artifact.manifest.targets) or "none"

"""``tuned.json``: the tiles that were fastest when ``tilewright tune`` measured them, beside the manifest.

The file is bound to the artifact's manifest by its SHA-256. It may be missing, and what is wrong with it is a warning
and no error: without it the cost model chooses.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import manifest as manifests
from . import typed_json
from .artifact import Artifact
from .errors import UsageError
from .gpus import Gpu
from .plan import to_json

FILE_NAME = "tuned.json"
FORMAT = 1
_MAX_BYTES = 1 << 26

Key = tuple[str, tuple[int, ...], int]
"""Kernel, its sizes, and the symbols' part of its work: the units with the default tile."""


@dataclass(frozen=True)
class Choice:
    """The fastest tile of a kernel at the sizes of one call.

    Attributes:
        kernel: its name.
        sizes: its integer arguments.
        units: programs of its first tile, which tells apart calls whose arguments are the same.
        tile: the fastest.
        nanoseconds: that it took.
        default: that the tile which the cost model chooses took.
    """

    kernel: str
    sizes: tuple[int, ...]
    units: int
    tile: str
    nanoseconds: int
    default: int

    @property
    def key(self) -> Key:
        """What it is looked up by."""
        return self.kernel, self.sizes, self.units


@dataclass(frozen=True)
class DeviceChoices:
    """What was measured on one kind of GPU: its name and number of multiprocessors."""

    device: str
    multiprocessors: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Tuned:
    """The whole file; ``artifact`` is the SHA-256 of the manifest that it belongs to."""

    format: int
    artifact: str
    devices: tuple[DeviceChoices, ...]


class TunedFileWarning(UserWarning):
    """A ``tuned.json`` that is not used: it belongs to another artifact, or cannot be read."""


def artifact_hash(artifact: Artifact) -> str:
    """What a tuned file is bound by."""
    return hashlib.sha256((artifact.path / manifests.FILE_NAME).read_bytes()).hexdigest()


def read(artifact: Artifact) -> Tuned | None:
    """The artifact's tuned file; None, with a :class:`TunedFileWarning` if there is one, where it cannot be used."""
    file = artifact.path / FILE_NAME
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        tuned: Tuned = typed_json.read(Tuned, json.loads(file.read_bytes()))
        if tuned.format != FORMAT:
            raise ValueError(f"format {tuned.format} instead of {FORMAT}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _warn(file, f"cannot be read ({error})")
        return None
    if tuned.artifact != artifact_hash(artifact):
        _warn(file, "belongs to another artifact")
        return None
    return tuned


def choices(artifact: Artifact, gpu: Gpu) -> Mapping[Key, str]:
    """What was measured on GPUs like this one: tile by kernel and sizes. Empty where nothing was."""
    tuned = read(artifact)
    found = next((one for one in tuned.devices if _same(one, gpu)), None) if tuned else None
    return {choice.key: choice.tile for choice in found.choices} if found else {}


def write(artifact: Artifact, gpu: Gpu, measured: tuple[Choice, ...]) -> Path:
    """Add what was measured on a GPU to the artifact's tuned file; a choice for the same call is replaced.

    Raises:
        UsageError: the artifact's directory cannot be written.
    """
    file = artifact.path / FILE_NAME
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TunedFileWarning)  # it is replaced
        old = read(artifact) or Tuned(FORMAT, artifact_hash(artifact), ())
    before = next((one for one in old.devices if _same(one, gpu)), DeviceChoices(gpu.name, gpu.multiprocessors, ()))
    merged = {choice.key: choice for choice in (*before.choices, *measured)}
    ours = replace(before, choices=tuple(merged[key] for key in sorted(merged)))
    tuned = replace(old, devices=(*(one for one in old.devices if not _same(one, gpu)), ours))
    beside = file.with_name(f".{FILE_NAME}.{secrets.token_hex(4)}")
    try:
        beside.write_text(json.dumps(to_json(tuned), indent=1) + "\n")
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"{file}: cannot be written: {error.strerror or error}") from None
    return file


def _same(one: DeviceChoices, gpu: Gpu) -> bool:
    return (one.device, one.multiprocessors) == (gpu.name, gpu.multiprocessors)


def _warn(file: Path, problem: str) -> None:
    warnings.warn(f"{file}: {problem} and is ignored; run `tilewright tune` again", TunedFileWarning, stacklevel=2)

"""A program saved by ``torch.export.save`` (``.pt2``).

Such a file is a zip archive of a JSON graph and raw weights; it may also hold pickled objects, which could run code
when read. These are tried first under torch's restricted unpickler, and an archive that needs more is refused.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ...runtime.errors import ArtifactError, SourceError

_HOW = "save it with torch.export.save(torch.export.export(module, args), 'model.pt2')"


def load_exported(path: Path) -> ExportedProgram:
    """Read an exported program.

    Raises:
        SourceError: not such a file, saved by another version of PyTorch, or in need of arbitrary unpickling.
        ArtifactError: truncated or damaged.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise SourceError(f"{path} is no exported program (not a zip archive, or truncated); {_HOW}")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
    except zipfile.BadZipFile as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    try:
        with _quiet():
            return torch.export.load(path)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{path} cannot be read by PyTorch {torch.__version__}: {type(error).__name__}: {first}; it may be damaged "
            f"or saved by another version: {_HOW}"
        ) from error


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse what is no archive of one exported program, damaged members, and pickles that are more than tensors."""
    members = {name.split("/", 1)[-1]: name for name in archive.namelist()}
    if "archive_format" not in members:
        old = "serialized_exported_program.json" in members
        what = "was exported by an old PyTorch" if old else "is a zip archive, but no exported program"
        raise SourceError(f"{path} {what}; {_HOW}")
    if "models/model.json" not in members:
        raise SourceError(f"{path} holds no exported model (it may be a compiled package); {_HOW}")
    bad = archive.testzip()
    if bad is not None:
        raise ArtifactError(f"{path} is damaged: the checksum of {bad} does not match")
    for short, name in members.items():
        if short.endswith(".pt"):
            _check_pickle(path, short, archive.read(name))
        elif short.endswith("_config.json") and short.startswith("data/"):
            folder = short.rsplit("/", 1)[0]
            for entry, payload in json.loads(archive.read(name)).get("config", {}).items():
                member = f"{folder}/{payload.get('path_name')}"
                if payload.get("use_pickle"):
                    if not str(payload.get("path_name")).startswith(("weight_", "tensor_")):
                        raise SourceError(
                            f"{path}: the constant {entry!r} is no tensor but an object, which is not loaded"
                        )
                    if member in members:
                        _check_pickle(path, entry, archive.read(members[member]))


def _check_pickle(path: Path, what: str, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{path}: {what} holds pickled objects other than tensors, which could run code; export the program with "
            f"plain tensors as example inputs ({first})"
        ) from error


@contextmanager
def _quiet() -> Any:
    """Silence torch's own report of a failed load: the error that follows says it in one line."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

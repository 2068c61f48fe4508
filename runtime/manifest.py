"""The manifest of an artifact: what is in the directory, with the size and digest of every file.

``manifest.json`` is the only file that is read before anything is trusted, so it carries a checksum of itself: damage
to it is noticed like damage to any other file. (This is integrity, not authenticity: kernels are native code, and
whether to trust who made them is the user's decision.)
"""

# Annotations stay objects (no `annotations` from __future__): reading them costs a process no time then.

import json
from typing import Any

from . import typed_json
from .digests import hexadecimal
from .errors import ArtifactError
from .plan import FORMAT_VERSION, to_json
from .records import field, frozen

FILE_NAME = "manifest.json"
DEVICES = ("cpu", "cuda")
"""The kinds of device that plans are made for."""

_HEXADECIMAL = frozenset("0123456789abcdef")


@frozen
class Target:
    """Kernels for one kind of machine, such as ``"cpu:x86-64-v3"`` or ``"cuda:sm_90"``.

    ``features`` are the processor flags that a CPU must have, as ``/proc/cpuinfo`` spells them. ``library`` is the path
    of the native library, or of a GPU's table of binaries (``runtime/binaries.py``).
    """

    name: str
    features: tuple[str, ...]
    library: str


@frozen
class EntryPoint:
    """An entry point's name and the path of its plan for one kind of device, ``"cpu"`` or ``"cuda"``."""

    name: str
    plan: str
    device: str = field(default="cpu", metadata={typed_json.ADDED_LATER: True})


@frozen
class Weights:
    """The weight file: ``id`` is the SHA-256 of its header (8-byte length and JSON), ``size`` of the whole file."""

    file: str
    id: str
    size: int


@frozen
class FileRecord:
    """A file of the artifact: path relative to the directory, size in bytes, SHA-256 of its content."""

    path: str
    size: int
    sha256: str


@frozen
class Manifest:
    """The whole manifest. Targets come in order of preference; the first entry point is the default one.

    An entry point is listed once per kind of device that there is a plan for, all with the same names in one order.
    """

    format: int
    producer: str
    entries: tuple[EntryPoint, ...]
    targets: tuple[Target, ...]
    weights: Weights
    files: tuple[FileRecord, ...]
    info: Any


def dump(manifest: Manifest) -> bytes:
    """The content of ``manifest.json``."""
    data = to_json(manifest)
    data["checksum"] = _checksum(data)
    return (json.dumps(data, indent=1) + "\n").encode()


def parse(content: bytes, file: str) -> Manifest:
    """Read and validate a manifest.

    Args:
        content: of the file.
        file: its path, for messages.

    Raises:
        ArtifactError: damaged, made by a newer Tilewright, or not consistent.
    """
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); the file is damaged or not a manifest") from None
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise ArtifactError(f"{file}: not the manifest of a Tilewright artifact")
    if data["format"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: format version {data['format']} is newer than this Tilewright reads ({FORMAT_VERSION}); "
            f"upgrade Tilewright, or compile the model again with this version"
        )
    if data["format"] < 1:
        raise ArtifactError(f"{file}: there is no format version {data['format']}")
    checksum = data.pop("checksum", None)
    if checksum != _checksum(data):
        raise ArtifactError(
            f"{file}: its checksum does not match, the file is damaged; copy or compile the model again"
        )
    try:
        manifest: Manifest = typed_json.read(Manifest, data)
        _check(manifest)
    except typed_json.FieldError as error:
        raise ArtifactError(f"{file}: {error}") from None
    return manifest


def _checksum(data: dict[str, Any]) -> str:
    return hexadecimal(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def _check(manifest: Manifest) -> None:
    listed: set[str] = set()
    for index, item in enumerate(manifest.files):
        where = f"files[{index}]"
        if problem := path_problem(item.path):
            raise typed_json.FieldError(problem).within(f"{where}.path")
        if item.path in listed:
            raise typed_json.FieldError(f"{item.path!r} is listed twice").within(f"{where}.path")
        if item.size < 0:
            raise typed_json.FieldError("negative size").within(f"{where}.size")
        if len(item.sha256) != 64 or not _HEXADECIMAL.issuperset(item.sha256):
            raise typed_json.FieldError("not a SHA-256 digest").within(f"{where}.sha256")
        listed.add(item.path)
    if not manifest.entries:
        raise typed_json.FieldError("an artifact needs an entry point").within("entries")
    names: dict[str, list[str]] = {}
    for index, entry in enumerate(manifest.entries):
        if entry.device not in DEVICES:
            raise typed_json.FieldError(f"unknown kind of device {entry.device!r}").within(f"entries[{index}].device")
        names.setdefault(entry.device, []).append(entry.name)
    for device, found in names.items():
        if len(set(found)) < len(found):
            raise typed_json.FieldError("two entry points have the same name").within("entries")
        if found != next(iter(names.values())):
            raise typed_json.FieldError(f"the entry points for {device} are not those of the others").within("entries")
    used = [(f"entries[{i}].plan", entry.plan) for i, entry in enumerate(manifest.entries)]
    used += [(f"targets[{i}].library", target.library) for i, target in enumerate(manifest.targets)]
    for where, path in [*used, ("weights.file", manifest.weights.file)]:
        if path not in listed:
            raise typed_json.FieldError(f"{path!r} is not among the listed files").within(where)


def path_problem(path: str) -> str:
    """Why a path may not be in a manifest; empty when it may: relative, inside the directory, ``/`` between parts."""
    parts = path.split("/")
    if path.startswith("/") or ".." in parts:
        return f"path {path!r} leaves the artifact's directory"
    if "" in parts or "." in parts or "\\" in path or not path.isprintable():
        return f"path {path!r} is not in normal form"
    return ""

"""Reading an artifact directory: everything is validated here, before memory is allocated or code is loaded.

Loading checks the manifest, the presence, kind and size of every file, the digests of plans, of the chosen kernels and
of the weight file's header, and that plans, weights and entry points fit together. The weights themselves are hashed by
:func:`verify_integrity` only, so that loading does not have to read them.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import manifest as manifests
from . import weights as weight_files
from .digests import hexadecimal, sha256
from .errors import ArtifactError
from .manifest import EntryPoint, FileRecord, Manifest, Target
from .plan import Plan, StateBuffer, from_json
from .records import frozen

_BLOCK = 1 << 20
_MAX_MANIFEST = 1 << 28
_HUGE_FROM = 64 << 20  # bytes of weights; fewer are read at once in small pages while the rest of the model loads


@frozen
class Artifact:
    """A validated artifact: manifest, plans by kind of device and entry point, and the layout of the weight file."""

    path: Path
    manifest: Manifest
    devices: Mapping[str, Mapping[str, Plan]]
    weights: weight_files.Layout

    @property
    def plans(self) -> Mapping[str, Plan]:
        """Plan of every entry point in order, for the first kind of device (the CPU where there are several)."""
        return next(iter(self.devices.values()))

    @property
    def weights_path(self) -> Path:
        """The weight file."""
        return self.path / self.manifest.weights.file

    def library(self, target: Target) -> Path:
        """The path of a target's native library, after its digest has been checked.

        Raises:
            ArtifactError: its content is not what was written.
        """
        self.check_digest(target.library)
        return self.path / target.library

    def check_digest(self, path: str) -> None:
        """Check a file that the manifest lists.

        Raises:
            ArtifactError: it is not listed, or its content is not what was written.
        """
        _check_digest(self.path, self.manifest, path)

    def content(self, path: str) -> bytes:
        """The content of a file that the manifest lists, checked.

        Raises:
            ArtifactError: it is not listed, or its content is not what was written.
        """
        content = _read(self.path / path)
        if hexadecimal(content) != _record(self.manifest, path).sha256:
            raise _damaged(self.path / path)
        return content


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and validate everything but weights and native code.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    folder = Path(path)
    manifest_path = folder / manifests.FILE_NAME
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder}: {what}; expected the directory that `tilewright compile` wrote")
    try:
        if manifest_path.stat().st_size > _MAX_MANIFEST:
            raise ArtifactError(f"{manifest_path}: too large for a manifest")
        content = manifest_path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{manifest_path}: {error.strerror}; {folder} is no (complete) artifact") from None
    manifest = manifests.parse(content, str(manifest_path))
    _check_files(folder, manifest)
    devices: dict[str, dict[str, Plan]] = {}
    for entry in manifest.entries:
        plan = _read_plan(folder, manifest, entry.plan)
        if plan.entry != entry.name:
            raise ArtifactError(f"{folder / entry.plan}: is the plan of another entry point than {entry.name!r}")
        devices.setdefault(entry.device, {})[entry.name] = plan
    weights = _read_weights(folder, manifest)
    for entry in manifest.entries:
        _check_constants(devices[entry.device][entry.name], weights, str(folder / entry.plan))
    for device, plans in devices.items():
        _check_states(plans, folder, [entry for entry in manifest.entries if entry.device == device])
    return Artifact(folder, manifest, devices, weights)


def map_weights(artifact: Artifact) -> memoryview:
    """The data section of the weight file, mapped read-only, as bytes.

    Many weights are asked for in huge pages, as kernels that read them all meet the end of a small page every 4 KB;
    where the file system has none, this changes nothing.

    Raises:
        ArtifactError: it cannot be mapped.
    """
    try:
        with open(artifact.weights_path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), artifact.weights.size, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{artifact.weights_path}: cannot be mapped: {error}") from None
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE if artifact.weights.size >= _HUGE_FROM else mmap.MADV_WILLNEED)
    except OSError:  # a system without huge pages
        mapping.madvise(mmap.MADV_WILLNEED)
    return memoryview(mapping)[len(artifact.weights.header) :]


def verify_integrity(path: str | os.PathLike[str]) -> Artifact:
    """Validate an artifact and hash every file of it, weights included.

    Raises:
        ArtifactError: names all files that are damaged.
    """
    artifact = read_artifact(path)
    damaged = []
    for record in artifact.manifest.files:
        if _digest(artifact.path / record.path) != record.sha256:
            damaged.append(str(artifact.path / record.path))
    if damaged:
        raise ArtifactError(
            f"{', '.join(damaged)}: SHA-256 differs from the manifest's; copy or compile the model again"
        )
    return artifact


def _check_files(folder: Path, manifest: Manifest) -> None:
    root = os.path.realpath(folder)
    inside: dict[str, bool] = {}
    for record in manifest.files:
        place = os.path.join(root, record.path)
        try:
            if os.path.islink(place):
                place = os.path.realpath(place)
            parent = os.path.dirname(place)
            if parent not in inside:
                real = os.path.realpath(parent)
                inside[parent] = real == root or real.startswith(root + os.sep)
            if not inside[parent]:
                raise ArtifactError(f"{folder / record.path}: is a link that leaves the artifact's directory")
            status = os.stat(place)
        except OSError as error:
            raise ArtifactError(f"{folder / record.path}: {error.strerror}; the artifact is incomplete") from None
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{folder / record.path}: is not a regular file")
        if status.st_size != record.size:
            raise ArtifactError(
                f"{folder / record.path}: has {status.st_size} bytes, expected {record.size}; truncated or damaged"
            )


def _record(manifest: Manifest, path: str) -> FileRecord:
    for record in manifest.files:
        if record.path == path:
            return record
    raise ArtifactError(f"{path}: is not among the files that the manifest lists; compile the model again")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None


def _check_digest(folder: Path, manifest: Manifest, path: str) -> None:
    if _digest(folder / path) != _record(manifest, path).sha256:
        raise _damaged(folder / path)


def _damaged(file: Path) -> ArtifactError:
    return ArtifactError(
        f"{file}: SHA-256 differs from the manifest's, the file is damaged; copy or compile the model again"
    )


def _digest(file: Path) -> str:
    try:
        with open(file, "rb", buffering=0) as stream:
            digest = sha256(os.fstat(stream.fileno()).st_size)
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None
    return str(digest.hexdigest())


def _read_plan(folder: Path, manifest: Manifest, path: str) -> Plan:
    file = folder / path
    content = _read(file)
    if hexadecimal(content) != _record(manifest, path).sha256:
        raise _damaged(file)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error})") from None
    return from_json(data, str(file))


def _read_weights(folder: Path, manifest: Manifest) -> weight_files.Layout:
    file = folder / manifest.weights.file
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            content = stream.read(8 + min(length, size))
    except OSError as error:
        raise ArtifactError(f"{file}: {error.strerror}") from None
    layout = weight_files.read_header(content, size, str(file))
    if layout.id != manifest.weights.id or size != manifest.weights.size:
        raise ArtifactError(f"{file}: is not the weight file of this artifact, or its header is damaged")
    return layout


def _check_constants(plan: Plan, weights: weight_files.Layout, file: str) -> None:
    for index, constant in enumerate(plan.constants):
        tensor = weights.tensors.get(constant.key)
        if tensor is None:
            raise ArtifactError(f"{file}: constants[{index}].key: the weight file has no tensor {constant.key!r}")
        got = (constant.dtype, constant.shape, constant.offset, constant.offset + constant.bytes)
        if got != (tensor.dtype, tensor.shape, tensor.begin, tensor.end):
            raise ArtifactError(
                f"{file}: constants[{index}]: {constant.name} is {constant.dtype}{list(constant.shape)} at byte "
                f"{constant.offset}, the weight file has {tensor.dtype}{list(tensor.shape)} at byte {tensor.begin}"
            )


def _check_states(plans: Mapping[str, Plan], folder: Path, entries: Sequence[EntryPoint]) -> None:
    """A state that several entry points name is one memory: they must agree on it and on the constant it starts as."""
    known: dict[str, tuple[StateBuffer, str]] = {}
    ranges: dict[str, tuple[int, int, int]] = {}
    for entry in entries:
        plan = plans[entry.name]
        keys = {constant.name: constant.key for constant in plan.constants}
        for index, state in enumerate(plan.states):
            initial = keys.get(state.initial, "")
            other, key = known.setdefault(state.name, (state, initial))
            if (other.dtype, other.shape, key) != (state.dtype, state.shape, initial):
                raise ArtifactError(
                    f"{folder / entry.plan}: states[{index}]: {state.name} differs between entry points"
                )
        for index, symbol in enumerate(plan.symbols):
            if symbol.state == -1:
                continue
            limits = (symbol.minimum, symbol.maximum, symbol.sample)
            if ranges.setdefault(symbol.name, limits) != limits:
                raise ArtifactError(
                    f"{folder / entry.plan}: symbols[{index}]: {symbol.name}, a size of states, differs between entry "
                    f"points"
                )

"""Writing an artifact directory: weights one tensor at a time, plans, kernels, manifest; beside, then renamed.

The weight file's header, and with it the identity that is compiled into the kernels, follows from the table of keys,
dtypes and shapes alone (:func:`weights_id`), so the order is: lay out, compile, write.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..runtime import manifest as manifests
from ..runtime import weights as weight_files
from ..runtime.errors import CompileError, UsageError
from ..runtime.manifest import EntryPoint, FileRecord, Manifest, Target, Weights
from ..runtime.plan import FORMAT_VERSION, Plan, from_json, to_json

LIBRARY = "model.so"
TRITON_SOURCES = "kernels/triton"
_BLOCK = 4 << 20  # bytes that are written at once: some huge pages
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConstantData:
    """A constant to be written: ``load`` gives its array (dtype and shape as stated) when its turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray] = field(compare=False)


@dataclass(frozen=True)
class TargetBinaries:
    """The kernels for one target.

    Attributes:
        name: such as ``"cpu:x86-64-v3"``.
        features: processor flags that the code needs, as ``/proc/cpuinfo`` spells them (``"avx2"``, ``"avx512_vnni"``).
        files: path under ``kernels/<target>/`` → content.
        library: the one of them that is loaded first: the native library, or a GPU's table of binaries.
    """

    name: str
    features: tuple[str, ...]
    files: Mapping[str, bytes]
    library: str = LIBRARY


def layout_constants(specs: Iterable[ConstantData]) -> dict[str, tuple[int, int]]:
    """Key → (offset in the data section of the weight file, bytes), for constants in the order of the file."""
    return {key: (place.begin, place.end - place.begin) for key, place in _layout(specs).tensors.items()}


def weights_id(specs: Iterable[ConstantData]) -> tuple[str, int]:
    """What is compiled in as ``tw_weights_id`` and ``tw_weights_size``: identity and size of the whole weight file."""
    layout = _layout(specs)
    return layout.id, layout.size


def plan_name(entry: str, device: str) -> str:
    """The name of the plan of an entry point for a kind of device, which its file has."""
    return entry if device == "cpu" else f"{entry}.{device}"


def check_output(output: Path) -> None:
    """Refuse, before any work is done, a place where :func:`write_artifact` would refuse to write.

    Raises:
        UsageError: there is something that is not an artifact.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output} exists and is a file; choose another output directory")
    if any(output.iterdir()) and not _is_artifact(output):
        raise UsageError(f"{output} exists and is not a Tilewright artifact; choose another directory or remove it")


def write_artifact(
    output: Path,
    *,
    plans: Sequence[Plan] | Mapping[str, Sequence[Plan]],
    constants: Sequence[ConstantData],
    targets: Sequence[TargetBinaries],
    info: Mapping[str, Any],
    sources: Mapping[str, bytes] | None = None,
    copies: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
    check: Callable[[Path], Mapping[str, Any] | None] | None = None,
) -> Path:
    """Write an artifact; the same arguments give the same bytes.

    The directory is built under a hidden name beside ``output`` and renamed when it is complete, replacing an artifact
    that is there already. Whatever stops the writing, nothing is left behind and the old artifact stays.

    Args:
        output: the directory.
        plans: one per entry point, the default one first; offsets of their constants are :func:`layout_constants`'.
            For several kinds of device, or another than the CPU: those of each kind (``"cpu"``, ``"cuda"``), the CPU's
            first.
        constants: in the order of the file.
        targets: in order of preference.
        sources: file name under ``kernels/triton/`` → content: what all GPU targets share, and what the interpreter
            runs.
        copies: path in the directory → file whose content comes there.
        info: anything JSON-able that ``inspect`` shows: source, options, memory, provenance.
        progress: called with (bytes written, bytes in all) of the weights.
        check: called with the complete directory before it takes its place; if it raises, nothing is left. What it
            returns is added to ``info``.

    Returns:
        The directory.

    Raises:
        CompileError: the disk is full or cannot be written; a constant is not what it was said to be.
        UsageError: ``output`` is something else than an artifact.
        ArtifactError: a plan is not valid (an error of the compiler).
    """
    output = Path(os.path.realpath(output))
    check_output(output)
    layout = _layout(constants)
    files: list[FileRecord] = []
    with _building(output) as folder:
        entries = []
        for device, each in (plans if isinstance(plans, Mapping) else {"cpu": plans}).items():
            for plan in each:
                text, path = _plan_text(plan), f"plan/{plan_name(plan.entry, device)}.json"
                from_json(json.loads(text), path)
                _check_offsets(plan, layout)
                files.append(_write(folder, path, (text.encode(),)))
                entries.append(EntryPoint(plan.entry, path, device))
        listed = []
        for target in targets:
            base = f"kernels/{target.name.partition(':')[2] or target.name}"
            listed.append(Target(target.name, tuple(target.features), f"{base}/{target.library}"))
            files += [_write(folder, f"{base}/{path}", (content,)) for path, content in sorted(target.files.items())]
        for path, content in sorted((sources or {}).items()):
            files.append(_write(folder, f"{TRITON_SOURCES}/{path}", (content,)))
        for path, source in sorted((copies or {}).items()):
            files.append(_write(folder, path, (source.read_bytes(),)))
        files.append(_write(folder, weight_files.FILE_NAME, _blocks(_weights(layout, constants, progress))))
        weights = Weights(weight_files.FILE_NAME, layout.id, layout.size)
        producer = f"tilewright {__version__}"
        manifest = Manifest(FORMAT_VERSION, producer, tuple(entries), tuple(listed), weights, tuple(files), dict(info))
        _write_manifest(folder, manifest)
        if check is not None and (more := check(folder)):
            (folder / manifests.FILE_NAME).unlink()
            _write_manifest(folder, replace(manifest, info=manifest.info | dict(more)))
    return output


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifests.dump(manifest)
    manifests.parse(content, manifests.FILE_NAME)
    _write(folder, manifests.FILE_NAME, (content,))


def _layout(specs: Iterable[ConstantData]) -> weight_files.Layout:
    return weight_files.layout((spec.key, spec.dtype, spec.shape) for spec in specs)


def _plan_text(plan: Plan) -> str:
    """One line per symbol, buffer, step...: readable, and two plans can be compared line by line."""
    lines = []
    for name, value in to_json(plan).items():
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(name)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_offsets(plan: Plan, layout: weight_files.Layout) -> None:
    for constant in plan.constants:
        tensor = layout.tensors.get(constant.key)
        if tensor is None or (constant.dtype, constant.shape, constant.offset) != (
            tensor.dtype,
            tensor.shape,
            tensor.begin,
        ):
            raise CompileError(
                f"entry {plan.entry}: constant {constant.name} is not laid out as the weight file: {tensor}"
            )


def _weights(
    layout: weight_files.Layout, constants: Sequence[ConstantData], progress: Progress | None
) -> Iterator[bytes | memoryview]:
    yield layout.header
    total = layout.size - len(layout.header)
    for constant in constants:
        place = layout.tensors[constant.key]
        yield _data(constant)
        yield bytes(-place.end % weight_files.ALIGNMENT)
        if progress is not None:
            progress(min(place.end + -place.end % weight_files.ALIGNMENT, total), total)


def _data(constant: ConstantData) -> memoryview:
    array = np.asarray(constant.load(), order="C")
    # numpy has no bfloat16: its bits come as ml_dtypes.bfloat16 or as uint16
    names = ("bfloat16", "uint16") if constant.dtype == "bfloat16" else (constant.dtype,)
    if array.dtype.name not in names or array.shape != tuple(constant.shape):
        raise CompileError(
            f"constant {constant.key}: declared {constant.dtype}{list(constant.shape)}, "
            f"its data is {array.dtype.name}{list(array.shape)}"
        )
    return array.reshape(-1).view(np.uint8).data


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """A fresh directory beside ``output`` that takes its place when the block ends without an error."""
    folder = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        for parent, _, _ in os.walk(folder):
            _sync(parent)
        _move_into_place(folder, output)
        _sync(output.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompileError(f"no space left for {output}; free some or choose another output directory") from error
        raise CompileError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, output: Path) -> None:
    if not (output.exists() and any(output.iterdir())):
        folder.rename(output)
        return
    old = output.with_name(f".{output.name}.old-{secrets.token_hex(4)}")
    output.rename(old)
    try:
        folder.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, path: str, parts: Iterable[bytes | memoryview]) -> FileRecord:
    place = folder / path
    place.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    size = 0
    with open(place, "xb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path, size, digest.hexdigest())


def _blocks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in blocks that begin at multiples of 4 MB; each is gone when the next one is asked for.

    The kernel keeps what is written at once in pages as large, up to huge ones, and whoever maps the file gets these.
    """
    block = memoryview(bytearray(_BLOCK))
    filled = 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            count = min(len(rest), _BLOCK - filled)
            block[filled : filled + count] = rest[:count]
            rest, filled = rest[count:], filled + count
            if filled == _BLOCK:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def _sync(folder: str | Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_artifact(folder: Path) -> bool:
    try:
        data = json.loads((folder / manifests.FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and str(data.get("producer", "")).startswith("tilewright ")

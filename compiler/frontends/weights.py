"""The weight files of a checkpoint folder, checked before anything is loaded.

Format of safetensors: eight bytes with the little-endian length of a JSON header, the header (name → dtype, shape and
offsets into the data), the data. See https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import ArtifactError, SourceError

if TYPE_CHECKING:
    import torch

_BITS = {
    **{name: 64 for name in ("F64", "I64", "U64", "C64")},
    **{name: 32 for name in ("F32", "I32", "U32")},
    **{name: 16 for name in ("F16", "BF16", "I16", "U16")},
    **{name: 8 for name in ("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def map_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors by name, memory-mapped: nothing is read before it is used.

    Raises:
        SourceError: as :func:`check_weight_files`, which is called first.
        ArtifactError: likewise, or a tensor of a type that PyTorch does not have.
    """
    from safetensors import SafetensorError, safe_open

    check_weight_files(folder)
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                found.update((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no mapping
        except (SafetensorError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be mapped: {error}") from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The folder's one safetensors file, or the shards that its index names.

    Raises:
        SourceError: the folder has no safetensors.
        ArtifactError: the index cannot be read, or names a file outside the folder.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    return [folder / shard for shard in sorted(set(_places(folder).values()))]


def check_weight_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Find a folder's safetensors file, or the shards of its index, and check them whole.

    Returns:
        Tensor name → shape, over all shards.

    Raises:
        SourceError: the folder has no safetensors.
        ArtifactError: a file is missing, truncated or damaged, or lacks a tensor that the index places in it.
    """
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    places = _places(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise ArtifactError(f"{folder / shard} is missing; {_INDEX} lists {len(set(places.values()))} files")
        header = read_header(folder / shard)
        for tensor, place in places.items():
            if place == shard and tensor not in header:
                raise ArtifactError(f"{folder / shard} lacks the tensor {tensor!r}, which {_INDEX} places there")
        shapes.update(header)
    return shapes


def _places(folder: Path) -> dict[str, str]:
    """Tensor name → the file that the folder's index says it is in."""
    index = folder / _INDEX
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt*")
        )
        if pickled:
            raise SourceError(
                f"{folder} has its weights only as {pickled[0]}, a pickle, which could run code; convert it once with "
                f"model.save_pretrained(folder) of a current transformers, which writes model.safetensors"
            )
        raise SourceError(f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(tensor): str(shard) for tensor, shard in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index} is no index of weights: {type(error).__name__}: {error}") from error
    for shard in places.values():
        if "/" in shard or "\\" in shard or shard in ("", ".", ".."):
            raise ArtifactError(f"{index} names the file {shard!r}, which is not in the folder itself")
    return places


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file and their shapes.

    Raises:
        ArtifactError: the file is truncated, or its header is damaged or does not describe the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LARGEST_HEADER:
            raise ArtifactError(f"{path} is no safetensors file: it has no header of a possible length")
        if 8 + length > size:
            raise ArtifactError(f"{path} is truncated: its header has {length} bytes, the whole file {size}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 0
            shapes: dict[str, tuple[int, ...]] = {}
            for name, entry in header.items():
                shape = tuple(int(dim) for dim in entry["shape"])
                first, last = entry["data_offsets"]
                wanted = math.prod(shape) * _BITS[entry["dtype"]] // 8
                if not 0 <= first <= last or last - first != wanted:
                    raise ArtifactError(
                        f"{path} is damaged: tensor {name!r} of shape {list(shape)} needs {wanted} bytes, its offsets "
                        f"span {last - first}"
                    )
                shapes[name] = shape
                end = max(end, last)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{path} is damaged: its header cannot be read ({type(error).__name__}: {error})"
            ) from error
    if 8 + length + end != size:
        state = "truncated" if 8 + length + end > size else "longer than its header says"
        raise ArtifactError(f"{path} is {state}: its tensors need {8 + length + end} bytes, the file has {size}")
    return shapes

"""The weight file: a safetensors file whose tensors start at multiples of 64 bytes, memory-mapped for reading.

Format (https://github.com/huggingface/safetensors): an 8-byte little-endian length, that many bytes of JSON, then the
data; every tensor gives its dtype, shape and begin and end in the data. Tensors leave no gap, so alignment takes
explicit entries: ``__pad_<n>`` holds the zeros between two tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TypeGuard

from .digests import hexadecimal
from .errors import ArtifactError
from .plan_check import nbytes
from .records import frozen

FILE_NAME = "weights.safetensors"
ALIGNMENT = 64
PADDING = "__pad_"
DTYPE_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_MAX_HEADER = 100_000_000


@frozen
class Tensor:
    """A tensor of the file: begin and end count bytes from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@frozen
class Layout:
    """A file that is still to be written, or the header of one: everything but the data.

    Attributes:
        header: the bytes before the data section (a multiple of 64).
        tensors: key → place, without the padding, in file order.
        size: of the whole file in bytes.
    """

    header: bytes
    tensors: Mapping[str, Tensor]
    size: int

    @property
    def id(self) -> str:
        """The identity that is compiled into kernels: SHA-256 of the header, in hexadecimal."""
        return hexadecimal(self.header)


def layout(specs: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """Place tensors, given as (key, dtype, shape), one after the other.

    Raises:
        ValueError: a key twice, or one that the format reserves.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, object]] = {}
    position = 0
    for key, dtype, shape in specs:
        if key in tensors or key == "__metadata__" or key.startswith(PADDING):
            raise ValueError(f"constant {key!r} occurs twice or has a reserved name")
        end = position + nbytes(dtype, shape)
        tensors[key] = Tensor(dtype, tuple(shape), position, end)
        entries[key] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = -(-end // ALIGNMENT) * ALIGNMENT
        if position != end:
            name = f"{PADDING}{len(tensors) - 1}"
            entries[name] = {"dtype": "U8", "shape": [position - end], "data_offsets": [end, position]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, tensors, len(header) + position)


def read_header(content: bytes | memoryview, size: int, file: str) -> Layout:
    """Parse and validate the header of a weight file.

    Args:
        content: at least the header; usually the mapped file.
        size: of the whole file in bytes.
        file: its path, for messages.

    Raises:
        ArtifactError: truncated or malformed, an offset outside the file, a tensor that is not aligned.
    """
    length = int.from_bytes(bytes(content[:8]), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ArtifactError(f"{file}: not a safetensors file, or truncated")
    header = bytes(content[: 8 + length])
    try:
        entries = json.loads(header[8:])
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
        tensors = {
            key: _read_tensor(key, entry, size - len(header)) for key, entry in entries.items() if key != "__metadata__"
        }
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: {error}") from None
    if len(header) % ALIGNMENT:
        raise ArtifactError(f"{file}: its data section does not start at a multiple of {ALIGNMENT} bytes")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(PADDING)}
    return Layout(header, kept, size)


def _read_tensor(key: str, entry: object, data_size: int) -> Tensor:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {key!r} is no object")
    dtype = _DTYPES.get(entry.get("dtype", ""))
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if dtype is None or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} has no valid dtype, shape and data_offsets")
    begin, end = offsets
    if end > data_size:
        raise ValueError(f"tensor {key!r} ends at byte {end} of {data_size}; the file is truncated")
    if end - begin != nbytes(dtype, shape):
        raise ValueError(f"tensor {key!r} has {end - begin} bytes, its dtype and shape need {nbytes(dtype, shape)}")
    return Tensor(dtype, tuple(shape), begin, end)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

"""Initializers: ONNX element types, and tensor data as torch tensors, memory-mapped where it lies in its own file."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import torch

from ....runtime.errors import ArtifactError, SourceError

DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.COMPLEX64: torch.complex64,
    onnx.TensorProto.COMPLEX128: torch.complex128,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    onnx.TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    onnx.TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}


def torch_dtype(element: int) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        SourceError: torch has no such type (strings, 2- and 4-bit numbers).
    """
    if element in DTYPES:
        return DTYPES[element]
    name = onnx.TensorProto.DataType.Name(element) if element in onnx.TensorProto.DataType.values() else str(element)
    raise SourceError(f"tensors of ONNX element type {name} are not supported; export with another type")


class WeightFiles:
    """External data files of one model, each mapped once; tensors at the same place share memory.

    Args:
        folder: the model's directory, outside which no data is read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder.resolve()
        self._maps: dict[Path, mmap.mmap] = {}
        self._tensors: dict[tuple, torch.Tensor] = {}

    def tensor(self, proto: onnx.TensorProto) -> torch.Tensor:
        """The tensor of an initializer; external data stays on disk until it is touched.

        Raises:
            ArtifactError: external data that is missing, too short, or outside the model's folder.
            SourceError: an element type that torch lacks, or data that does not fill the declared shape.
        """
        dtype = torch_dtype(proto.data_type)
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            return self._external(proto, dtype)
        return inline_tensor(proto, dtype)

    def _external(self, proto: onnx.TensorProto, dtype: torch.dtype) -> torch.Tensor:
        where = {entry.key: entry.value for entry in proto.external_data}
        path = self._inside(proto.name, where.get("location", ""))
        count = int(np.prod(proto.dims, dtype=np.int64))
        size = count * dtype.itemsize
        try:
            offset, length = int(where.get("offset", 0)), int(where.get("length", size))
        except ValueError:
            raise ArtifactError(f"{path}: offset or length of initializer {proto.name!r} is not a number") from None
        if length != size:
            raise ArtifactError(f"{path}: initializer {proto.name!r} needs {size} bytes, its entry says {length}")
        if not size:
            return torch.empty(tuple(proto.dims), dtype=dtype)
        key = (path, offset, dtype, tuple(proto.dims))
        if key not in self._tensors:
            mapped = self._map(path, proto.name)
            if offset < 0 or offset + size > len(mapped):
                raise ArtifactError(
                    f"{path}: initializer {proto.name!r} lies at bytes {offset}..{offset + size}, but the file has "
                    f"{len(mapped)}; it is truncated or belongs to another model"
                )
            if offset % dtype.itemsize:
                flat = torch.frombuffer(bytearray(mapped[offset : offset + size]), dtype=dtype)
            else:
                flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
            self._tensors[key] = flat.reshape(tuple(proto.dims))
        return self._tensors[key]

    def _inside(self, name: str, location: str) -> Path:
        """The data file, which must lie in the model's folder however it is spelled or linked."""
        posix = PurePosixPath(location)
        outside = (
            posix.is_absolute()
            or PureWindowsPath(location).is_absolute()
            or ".." in location.replace("\\", "/").split("/")
        )
        path = self._folder / location
        if not location or outside or not path.resolve().is_relative_to(self._root):
            raise ArtifactError(
                f"{location!r}: external data of initializer {name!r} is outside the model's folder; refused"
            )
        if not path.is_file():
            raise ArtifactError(f"{path}: the file with the external data of initializer {name!r} is missing")
        return path

    def _map(self, path: Path, name: str) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                if not path.stat().st_size:
                    raise ArtifactError(f"{path}: the file with the external data of initializer {name!r} is empty")
                # copy-on-write, because torch wants writable memory; pages that nobody writes stay shared with the file
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def inline_tensor(proto: onnx.TensorProto, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose data lies in the message itself.

    Raises:
        SourceError: the data does not fill the declared shape.
    """
    shape = tuple(proto.dims)
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return torch.empty(shape, dtype=dtype)
    if proto.HasField("raw_data"):
        raw = proto.raw_data
        if len(raw) != count * dtype.itemsize:
            raise SourceError(
                f"initializer {proto.name!r} has {len(raw)} bytes, "
                f"its shape {list(shape)} needs {count * dtype.itemsize}"
            )
        with warnings.catch_warnings():
            # the bytes are read-only and nothing writes weights; a writable copy would double the memory
            warnings.simplefilter("ignore", UserWarning)
            return torch.frombuffer(raw, dtype=dtype).reshape(shape)
    try:
        array = onnx.numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise SourceError(f"initializer {proto.name!r} cannot be read: {error}") from None
    if array.dtype.kind == "V" or array.dtype.name not in np.sctypeDict:  # bfloat16 and float8: numpy only carries bits
        array = array.view({1: np.uint8, 2: np.uint16}[array.dtype.itemsize])
        return torch.from_numpy(array.copy()).view(dtype).reshape(shape)
    return torch.from_numpy(np.array(array)).to(dtype).reshape(shape)

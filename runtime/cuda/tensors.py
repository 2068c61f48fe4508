"""Tensors of callers in the memory of a GPU: taking them as they are, through DLPack or the CUDA array interface.

Neither copies. Both say in which stream the data is ready: DLPack lets the owner make our stream wait, the array
interface names the owner's stream, and ours waits for it. Protocols:
https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html,
https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import dlpack
from ..dtypes import numpy_dtype
from ..errors import ShapeError
from ..plan import Port
from ..ports import describe
from .context import Context
from .streams import Stream

ALIGNMENT = 16
"""Bytes that every operand's address is a multiple of: kernels are compiled for it."""

CUDA, CUDA_MANAGED = 2, 13
"""Device types of DLPack that kernels can read."""


@dataclass(frozen=True)
class DeviceTensor:
    """Contiguous memory of the device, kept alive by ``owner``."""

    address: int
    shape: tuple[int, ...]
    bytes: int
    owner: Any

    def overlaps(self, other: DeviceTensor) -> bool:
        """Whether they share memory."""
        return self.address < other.address + other.bytes and other.address < self.address + self.bytes


def on_device(value: Any) -> bool:
    """Whether a value lies in a GPU's memory (of any GPU)."""
    if isinstance(value, np.ndarray):
        return False
    if hasattr(value, "__dlpack_device__"):
        return value.__dlpack_device__()[0] in (CUDA, CUDA_MANAGED)
    return hasattr(value, "__cuda_array_interface__")


def device_tensor(value: Any, port: Port, what: str, context: Context, stream: Stream, written: bool) -> DeviceTensor:
    """A caller's tensor as an operand.

    Args:
        value: for which :func:`on_device` holds.
        port: that it is for.
        what: it is, for messages: ``"input 'x'"``.
        context: of the device, which must be current.
        stream: that will use it; it waits for whoever writes the tensor.
        written: whether it is an output.

    Raises:
        ShapeError: on another device, of another dtype, not contiguous, not aligned, or read-only for an output.
    """
    kind = type(value).__name__
    try:
        if hasattr(value, "__dlpack__"):
            found = _from_dlpack(value, context, stream)
        else:
            found = _from_interface(value, context, stream, written)
    except ValueError as error:
        raise ShapeError(f"{what}: cannot use this {kind}: {error}") from error
    address, dtype, shape, strides, owner = found
    if dtype != numpy_dtype(port.dtype):
        raise ShapeError(f"{what}: expected {describe(port)}, got {dtype.name}[{', '.join(map(str, shape))}]")
    count = dtype.itemsize
    for extent, step in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and step != count and 0 not in shape:
            raise ShapeError(
                f"{what}: the {kind} does not lie contiguously (shape {list(shape)}, strides {list(strides)} in "
                f"bytes); make it contiguous first, such as with .contiguous()"
            )
        count *= extent
    if address % ALIGNMENT and count:
        raise ShapeError(
            f"{what}: the {kind} begins at an address that is no multiple of {ALIGNMENT} bytes, as a slice may; copy it"
        )
    return DeviceTensor(address, shape, count, owner)


Found = tuple[int, np.dtype[Any], tuple[int, ...], tuple[int, ...], Any]  # the strides in bytes


def _from_dlpack(value: Any, context: Context, stream: Stream) -> Found:
    _, ordinal = value.__dlpack_device__()
    if ordinal != context.ordinal:
        raise ValueError(f"it is on cuda:{ordinal}, the model on {context.name}")
    try:
        capsule = value.__dlpack__(stream=stream.number)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    header = dlpack.DLTensor.from_address(dlpack.get_pointer(capsule, b"dltensor"))
    dtype = dlpack.dtype_of(header)
    shape = tuple(header.shape[axis] for axis in range(header.ndim))
    if header.strides:
        strides = tuple(header.strides[axis] * dtype.itemsize for axis in range(header.ndim))
    else:
        strides = _row_major(shape, dtype.itemsize)
    return (header.data or 0) + header.byte_offset, dtype, shape, strides, (value, capsule)


def _from_interface(value: Any, context: Context, stream: Stream, written: bool) -> Found:
    interface = value.__cuda_array_interface__
    address, read_only = interface["data"]
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    if interface.get("mask") is not None:
        raise ValueError("it has a mask")
    if written and read_only:
        raise ValueError("it is read-only")
    driver = context.driver
    if address:
        kind = driver.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        ordinal = int(driver("cuPointerGetAttribute", kind, address))
        if ordinal != context.ordinal:
            raise ValueError(f"it is on cuda:{ordinal}, the model on {context.name}")
    theirs = interface.get("stream")
    if theirs is not None and theirs != stream.number:
        event = driver("cuEventCreate", driver.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            driver("cuEventRecord", event, driver.api.CUstream(theirs))
            driver("cuStreamWaitEvent", stream.handle, event, 0)
        finally:
            driver("cuEventDestroy", event)
    strides = interface.get("strides")
    return address or 0, dtype, shape, tuple(strides) if strides else _row_major(shape, dtype.itemsize), value


def _row_major(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    strides = []
    for extent in reversed(shape):
        strides.append(item)
        item *= extent
    return tuple(reversed(strides))

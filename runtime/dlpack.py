"""Viewing DLPack tensors as numpy arrays, without a copy; unlike ``numpy.from_dlpack`` also bfloat16.

The capsule is never consumed: it is kept alive by the array, and when it goes its own destructor calls the producer's
deleter, as the protocol says. Structures: https://dmlc.github.io/dlpack/latest/c_api.html.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .dtypes import numpy_dtype

ON_HOST = {1: "CPU", 3: "pinned host memory"}
DEVICES = {2: "a CUDA device", 4: "an OpenCL device", 7: "a Vulkan device", 8: "a Metal device", 10: "a ROCm device"}
KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


class DLTensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype = ctypes.c_void_p
get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def view(tensor: Any) -> np.ndarray:
    """A numpy array over the memory of an object with ``__dlpack__``.

    Raises:
        ValueError: not in host memory, of a dtype that numpy and ml_dtypes lack, or refused by its owner.
    """
    device, _ = tensor.__dlpack_device__()
    if device not in ON_HOST:
        raise ValueError(f"it is on {DEVICES.get(device, f'device type {device}')}; move it to the CPU first")
    try:
        capsule = tensor.__dlpack__()
    except (BufferError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    address = get_pointer(capsule, b"dltensor")
    header = DLTensor.from_address(address)
    dtype = dtype_of(header)
    shape = tuple(header.shape[axis] for axis in range(header.ndim))
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return np.empty(shape, dtype)
    if header.strides:
        strides = tuple(header.strides[axis] * dtype.itemsize for axis in range(header.ndim))
    else:
        strides = np.empty(shape, dtype).strides
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    low = sum(step for step in reach if step < 0)
    high = sum(step for step in reach if step > 0) + dtype.itemsize
    memory = (ctypes.c_char * (high - low)).from_address(header.data + header.byte_offset + low)
    memory.owner = capsule
    return np.ndarray(shape, dtype, memory, -low, strides)


def dtype_of(header: DLTensor) -> np.dtype[Any]:
    """The numpy dtype of a tensor.

    Raises:
        ValueError: there is none.
    """
    kind, bits = KINDS.get(header.code, f"code {header.code} "), header.bits
    if header.lanes == 1:
        if kind == "bfloat" and bits == 16:
            return numpy_dtype("bfloat16")
        if kind == "bool" and bits == 8:
            return np.dtype(np.bool_)
        if kind in ("int", "uint") and bits in (8, 16, 32, 64):
            return np.dtype(f"{kind}{bits}")
        if (kind == "float" and bits in (16, 32, 64)) or (kind == "complex" and bits in (64, 128)):
            return np.dtype(f"{kind}{bits}")
    raise ValueError(f"its dtype ({kind}{bits}, {header.lanes} lanes) has no numpy counterpart")

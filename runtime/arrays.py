"""Numpy arrays at the border: what a caller gives as kernels read and write it: exact dtype, C-contiguous, aligned."""

from __future__ import annotations

from typing import Any

import numpy as np

from .buffers import input_view, output_view, view_of
from .dtypes import numpy_dtype
from .errors import InputError, ShapeError
from .memory import ALIGN_FROM, aligned_bytes
from .plan import Port
from .ports import describe


def describe_array(array: np.ndarray) -> str:
    """An array as messages show it: ``float32[4, 384]``."""
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"


def new_output(shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> np.ndarray:
    """An uninitialised array of ``count`` bytes for the caller to keep; large ones begin at a multiple of 64."""
    if count < ALIGN_FROM:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, aligned_bytes(count))


def input_array(value: Any, port: Port) -> np.ndarray:
    """The array of an input: arrays, DLPack tensors and buffers as they are, copied only if not contiguous or aligned.

    Python numbers and lists of them have no dtype of their own and take the port's if it holds their kind: whole
    numbers go anywhere they fit, other numbers into floating point only.

    Raises:
        ShapeError: another dtype; the message names the input, what was expected and what came.
        InputError: a Python number out of the dtype's range.
    """
    array = _as_array(value, port)
    if array.dtype != numpy_dtype(port.dtype) or not array.dtype.isnative:
        raise ShapeError(
            f"input {port.name!r}: expected {describe(port)}, got {describe_array(array)}; "
            f"convert it with .astype({port.dtype!r}) if that is what you mean"
        )
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = array.copy(order="C")
    return array


def _as_array(value: Any, port: Port) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        from . import dlpack

        try:
            return dlpack.view(value)
        except ValueError as error:
            raise ShapeError(f"input {port.name!r}: cannot use this {type(value).__name__}: {error}") from error
    view = view_of(value, port)
    if view is not None:
        return _over(input_view(view, port), port)
    if isinstance(value, bool | int | float | list | tuple):
        return _from_python(value, port)
    raise ShapeError(
        f"input {port.name!r}: expected {describe(port)} as a numpy array or DLPack tensor, got {type(value).__name__}"
    )


def _over(view: memoryview, port: Port) -> np.ndarray:
    return np.frombuffer(view, numpy_dtype(port.dtype)).reshape(view.shape)


def _from_python(value: Any, port: Port) -> np.ndarray:
    dtype = numpy_dtype(port.dtype)
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise ShapeError(f"input {port.name!r}: not a regular list of numbers: {error}") from None
    if array.size == 0:
        return array.astype(dtype)
    fits = {"b": "b", "i": "biu", "u": "biu"}.get(dtype.kind, "biuf")
    if array.dtype.kind not in fits:
        raise ShapeError(f"input {port.name!r}: expected {describe(port)}, got a list of {array.dtype.name}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise InputError(f"input {port.name!r}: a value does not fit {port.dtype}")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype.kind not in "biu" and not np.array_equal(np.isinf(array), np.isinf(converted.astype(np.float64))):
        raise InputError(f"input {port.name!r}: a value does not fit {port.dtype}")
    return converted


def out_array(value: Any, port: Port, shape: tuple[int, ...]) -> np.ndarray:
    """The caller's array in host memory for an output.

    Raises:
        ShapeError: it has not exactly the output's dtype and shape, or cannot be written in place.
    """
    if isinstance(value, np.ndarray):
        array = value
    elif hasattr(value, "__dlpack__"):
        from . import dlpack

        try:
            array = dlpack.view(value)
        except ValueError as error:
            raise ShapeError(f"out: output {port.name!r}: cannot use this {type(value).__name__}: {error}") from error
    elif (view := view_of(value, port)) is not None:
        array = _over(output_view(view, port, shape), port)
    else:
        raise ShapeError(
            f"out: output {port.name!r}: expected a numpy array or DLPack tensor, got {type(value).__name__}"
        )
    if array.dtype != numpy_dtype(port.dtype) or not array.dtype.isnative or array.shape != shape:
        expected = f"{port.dtype}[{', '.join(map(str, shape))}]"
        raise ShapeError(f"out: output {port.name!r}: expected {expected}, got {describe_array(array)}")
    if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
        raise ShapeError(f"out: output {port.name!r}: the array must be C-contiguous, aligned and writable")
    return array

"""Turning what a caller gives into the arrays that kernels read and write: exact dtype, C-contiguous, aligned."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from . import sizes
from .dtypes import numpy_dtype
from .errors import InputError, ShapeError, UsageError
from .plan import Port

_ALIGNMENT = 64
_ALIGN_FROM = 4096  # bytes; below this a vector that straddles two cache lines costs less than aligning

_HUGE_PAGE = 2 << 20
_HUGE_FROM = 1 << 20  # bytes; scratch memory below this takes fewer page faults than a huge page is worth

_address = ctypes.addressof
_first_byte = ctypes.c_char.from_buffer


def describe(port: Port) -> str:
    """A port as messages show it: ``float32[batch, 384]``."""
    return f"{port.dtype}[{', '.join(map(sizes.show, port.shape))}]"


def describe_array(array: np.ndarray) -> str:
    """An array as messages show it: ``float32[4, 384]``."""
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"


def address(array: np.ndarray) -> int:
    """Where the array's data begins."""
    try:
        buffer: Any = array
        return _address(_first_byte(buffer))  # a quarter of the time of array.ctypes.data
    except (TypeError, ValueError, BufferError):  # read-only, empty, or a dtype that buffers cannot express
        return array.ctypes.data


def aligned_bytes(count: int) -> np.ndarray:
    """Uninitialised bytes that begin at a multiple of 64."""
    raw = np.empty(count + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + count]


def scratch_bytes(count: int) -> np.ndarray:
    """Zeros that begin at a multiple of 64, in huge pages where there are many: few page faults when first written."""
    if count < _HUGE_FROM:
        return aligned_bytes(count)
    whole = np.frombuffer(_huge_pages(count + _HUGE_PAGE), np.uint8)
    begin = -whole.ctypes.data % _HUGE_PAGE  # what lies before and after is never touched
    return whole[begin : begin + count]


class Zeros:
    """Memory that is zero at first and again after :meth:`clear`; much of it takes no memory until it is written.

    Attributes:
        array: the bytes, which begin at a multiple of 64 and stay where they are.
    """

    def __init__(self, count: int) -> None:
        """Reserve so many bytes.

        Raises:
            MemoryError: there is no room for them.
        """
        self._pages: mmap.mmap | None = None
        if count < _HUGE_FROM:
            self.array = aligned_bytes(count)
            self.array[:] = 0
            return
        try:
            self._pages = _huge_pages(count)
        except OSError as error:
            raise MemoryError(f"no room for {count} bytes of state: {error}") from error
        self.array = np.frombuffer(self._pages, np.uint8)[:count]

    def clear(self) -> None:
        """Make all bytes zero, and give back the memory that they took."""
        if self._pages is None:
            self.array[:] = 0
        else:
            self._pages.madvise(mmap.MADV_DONTNEED)  # private and anonymous: it reads as zeros afterwards


def _huge_pages(count: int) -> mmap.mmap:
    """Anonymous memory of this process, zeros, in huge pages where the system has them."""
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def new_output(shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> np.ndarray:
    """An uninitialised array of ``count`` bytes for the caller to keep; large ones begin at a multiple of 64."""
    if count < _ALIGN_FROM:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, aligned_bytes(count))


def input_array(value: Any, port: Port) -> np.ndarray:
    """The array of an input: numpy arrays and DLPack tensors as they are, copied only when not contiguous or aligned.

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
    if isinstance(value, bool | int | float | list | tuple):
        return _from_python(value, port)
    raise ShapeError(
        f"input {port.name!r}: expected {describe(port)} as a numpy array or DLPack tensor, got {type(value).__name__}"
    )


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


def output_arrays(
    out: Any, ports: Sequence[Port], shapes: Sequence[tuple[int, ...]], inputs: Sequence[np.ndarray]
) -> list[np.ndarray | None]:
    """The caller's arrays for the outputs, by position, None where none was given.

    Args:
        out: an array (for a single output), a sequence of arrays in the order of the outputs, or a dictionary by
            output name, which may leave some out.
        ports: the outputs.
        shapes: their shapes in this call.
        inputs: arrays that no output may share memory with.

    Raises:
        UsageError: an unknown name or the wrong number of arrays; one that shares memory with another.
        ShapeError: an array that does not have exactly the output's dtype and shape, or cannot be written in place.
    """
    arrays: list[np.ndarray | None] = []
    taken = list(inputs)
    for value, port, shape in zip(given_outputs(out, ports), ports, shapes, strict=True):
        if value is None:
            arrays.append(None)
            continue
        array = out_array(value, port, shape)
        if any(np.may_share_memory(array, other) for other in taken):
            raise shared_output(port)
        taken.append(array)
        arrays.append(array)
    return arrays


def given_outputs(out: Any, ports: Sequence[Port]) -> list[Any]:
    """What the caller gives for each output, None where nothing.

    Raises:
        UsageError: an unknown name or the wrong number.
    """
    if isinstance(out, Mapping):
        names = [port.name for port in ports]
        if unknown := [name for name in out if name not in names]:
            raise UsageError(f"out: there is no output {unknown[0]!r}; the outputs are {', '.join(names)}")
        return [out.get(name) for name in names]
    given = list(out) if isinstance(out, list | tuple) else [out]
    if len(given) != len(ports):
        raise UsageError(f"out: the model has {len(ports)} outputs, got {len(given)} arrays")
    return given


def shared_output(port: Port) -> UsageError:
    """The error for an output whose memory is that of something else."""
    return UsageError(f"out: the array for output {port.name!r} shares memory with an input or another output")


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

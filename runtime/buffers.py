"""Buffers at the border, without numpy: ``bytes``, ``bytearray``, ``memoryview``, ``array.array``, ``mmap``, ctypes.

A ``memoryview`` has a format and a shape, so it says what a port has to know. Raw bytes and flat buffers have no shape
of their own: they take that of a port whose sizes do not vary.

Half precision (``float16``, ``bfloat16``) is given back in format ``H``, as its bits: Python has no format for
bfloat16, and before 3.12 no views of float16.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from .errors import ShapeError
from .memory import ALIGN_FROM, PyBuffer, address, aligned_bytes, uninitialised
from .plan import Port
from .plan_check import ITEM_BYTES, nbytes
from .ports import describe

FORMATS = {
    "float64": "d", "float32": "f", "float16": "H", "bfloat16": "H", "int64": "q", "int32": "i", "int16": "h",
    "int8": "b", "uint8": "B", "bool": "?",
}  # fmt: skip
"""The format of a result of each dtype."""

_ACCEPTED = FORMATS | {"float16": "He", "int64": "qln", "int32": "il"}
"""The formats that each dtype may come in; what ``l`` and ``n`` are, the size of an item tells."""

_NATIVE = ("", "@", "=", "<" if sys.byteorder == "little" else ">")
_RAW = ("B", "b", "c", *(f"{order}c" for order in "@=<>"))


def view_of(value: Any, port: Port) -> memoryview | None:
    """A view of a buffer; None of what is no buffer, or the array of a library, which knows more of itself.

    Raises:
        ShapeError: a buffer that has been released or closed.
    """
    if hasattr(value, "dtype") or hasattr(value, "__dlpack__"):
        return None
    try:
        return memoryview(value)
    except TypeError:
        return None
    except (ValueError, BufferError) as error:
        raise ShapeError(f"{port.name!r}: cannot use this {type(value).__name__}: {error}") from None


def input_view(view: memoryview, port: Port) -> memoryview:
    """The view of an input with format and shape, copied only when it is not contiguous or aligned.

    Raises:
        ShapeError: another format, or raw bytes whose shape cannot be told; the message names the input, what was
            expected and what came.
    """
    if not _fits(view.format, view.itemsize, port.dtype):
        view = _shaped(view, port)
    elif view.ndim == 1 != len(port.shape) and view.nbytes == _fixed_bytes(port):
        view = _with_shape(view, port.dtype, _fixed_shape(port))
    if not view.c_contiguous or address(view) % view.itemsize:
        view = _copied(view, port.dtype)
    return view


def output_view(view: memoryview, port: Port, shape: tuple[int, ...]) -> memoryview:
    """The caller's buffer for an output, with the output's shape.

    Raises:
        ShapeError: it has another format or size, or cannot be written in place.
    """
    fits = _fits(view.format, view.itemsize, port.dtype)
    if view.ndim == 1 and view.nbytes == nbytes(port.dtype, shape) and (fits or _is_raw(view)):
        flat = _flat(view)
        if (not fits or view.shape != shape) and flat is not None:
            view, fits = _reshaped(flat, port.dtype, shape), True
    if not fits or view.shape != shape:
        expected = f"{port.dtype}[{', '.join(map(str, shape))}]"
        raise ShapeError(
            f"out: output {port.name!r}: expected {expected}, got {_describe(view)}; a bytearray of "
            f"{nbytes(port.dtype, shape)} bytes fits, or a view of format {FORMATS[port.dtype]!r} and that shape"
        )
    if view.readonly or not view.c_contiguous or address(view) % view.itemsize:
        raise ShapeError(f"out: output {port.name!r}: the buffer must be C-contiguous, aligned and writable")
    return view


def new_view(shape: tuple[int, ...], dtype: str, count: int) -> memoryview:
    """An uninitialised view of ``count`` bytes for the caller to keep; large ones begin at a multiple of 64."""
    flat = memoryview(uninitialised(count)) if count < ALIGN_FROM else aligned_bytes(count)
    return _reshaped(flat, dtype, shape)


def duplicate(view: memoryview) -> memoryview:
    """The same values in memory of their own."""
    dtype = next(dtype for dtype in _ACCEPTED if _fits(view.format, view.itemsize, dtype))
    return _copied(view, dtype)


@cache
def _fits(form: str, item_bytes: int, dtype: str) -> bool:
    """Whether items of a format are of a dtype, as this processor has it."""
    order, character = form[:-1], form[-1:]
    known = bool(character) and character in _ACCEPTED[dtype]
    return known and order in _NATIVE and item_bytes == ITEM_BYTES[dtype]


def _shaped(view: memoryview, port: Port) -> memoryview:
    """Raw bytes with format and shape of a port."""
    form = FORMATS[port.dtype]
    if not _is_raw(view):
        raise ShapeError(
            f"input {port.name!r}: expected {describe(port)}, got {_describe(view)}; its format must be {form!r}"
        )
    count = _fixed_bytes(port)
    if count is None:
        raise ShapeError(
            f"input {port.name!r}: expected {describe(port)}, got {view.nbytes} bytes without a shape; its sizes "
            f"vary, so give them one: memoryview(data).cast('B').cast({form!r}, shape)"
        )
    if count != view.nbytes:
        raise ShapeError(f"input {port.name!r}: expected {describe(port)}, {count} bytes, got {view.nbytes} bytes")
    return _with_shape(view, port.dtype, _fixed_shape(port))


def _is_raw(view: memoryview) -> bool:
    return view.ndim == 1 and view.format in _RAW


def _fixed_shape(port: Port) -> tuple[int, ...]:
    """The shape of a port whose sizes do not vary."""
    return tuple(size for size in port.shape if isinstance(size, int))


def _fixed_bytes(port: Port) -> int | None:
    """The bytes of a port; None where its sizes vary."""
    shape = _fixed_shape(port)
    return nbytes(port.dtype, shape) if len(shape) == len(port.shape) else None


def _with_shape(view: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
    flat = _flat(view)
    return _reshaped(memoryview(view.tobytes()) if flat is None else flat, dtype, shape)


def _copied(view: memoryview, dtype: str) -> memoryview:
    return _reshaped(memoryview(bytearray(view.tobytes())), dtype, view.shape or ())


def _flat(view: memoryview) -> memoryview | None:
    """The bytes of a view without a copy; None where there are gaps between them."""
    try:
        return view.cast("B")
    except TypeError:
        return None


def _reshaped(flat: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
    form: Any = FORMATS[dtype]
    return flat.cast(form, shape) if 0 not in shape else _empty(dtype, shape)


def _empty(dtype: str, shape: tuple[int, ...]) -> memoryview:
    """A view of a shape without elements, which ``memoryview.cast`` refuses."""
    sizes = (ctypes.c_ssize_t * len(shape))(*shape)
    strides = (ctypes.c_ssize_t * len(shape))()
    step = ITEM_BYTES[dtype]
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    buffer = PyBuffer(
        buf=ctypes.addressof(_NOTHING),
        itemsize=ITEM_BYTES[dtype],
        ndim=len(shape),
        format=_FORMAT_BYTES[dtype],
        shape=sizes,
        strides=strides,
    )
    made: memoryview = _view_of_buffer(ctypes.byref(buffer))
    return made


_FORMAT_BYTES = {dtype: form.encode() for dtype, form in FORMATS.items()}
"""Views point at their format, so these stay."""
_NOTHING = (ctypes.c_char * 64)()
_view_of_buffer = ctypes.pythonapi["PyMemoryView_FromBuffer"]
_view_of_buffer.restype, _view_of_buffer.argtypes = ctypes.py_object, (ctypes.c_void_p,)


def _describe(view: memoryview) -> str:
    return f"a buffer of format {view.format!r} and shape {list(view.shape or ())}"

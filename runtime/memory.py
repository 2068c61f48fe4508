"""Memory without numpy: where a buffer begins, bytes at a multiple of 64, scratch memory, zeros to be cleared again.

A tensor at the border is a numpy array or a ``memoryview``; what is here takes either, by Python's buffer protocol.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from ctypes import c_char_p, c_int, c_size_t, c_ssize_t, c_void_p
from typing import Any

ALIGNMENT = 64
ALIGN_FROM = 4096  # bytes of a result; below this a vector that straddles two cache lines costs less than aligning

_HUGE_PAGE = 2 << 20
_HUGE_FROM = 1 << 20  # bytes; scratch memory below this takes fewer page faults than a huge page is worth
_ADVISE_FROM = 4 << 20  # bytes of an output; below this there may be no whole huge page in it


class PyBuffer(ctypes.Structure):
    """``Py_buffer`` of Python's C interface."""

    _fields_ = (
        ("buf", c_void_p),
        ("obj", c_void_p),
        ("len", c_ssize_t),
        ("itemsize", c_ssize_t),
        ("readonly", c_int),
        ("ndim", c_int),
        ("format", c_char_p),
        ("shape", ctypes.POINTER(c_ssize_t)),
        ("strides", ctypes.POINTER(c_ssize_t)),
        ("suboffsets", ctypes.POINTER(c_ssize_t)),
        ("internal", c_void_p),
    )


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function that this process has, as an object of its own: others may give theirs other types."""
    function = ctypes.pythonapi[name]
    function.restype, function.argtypes = result, arguments
    return function


_get_buffer = _python("PyObject_GetBuffer", c_int, ctypes.py_object, c_void_p, c_int)
_release_buffer = _python("PyBuffer_Release", None, c_void_p)
_bytearray = _python("PyByteArray_FromStringAndSize", ctypes.py_object, c_void_p, c_ssize_t)

_address = ctypes.addressof
_first_byte = ctypes.c_char.from_buffer
_madvise = _python("madvise", c_int, c_void_p, c_size_t, c_int)  # of the C library, which Python is linked with
_reference = ctypes.byref


def address(buffer: Any) -> int:
    """Where the data of a C-contiguous buffer begins."""
    try:
        return _address(_first_byte(buffer))  # takes half as long as what follows
    except (TypeError, ValueError, BufferError):  # read-only, empty, or a dtype that has no format
        view = PyBuffer()
        place = _reference(view)
        _get_buffer(buffer, place, 0)
        begin: int | None = view.buf
        _release_buffer(place)
        return begin or 0


def extent(buffer: Any) -> tuple[int, int]:
    """Where the data of a C-contiguous array or view begins and ends."""
    begin = address(buffer)
    return begin, begin + buffer.nbytes


def uninitialised(count: int) -> bytearray:
    """So many bytes that hold anything."""
    made: bytearray = _bytearray(None, count)
    return made


def aligned_bytes(count: int) -> memoryview:
    """Uninitialised bytes that begin at a multiple of 64, in huge pages where they are new to the process."""
    view = _aligned(memoryview(uninitialised(count + ALIGNMENT)), count, ALIGNMENT)
    if count >= _ADVISE_FROM:
        begin = -(-address(view) // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise(begin, count - mmap.PAGESIZE, mmap.MADV_HUGEPAGE)  # where there are none, it changes nothing
    return view


def scratch_bytes(count: int) -> memoryview:
    """Bytes that begin at a multiple of 64, in huge pages where there are many: few page faults when first written."""
    if count < _HUGE_FROM:
        return aligned_bytes(count)
    return _aligned(memoryview(_huge_pages(count + _HUGE_PAGE)), count, _HUGE_PAGE)  # the rest is never touched


class Zeros:
    """Memory that is zero at first and again after :meth:`clear`; much of it takes no memory until it is written.

    Attributes:
        view: the bytes, which begin at a multiple of 64 and stay where they are.
        address: where they begin.
    """

    def __init__(self, count: int) -> None:
        """Reserve so many bytes.

        Raises:
            MemoryError: there is no room for them.
        """
        self._pages: mmap.mmap | None = None
        if count < _HUGE_FROM:
            self.view = _aligned(memoryview(bytearray(count + ALIGNMENT)), count, ALIGNMENT)
        else:
            try:
                self._pages = _huge_pages(count)
            except OSError as error:
                raise MemoryError(f"no room for {count} bytes of state: {error}") from error
            self.view = memoryview(self._pages)[:count]
        self.address = address(self.view)

    def clear(self) -> None:
        """Make all bytes zero, and give back the memory that they took."""
        if self._pages is None:
            ctypes.memset(self.address, 0, self.view.nbytes)
        else:
            self._pages.madvise(mmap.MADV_DONTNEED)  # private and anonymous: it reads as zeros afterwards


def _aligned(whole: memoryview, count: int, alignment: int) -> memoryview:
    begin = -address(whole) % alignment
    return whole[begin : begin + count]


def _huge_pages(count: int) -> mmap.mmap:
    """Anonymous memory of this process, zeros, in huge pages where the system has them."""
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

"""The native library of an artifact through ctypes; the structures mirror ``tw_runtime.h``."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from ctypes import POINTER, c_char, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .weights import Layout

ABI = 1

TRACE = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_int32, c_int64, c_int64)


class Call(ctypes.Structure):
    """``tw_call``."""

    _fields_ = (
        ("weights", c_void_p),
        ("arena", c_void_p),
        ("inputs", c_void_p),
        ("outputs", c_void_p),
        ("states", c_void_p),
        ("symbols", c_void_p),
        ("pool", c_void_p),
        ("trace", c_void_p),
        ("trace_user", c_void_p),
        ("fault", c_int32),
    )


class Record(ctypes.Structure):
    """``tw_record``: when a step ran."""

    _fields_ = (("step", c_int32), ("variant", c_int32), ("begin_ns", c_int64), ("end_ns", c_int64))


class Records(ctypes.Structure):
    """``tw_records``: what ``tw_trace_record`` appends to."""

    _fields_ = (("items", POINTER(Record)), ("capacity", c_int64), ("count", c_int64))


class Library:
    """An opened ``model.so`` that belongs to the given weights.

    The library stays open until the process ends: threads and fork handlers of its pool live in its code.
    """

    def __init__(self, path: Path, weights: Layout) -> None:
        """Open the library.

        Raises:
            ArtifactError: it cannot be loaded, or was compiled for other weights or another runtime.
        """
        self.path = path
        try:
            self._library = ctypes.CDLL(_fresh_name(path), mode=ctypes.RTLD_LOCAL)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be loaded: {error}") from None
        abi = self._variable(c_int32, "tw_abi").value
        if abi != ABI:
            raise ArtifactError(f"{path}: speaks version {abi} of the runtime's interface, expected {ABI}")
        identity = bytes(self._variable(c_char * 65, "tw_weights_id").value).decode("ascii", "replace")
        size = self._variable(c_int64, "tw_weights_size").value
        if (identity, size) != (weights.id, weights.size):
            raise ArtifactError(f"{path}: was compiled for other weights than the artifact holds")
        self.create_pool = self.function("tw_pool_create", c_void_p, c_int)
        self.destroy_pool = self.function("tw_pool_destroy", None, c_void_p)
        self.record = ctypes.cast(self.function("tw_trace_record", None), c_void_p).value

    def run_function(self, entry: str) -> Any:
        """``tw_run_<entry>``: takes a :class:`Call` by reference, gives its fault."""
        return self.function(f"tw_run_{entry}", c_int32)

    def arena_function(self, entry: str) -> Any:
        """``tw_arena_<entry>``: takes symbols and an array for offsets or None, gives bytes."""
        return self.function(f"tw_arena_{entry}", c_int64, c_void_p, c_void_p)

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """An exported function; without argument types, what it is called with is passed as it is."""
        try:
            found = self._library[name]  # indexing makes a new object, so the types below are ours alone
        except AttributeError:
            raise ArtifactError(f"{self.path}: does not export {name}") from None
        found.restype = result
        if arguments:
            found.argtypes = arguments
        return found

    def _variable(self, kind: Any, name: str) -> Any:
        try:
            return kind.in_dll(self._library, name)
        except ValueError:
            raise ArtifactError(f"{self.path}: does not export {name}") from None


def _fresh_name(path: Path) -> str:
    """A spelling of the path under which the loader knows no other file.

    The loader takes a name that it has seen for the library that it loaded then, even after another artifact took its
    place. Every file that this process has met under a path therefore gets a spelling of its own: ``/./`` more.
    """
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    folder, name = os.path.split(os.path.abspath(path))
    with _names_lock:
        met = _files_met.setdefault(f"{folder}/{name}", [])
        if identity not in met:
            met.append(identity)
        return f"{folder}{'/.' * met.index(identity)}/{name}"


_files_met: dict[str, list[tuple[int, int]]] = {}
_names_lock = threading.Lock()


class ThreadPool:
    """The C thread pool of a model; ends with :meth:`close` or with the last object that holds it."""

    def __init__(self, library: Library, threads: int) -> None:
        """Create the pool; its threads start when a step is first worth sharing."""
        self.handle: int = library.create_pool(threads)
        if not self.handle:
            raise MemoryError("no memory for a thread pool")
        self._end = weakref.finalize(self, library.destroy_pool, self.handle)
        self._end.atexit = False  # a daemon thread may still be in a call when the interpreter ends

    def close(self) -> None:
        """End and join the threads; no call may be running or start after."""
        self._end()

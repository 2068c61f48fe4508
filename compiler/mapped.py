"""Weights that lie in memory-mapped files: give their pages back when they are not needed for a while.

A page that was read stays in the process's memory until the system wants it back. Before an artifact is run to verify
it, the checkpoint's pages go: otherwise both count, which limits on a process's memory do not forgive. So do those of a
large artifact while it runs, as it may be twice the size of the checkpoint. What is read again comes from the file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # MADV_DONTNEED of <sys/mman.h>: pages of a file that is mapped are read again when next used


def release(files: Iterable[Path]) -> None:
    """Give back the pages of all mappings of files; nothing may have been written to them.

    Does nothing where there is no ``/proc``.
    """
    wanted = {str(file.resolve()) for file in files}
    if not wanted or not _MAPS.exists():
        return
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in _MAPS.read_text().splitlines():
        bounds, _, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in wanted:
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            advise(start, end - start, _DONT_NEED)

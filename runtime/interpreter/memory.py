"""Memory that a process and its interpreter both see: anonymous, so that nothing stays behind, whoever ends first."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .process import Interpreter

ALIGNMENT = 64


class Shared:
    """A block of bytes, page-aligned and zero at first, that kernels can be given operands in.

    Attributes:
        id: how launches name it.
        array: the bytes, uint8 [size].
    """

    def __init__(self, interpreter: Interpreter, size: int) -> None:
        """Allocate and let the interpreter map it.

        Args:
            interpreter: which one.
            size: bytes; 0 is allocated as 1.
        """
        file = os.memfd_create("tilewright", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, max(size, 1))
            self.array = np.frombuffer(mmap.mmap(file, max(size, 1)), np.uint8)[:size]
            self.id = interpreter.map(file, writable=True)
        finally:
            os.close(file)
        self._interpreter = interpreter

    def __len__(self) -> int:
        return len(self.array)

    def __del__(self) -> None:
        if hasattr(self, "_interpreter"):
            self._interpreter.unmap(self.id)

"""Quantized rows between writing an artifact and verifying it: in a temporary file, not in memory."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch


class RowStore:
    """Keeps tensors of bytes in a file without a name, and gives them back as memory that is mapped from it.

    Args:
        folder: on whose disk the file is; None: where temporary files are.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._maps: list[mmap.mmap] = []

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        """The same uint8 tensor, in mapped memory."""
        if not rows.numel():
            return rows
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - stays open as long as this does
        start = -(-self._file.seek(0, 2) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(rows.contiguous().numpy().data)
        self._file.flush()
        # Private, so that it may be written to for all that torch knows; the file stays as it is.
        mapped = mmap.mmap(self._file.fileno(), rows.numel(), access=mmap.ACCESS_COPY, offset=start)
        self._maps.append(mapped)
        return torch.from_numpy(np.frombuffer(mapped, np.uint8)).reshape(rows.shape)

    def release(self) -> None:
        """Give back the pages that have been read; what is read again comes from the file."""
        for mapped in self._maps:
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

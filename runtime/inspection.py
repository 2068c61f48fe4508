"""Reading operands of a plan while it runs: what verification compares step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import sizes
from .dtypes import numpy_dtype
from .errors import ArtifactError
from .plan import Plan, Ref
from .plan_check import nbytes

Memory = Callable[[Ref, int], Any]
"""Gives so many bytes from the start of an operand, as a buffer: a copy, of a constant possibly a read-only view."""


class Reader:
    """Reads any operand of the call that is running, as it is at that moment: ``read(ref) -> array``."""

    def __init__(self, plan: Plan, values: Mapping[str, int], memory: Memory) -> None:
        """Look into a call: symbol values, and the memory it works on."""
        self._plan = plan
        self._values = values
        self._memory = memory

    def __call__(self, ref: Ref) -> np.ndarray:
        """A copy of the operand in its logical shape (a constant: in its packed shape, perhaps a read-only view).

        Raises:
            ArtifactError: a buffer is smaller than its shape, outside the arena, or of an unknown layout.
        """
        if ref.kind == "buffer":
            return self._buffer(ref)
        plan = self._plan
        item: Any = getattr(plan, f"{ref.kind}s")[ref.index]
        return self._array(ref, item.dtype, tuple(sizes.evaluate(size, self._values) for size in item.shape))

    def _array(self, ref: Ref, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(self._memory(ref, nbytes(dtype, shape)), numpy_dtype(dtype)).reshape(shape)

    def _buffer(self, ref: Ref) -> np.ndarray:
        buffer = self._plan.buffers[ref.index]
        shape = tuple(sizes.evaluate(size, self._values) for size in buffer.shape)
        if buffer.layout == "channels16":
            stored = (shape[0], -(-shape[1] // 16), *shape[2:], 16)
        elif buffer.layout == "channels_last":
            stored = (shape[0], *shape[2:], shape[1])
        elif buffer.layout == "rows":
            stored = shape
        else:
            raise ArtifactError(f"buffer {buffer.name}: unknown layout {buffer.layout!r}")
        if nbytes(buffer.dtype, stored) > sizes.evaluate(buffer.bytes, self._values):
            raise ArtifactError(
                f"buffer {buffer.name}: {buffer.dtype}{list(stored)} does not fit its place in the arena"
            )
        array = self._array(ref, buffer.dtype, stored)
        if buffer.layout == "channels16":
            array = np.moveaxis(array, -1, 2)
            return array.reshape(shape[0], stored[1] * 16, *shape[2:])[:, : shape[1]].copy()
        return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if buffer.layout == "channels_last" else array

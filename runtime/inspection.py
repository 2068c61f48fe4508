"""Reading operands of a plan while it runs: what verification compares step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from . import sizes
from .dtypes import numpy_dtype
from .errors import ArtifactError
from .plan import Plan, Ref
from .plan_check import nbytes
from .workspace import Workspace


class Reader:
    """Reads any operand of the call that is running, as it is at that moment: ``read(ref) -> array``."""

    def __init__(
        self,
        plan: Plan,
        values: Mapping[str, int],
        offsets: Sequence[int],
        workspace: Workspace,
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
        weights: np.ndarray,
    ) -> None:
        """Look into a call: symbol values, offsets of the buffers in the arena, and all memory it works on."""
        self._plan = plan
        self._values = values
        self._offsets = offsets
        self._workspace = workspace
        self._arrays = {"input": inputs, "output": outputs}
        self._weights = weights

    def __call__(self, ref: Ref) -> np.ndarray:
        """A copy of the operand in its logical shape (a constant: in its packed shape, a read-only view).

        Raises:
            ArtifactError: a buffer is smaller than its shape, outside the arena, or of an unknown layout.
        """
        if ref.kind in self._arrays:
            return self._arrays[ref.kind][ref.index].copy()
        if ref.kind == "constant":
            constant = self._plan.constants[ref.index]
            data = self._weights[constant.offset : constant.offset + constant.bytes]
            return data.view(numpy_dtype(constant.dtype)).reshape(constant.shape)
        if ref.kind == "state":
            state = self._plan.states[ref.index]
            memory = self._workspace.states[state.name]
            return memory.view(numpy_dtype(state.dtype)).reshape(state.shape).copy()
        return self._buffer(ref.index)

    def _buffer(self, index: int) -> np.ndarray:
        buffer = self._plan.buffers[index]
        shape = tuple(sizes.evaluate(size, self._values) for size in buffer.shape)
        stored = shape
        if buffer.layout == "channels16":
            n, channels, height, width = shape
            stored = (n, -(-channels // 16), height, width, 16)
        elif buffer.layout != "rows":
            raise ArtifactError(f"buffer {buffer.name}: unknown layout {buffer.layout!r}")
        begin, count = self._offsets[index], nbytes(buffer.dtype, stored)
        if count > sizes.evaluate(buffer.bytes, self._values) or begin + count > self._workspace.arena.nbytes:
            raise ArtifactError(
                f"buffer {buffer.name}: {buffer.dtype}{list(stored)} does not fit its place in the arena"
            )
        array = self._workspace.arena[begin : begin + count].view(numpy_dtype(buffer.dtype)).reshape(stored)
        if buffer.layout == "channels16":
            array = array.transpose(0, 1, 4, 2, 3).reshape(shape[0], stored[1] * 16, *shape[2:])[:, : shape[1]]
        return array.copy()

"""Working memory of interpreted calls: states that last, and per call one block with all that kernels touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import sizes
from ..launches import Launches, Operand
from ..plan import COUNTERS, Plan, Ref
from ..state_sizes import bytes_of_states
from . import launch
from .memory import ALIGNMENT, Shared
from .process import Interpreter

UNWRITTEN = 0xFF
"""Fills scratch and outputs before a call: it reads as NaN, so that it shows where a kernel reads too early."""


class InterpreterWorkspace:
    """The memory of one call at a time."""

    def __init__(
        self, interpreter: Interpreter, plans: Mapping[str, Plan], weights: np.ndarray, state_sizes: Mapping[str, int]
    ) -> None:
        """Allocate the states, as they are initially; the block grows with the calls.

        Args:
            interpreter: what shares the memory.
            plans: by entry point.
            weights: the data section of the weight file, as bytes.
            state_sizes: of the states.
        """
        self._interpreter = interpreter
        self._plans = plans
        self._weights = weights
        self._block: Shared | None = None
        counts = bytes_of_states(plans, state_sizes)
        self.states = {name: Shared(interpreter, count) for name, count in counts.items()}
        for name in plans:
            self.reset(name)

    def block(self, size: int) -> Shared:
        """At least so many bytes, which hold anything."""
        if self._block is None or len(self._block) < size:
            self._block = None  # let go of it before the larger one is there
            self._block = Shared(self._interpreter, size)
        return self._block

    def reset(self, entry: str) -> None:
        """Set the states of an entry point to their initial values."""
        plan = self._plans[entry]
        for state in plan.states:
            memory = self.states[state.name].array
            if state.initial:
                constant = next(item for item in plan.constants if item.name == state.initial)
                memory[:] = self._weights[constant.offset : constant.offset + constant.bytes]
            else:
                memory[:] = 0

    def close(self) -> None:
        """Let go of the memory."""
        self._block = None
        self.states.clear()


class Weights:
    """The weight file, mapped here and in the worker."""

    def __init__(self, data: np.ndarray, block: int, offset: int) -> None:
        """Name what is mapped.

        Args:
            data: its data section, as bytes.
            block: the worker's number for the whole file.
            offset: of the data section in the file.
        """
        self.data = data
        self.block = block
        self.offset = offset


class CallMemory:
    """Where the operands of one call lie: apart from each other by gaps, which belong to no operand."""

    def __init__(
        self,
        plan: Plan,
        launches: Launches,
        workspace: InterpreterWorkspace,
        weights: Weights,
        inputs: Sequence[np.ndarray],
    ) -> None:
        """Lay out the call and copy its inputs in.

        Args:
            plan: of the entry point.
            launches: of the call.
            workspace: of the call.
            weights: of the model.
            inputs: of the call, C-contiguous.
        """
        self._plan = plan
        self._workspace = workspace
        self._weights = weights
        self._places: dict[tuple[str, int], tuple[int, int]] = {}
        end = 0
        for kind, index, size in (
            *(("fault", step, 4) for step in range(len(plan.steps))),
            ("counters", 0, COUNTERS * 4),
            *(("input", index, array.nbytes) for index, array in enumerate(inputs)),
            *(("output", index, count) for index, (_, count) in enumerate(launches.outputs)),
        ):
            self._places[kind, index] = (end, size)
            end += (size // ALIGNMENT + 1) * ALIGNMENT
        for index, (buffer, offset) in enumerate(zip(plan.buffers, launches.offsets, strict=True)):
            self._places["buffer", index] = (end + offset, sizes.evaluate(buffer.bytes, launches.values))
        self._block = workspace.block(end + launches.arena_bytes)
        self._block.array[:] = UNWRITTEN
        self.bytes("counters", 0)[:] = 0
        for step in range(len(plan.steps)):
            self.bytes("fault", step)[:] = 0
        for index, array in enumerate(inputs):
            self.bytes("input", index)[:] = array.reshape(-1).view(np.uint8)

    def operand(self, operand: Operand) -> launch.Operand:
        """An operand as the worker takes it."""
        if operand.kind == "constant":
            block, offset = self._weights.block, self._weights.offset + operand.offset
        elif operand.kind == "state":
            block, offset = self._workspace.states[self._plan.states[operand.index].name].id, 0
        else:
            block, offset = self._block.id, self._places[operand.kind, operand.index][0]
        return launch.Operand(operand.dtype, block, offset, operand.bytes)

    def bytes(self, kind: str, index: int) -> np.ndarray:
        """The memory of an operand of the plan, uint8."""
        if kind == "constant":
            constant = self._plan.constants[index]
            return self._weights.data[constant.offset : constant.offset + constant.bytes]
        if kind == "state":
            return self._workspace.states[self._plan.states[index].name].array
        offset, size = self._places[kind, index]
        return self._block.array[offset : offset + size]

    def read(self, ref: Ref, count: int) -> np.ndarray:
        """A copy of the first bytes of an operand, for :class:`Reader`."""
        return self.bytes(ref.kind, ref.index)[:count].copy()

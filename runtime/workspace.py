"""Working memory on the CPU: what one call at a time needs (arena, states, argument arrays)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import Zeros, address, aligned_bytes, scratch_bytes
from .binding import Binding
from .library import Call, ThreadPool
from .plan import Plan
from .state_sizes import bytes_of_states


class Frame:
    """The C arguments of one entry point in one workspace, allocated once."""

    def __init__(self, plan: Plan, weights: int, threads: ThreadPool, states: Mapping[str, np.ndarray]) -> None:
        self.inputs = (ctypes.c_void_p * max(len(plan.inputs), 1))()
        self.outputs = (ctypes.c_void_p * max(len(plan.outputs), 1))()
        self.states = (ctypes.c_void_p * max(len(plan.states), 1))()
        for index, state in enumerate(plan.states):
            self.states[index] = states[state.name].ctypes.data
        self.call = Call(
            weights=weights,
            inputs=ctypes.addressof(self.inputs),
            outputs=ctypes.addressof(self.outputs),
            states=ctypes.addressof(self.states),
            pool=threads.handle,
        )
        self.reference = ctypes.byref(self.call)
        self.binding: Binding | None = None


class Workspace:
    """Arena and states of one caller at a time."""

    def __init__(
        self, plans: Mapping[str, Plan], weights: np.ndarray, threads: ThreadPool, sizes: Mapping[str, int]
    ) -> None:
        """Allocate the states; the arena grows with the calls.

        Args:
            plans: by entry point.
            weights: the data section of the weight file, as bytes.
            threads: what the calls run on.
            sizes: of the states.
        """
        self._plans = plans
        self._weights = weights
        self._threads = threads
        self._frames: dict[str, Frame] = {}
        self._arena = aligned_bytes(0)
        self._memory = {name: Zeros(count) for name, count in bytes_of_states(plans, sizes).items()}
        self._states = {name: memory.array for name, memory in self._memory.items()}
        for plan in plans.values():
            self._fill(plan)

    def frame(self, entry: str, binding: Binding) -> Frame:
        """The arguments for a call with these sizes: arena and symbols are in place."""
        frame = self._frames.get(entry)
        if frame is None:
            frame = self._frames[entry] = Frame(
                self._plans[entry], self._weights.ctypes.data, self._threads, self._states
            )
        if frame.binding is not binding:
            if binding.arena_bytes > self._arena.nbytes:
                self._arena = scratch_bytes(binding.arena_bytes)
                for other in self._frames.values():
                    other.call.arena = self._arena.ctypes.data
            frame.call.arena = self._arena.ctypes.data
            frame.call.symbols = ctypes.addressof(binding.symbols)
            frame.binding = binding
        return frame

    def reset(self, entry: str) -> None:
        """Set the states of an entry point to their initial values."""
        plan = self._plans[entry]
        for state in plan.states:
            if not state.initial:
                self._memory[state.name].clear()
        self._fill(plan)

    def _fill(self, plan: Plan) -> None:
        """Write the first values of the states that do not start as zeros."""
        for state in plan.states:
            if state.initial:
                constant = next(item for item in plan.constants if item.name == state.initial)
                self._states[state.name][:] = self._weights[constant.offset : constant.offset + constant.bytes]

    def close(self) -> None:
        """Let go of the memory."""
        self._frames.clear()
        self._states.clear()
        self._memory.clear()
        self._arena = aligned_bytes(0)

    @property
    def arena(self) -> np.ndarray:
        """The scratch memory, as bytes."""
        return self._arena

    @property
    def states(self) -> Mapping[str, np.ndarray]:
        """The states' memory, as bytes, by name."""
        return self._states


def bind_arrays(frame: Frame, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Point a frame at the arrays of a call; the caller keeps them alive."""
    slots: Any = frame.inputs
    for index, array in enumerate(inputs):
        slots[index] = address(array)
    slots = frame.outputs
    for index, array in enumerate(outputs):
        slots[index] = address(array)

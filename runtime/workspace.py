"""Working memory on the CPU: what one call at a time needs (arena, states, argument arrays)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from .binding import Binding
from .library import Call, ThreadPool
from .memory import Zeros, address, aligned_bytes, scratch_bytes
from .plan import Plan
from .state_sizes import bytes_of_states


class Frame:
    """The C arguments of one entry point in one workspace, allocated once."""

    def __init__(self, plan: Plan, weights: int, threads: ThreadPool, states: Mapping[str, Zeros]) -> None:
        self.inputs = (ctypes.c_void_p * max(len(plan.inputs), 1))()
        self.outputs = (ctypes.c_void_p * max(len(plan.outputs), 1))()
        self.states = (ctypes.c_void_p * max(len(plan.states), 1))()
        for index, state in enumerate(plan.states):
            self.states[index] = states[state.name].address
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
        self, plans: Mapping[str, Plan], weights: memoryview, threads: ThreadPool, sizes: Mapping[str, int]
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
        self._arena_address = 0
        self._states = {name: Zeros(count) for name, count in bytes_of_states(plans, sizes).items()}
        for plan in plans.values():
            self._fill(plan)

    def frame(self, entry: str, binding: Binding) -> Frame:
        """The arguments for a call with these sizes: arena and symbols are in place."""
        frame = self._frames.get(entry)
        if frame is None:
            frame = self._frames[entry] = Frame(self._plans[entry], address(self._weights), self._threads, self._states)
        if frame.binding is not binding:
            if binding.arena_bytes > self._arena.nbytes:
                self._arena = scratch_bytes(binding.arena_bytes)
                self._arena_address = address(self._arena)
                for other in self._frames.values():
                    other.call.arena = self._arena_address
            frame.call.arena = self._arena_address
            frame.call.symbols = ctypes.addressof(binding.symbols)
            frame.binding = binding
        return frame

    def reset(self, entry: str) -> None:
        """Set the states of an entry point to their initial values."""
        plan = self._plans[entry]
        for state in plan.states:
            if not state.initial:
                self._states[state.name].clear()
        self._fill(plan)

    def _fill(self, plan: Plan) -> None:
        """Write the first values of the states that do not start as zeros."""
        for state in plan.states:
            if state.initial:
                constant = next(item for item in plan.constants if item.name == state.initial)
                self._states[state.name].view[:] = self._weights[constant.offset : constant.offset + constant.bytes]

    def close(self) -> None:
        """Let go of the memory."""
        self._frames.clear()
        self._states.clear()
        self._arena = aligned_bytes(0)

    @property
    def arena(self) -> memoryview:
        """The scratch memory, as bytes."""
        return self._arena

    @property
    def states(self) -> Mapping[str, Zeros]:
        """The states' memory by name."""
        return self._states


def bind_tensors(frame: Frame, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Point a frame at the arrays and views of a call; the caller keeps them alive."""
    slots: Any = frame.inputs
    for index, tensor in enumerate(inputs):
        slots[index] = address(tensor)
    slots = frame.outputs
    for index, tensor in enumerate(outputs):
        slots[index] = address(tensor)

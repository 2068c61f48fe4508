"""Working memory: what one call at a time needs (arena, states, argument arrays), and the pool calls take it from."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import address, aligned_bytes
from .binding import Binding
from .errors import UsageError
from .library import Call, ThreadPool
from .plan import Plan


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

    def __init__(self, plans: Mapping[str, Plan], weights: np.ndarray, threads: ThreadPool) -> None:
        """Allocate the states; the arena grows with the calls.

        Args:
            plans: by entry point.
            weights: the data section of the weight file, as bytes.
            threads: what the calls run on.
        """
        self._plans = plans
        self._weights = weights
        self._threads = threads
        self._frames: dict[str, Frame] = {}
        self._arena = aligned_bytes(0)
        self._states: dict[str, np.ndarray] = {}
        for name, plan in plans.items():
            for state in plan.states:
                if state.name not in self._states:
                    self._states[state.name] = aligned_bytes(state.bytes)
            self.reset(name)

    def frame(self, entry: str, binding: Binding) -> Frame:
        """The arguments for a call with these sizes: arena and symbols are in place."""
        frame = self._frames.get(entry)
        if frame is None:
            frame = self._frames[entry] = Frame(
                self._plans[entry], self._weights.ctypes.data, self._threads, self._states
            )
        if frame.binding is not binding:
            if binding.arena_bytes > self._arena.nbytes:
                self._arena = aligned_bytes(binding.arena_bytes)
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
            memory = self._states[state.name]
            if state.initial:
                constant = next(item for item in plan.constants if item.name == state.initial)
                memory[:] = self._weights[constant.offset : constant.offset + constant.bytes]
            else:
                memory[:] = 0

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


class WorkspacePool:
    """At most ``limit`` workspaces, made when needed; who finds none free waits.

    It also counts the calls that run with workspaces of their own, so that closing waits for all.
    """

    fresh = True  # calls start from the initial state

    def __init__(self, limit: int, make: Callable[[], Workspace]) -> None:
        self.limit = limit
        self._make = make
        self._start()
        _POOLS.add(self)

    def _start(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._free: list[Workspace] = []
        self._made = 0
        self._running = 0
        self._closed = False

    def take(self) -> Workspace:
        """A workspace for one call; :meth:`give` it back.

        Raises:
            UsageError: the model is closed.
        """
        with self._changed:
            while not self._free and self._made >= self.limit and not self._closed:
                self._changed.wait()
            self._enter()
            if self._free:
                return self._free.pop()
            self._made += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._made -= 1
                self._leave()
            raise

    def give(self, workspace: Workspace) -> None:
        """Return what :meth:`take` gave."""
        with self._changed:
            self._free.append(workspace)
            self._leave()

    def enter(self) -> None:
        """Count a call with a workspace of its own; :meth:`leave` when it is done.

        Raises:
            UsageError: the model is closed.
        """
        with self._changed:
            self._enter()

    def leave(self) -> None:
        """The counterpart of :meth:`enter`."""
        with self._changed:
            self._leave()

    def close(self) -> None:
        """Refuse new calls, wait for those that run, and let go of the memory."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._running:
                self._changed.wait()
            self._free.clear()

    def _enter(self) -> None:
        if self._closed:
            raise UsageError("the model is closed")
        self._running += 1

    def _leave(self) -> None:
        self._running = max(self._running - 1, 0)  # after a fork from inside a call, that call is not counted
        self._changed.notify_all() if self._closed else self._changed.notify()

    def after_fork(self) -> None:
        """In the child: other threads, and the workspaces and locks they held, are gone."""
        closed = self._closed
        self._start()
        self._closed = closed


_POOLS: weakref.WeakSet[WorkspacePool] = weakref.WeakSet()


def _restart_pools() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


os.register_at_fork(after_in_child=_restart_pools)

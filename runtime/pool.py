"""The pool that calls take their working memory from."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from .errors import UsageError

W = TypeVar("W")


class Closable(Protocol):
    """What can be let go of."""

    def close(self) -> None:
        """Let go of the memory."""


C = TypeVar("C", bound=Closable)


class WorkspacePool(Generic[W]):
    """At most ``limit`` workspaces, made when needed; who finds none free waits.

    It also counts the calls that run with workspaces of their own, so that closing waits for all.
    """

    fresh = True  # calls start from the initial state

    def __init__(self, limit: int, make: Callable[[], W], sizes: Mapping[str, int] | None = None) -> None:
        """Nothing is made yet.

        Args:
            limit: most workspaces at once.
            make: makes one.
            sizes: of the states in them.
        """
        self.limit = limit
        self.sizes = sizes or {}
        self._make = make
        self._start()
        _POOLS.add(self)

    def _start(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._free: list[W] = []
        self._made = 0
        self._running = 0
        self._closed = False

    def take(self) -> W:
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

    def give(self, workspace: W) -> None:
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


class OwnWorkspace(Generic[C]):
    """The workspace of a session: for one call at a time, its states as the last call left them.

    It is apart from the session so that no cycle keeps a session that nobody has any more.
    """

    fresh = False

    def __init__(self, workspace: C, pool: WorkspacePool[Any], sizes: Mapping[str, int] | None = None) -> None:
        self.sizes = sizes or {}
        self._workspace = workspace
        self._pool = pool
        self._closed = False
        self._lock = threading.Lock()
        _POOLS.add(self)

    def take(self) -> C:
        """The workspace; :meth:`give` it back.

        Raises:
            UsageError: the session or the model is closed.
        """
        self._lock.acquire()
        try:
            if self._closed:
                raise UsageError("the session is closed")
            self._pool.enter()
        except BaseException:
            self._lock.release()
            raise
        return self._workspace

    def give(self, workspace: C) -> None:
        """Let the next call in."""
        self._pool.leave()
        self._lock.release()

    def close(self) -> None:
        """Wait for a running call and let go of the memory."""
        with self._lock:
            self._closed = True
            self._workspace.close()

    def after_fork(self) -> None:
        """In the child: a thread that held the lock is gone."""
        self._lock = threading.Lock()


_POOLS: weakref.WeakSet[WorkspacePool[Any] | OwnWorkspace[Any]] = weakref.WeakSet()


def _restart_pools() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


os.register_at_fork(after_in_child=_restart_pools)

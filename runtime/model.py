"""Loading an artifact and running it: ``load(path) -> Model``.

A model (weights, code, plans) is immutable and may be called from several threads at once and after a fork. A call
takes its working memory from a bounded pool. A model with state starts every plain call from its initial state; state
that lasts from call to call belongs to an explicit :meth:`Model.session`.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from . import cpu
from .artifact import Artifact, read_artifact
from .entry import Entry, Executable, StepTime, TensorSpec, TraceCallback
from .errors import ArtifactError, UsageError
from .library import Library, ThreadPool
from .manifest import FILE_NAME
from .threads import default_threads
from .workspace import Workspace, WorkspacePool

MAX_THREADS = 512


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto", entry: str | None = None
) -> Model:
    """Load an artifact.

    Everything but the weights is validated first; the weights are memory-mapped and not read.

    Args:
        path: the directory that ``tilewright compile`` wrote.
        threads: threads that a call may use; by default what the affinity mask and the control group's CPU quota allow.
        device: ``"cpu"``, or ``"auto"`` for what the artifact and this machine have in common.
        entry: the entry point that ``model(...)`` runs; by default the first one.

    Raises:
        ArtifactError: damaged, incomplete, made by a newer Tilewright, or not for this machine.
        UsageError: an unknown device or entry point, or an impossible number of threads.
    """
    if device not in ("auto", "cpu"):
        raise UsageError(f"unknown device {device!r}; expected 'auto' or 'cpu'")
    if threads is not None and not (type(threads) is int and 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads must be a number from 1 to {MAX_THREADS}, got {threads!r}")
    artifact = read_artifact(path)
    if entry is not None and entry not in artifact.plans:
        raise _unknown_entry(entry, artifact.plans)
    target = cpu.choose(artifact.manifest.targets, cpu.features(), str(artifact.path / FILE_NAME))
    code = artifact.library(target)
    weights = _map_weights(artifact)
    return Model(artifact, target.name, Library(code, artifact.weights), weights, threads or default_threads(), entry)


class Model:
    """A loaded artifact; :func:`load` makes it. Call it like the model it was compiled from."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        library: Library,
        weights: np.ndarray,
        threads: int,
        entry: str | None,
    ) -> None:
        """Assemble what :func:`load` has read, chosen and mapped."""
        self.artifact = artifact
        self.target = target
        self.threads = threads
        self._native = ThreadPool(library, threads)
        # not a method of this object: a cycle would keep the model until the garbage collector comes
        self._new_workspace = partial(Workspace, artifact.plans, weights, self._native)
        self._pool = WorkspacePool(max(2, threads), self._new_workspace)
        self._executables = {name: Executable(plan, library, weights) for name, plan in artifact.plans.items()}
        self._entries = {name: Entry(executable, self._pool) for name, executable in self._executables.items()}
        self._default = self._entries[entry or next(iter(self._entries))]
        self._close = threading.Lock()

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of the entry points."""
        return tuple(self._entries)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes, symbolic shapes and ranges of the default entry point's inputs."""
        return self._default.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The same of its outputs."""
        return self._default.outputs

    def entry(self, name: str) -> Entry:
        """An entry point by name.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self._entries:
            raise _unknown_entry(name, self._entries)
        return self._entries[name]

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the default entry point; see :meth:`Entry.__call__`."""
        return self._default(*args, out=out, **kwargs)

    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run the default entry point once and give when each step ran."""
        return self._default.profile(*args, **kwargs)

    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run the default entry point, stopping after each step; see :meth:`Entry.trace`."""
        return self._default.trace(callback, *args, **kwargs)

    def session(self) -> Session:
        """A caller of its own, whose state lasts from call to call."""
        return Session(self._new_workspace(), self._pool, self._executables, self._default.name)

    def close(self) -> None:
        """Wait for running calls, end the threads and let go of the weights; later calls raise ``UsageError``."""
        with self._close:
            self._pool.close()
            self._native.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        entries = ", ".join(map(repr, self._entries.values()))
        return f"<tilewright model {self.artifact.path.name} for {self.target}, {self.threads} threads: {entries}>"


class Session:
    """One caller with its own state; calls from several threads run one after the other."""

    fresh = False

    def __init__(
        self, workspace: Workspace, pool: WorkspacePool, executables: Mapping[str, Executable], default: str
    ) -> None:
        """Start from the initial state; :meth:`Model.session` does this."""
        self._workspace = workspace
        self._pool = pool
        self._entries = {name: Entry(executable, self) for name, executable in executables.items()}
        self._default = self._entries[default]
        self._lock = threading.Lock()
        _SESSIONS.add(self)

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the default entry point on the session's state; see :meth:`Entry.__call__`."""
        return self._default(*args, out=out, **kwargs)

    def entry(self, name: str) -> Entry:
        """An entry point that works on this session's state.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self._entries:
            raise _unknown_entry(name, self._entries)
        return self._entries[name]

    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run the default entry point, stopping after each step; see :meth:`Entry.trace`."""
        return self._default.trace(callback, *args, **kwargs)

    def reset(self) -> None:
        """Return to the initial state."""
        workspace = self.take()
        try:
            for name in self._entries:
                workspace.reset(name)
        finally:
            self.give(workspace)

    def take(self) -> Workspace:
        """The session's workspace, for one call at a time."""
        self._lock.acquire()
        try:
            self._pool.enter()
        except BaseException:
            self._lock.release()
            raise
        return self._workspace

    def give(self, workspace: Workspace) -> None:
        """Let the next call in."""
        self._pool.leave()
        self._lock.release()

    def after_fork(self) -> None:
        """In the child: a thread that held the lock is gone."""
        self._lock = threading.Lock()


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


def _restart_sessions() -> None:
    for session in list(_SESSIONS):
        session.after_fork()


os.register_at_fork(after_in_child=_restart_sessions)


def _unknown_entry(name: str, known: Mapping[str, object]) -> UsageError:
    return UsageError(f"there is no entry point {name!r}; the artifact has {', '.join(known)}")


def _map_weights(artifact: Artifact) -> np.ndarray:
    """The data section of the weight file, mapped read-only."""
    try:
        with open(artifact.weights_path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), artifact.weights.size, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{artifact.weights_path}: cannot be mapped: {error}") from None
    mapping.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(mapping, np.uint8)[len(artifact.weights.header) :]

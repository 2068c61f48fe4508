"""Loading an artifact and running it: ``load(path) -> Model``.

A model (weights, code, plans) is immutable and may be called from several threads at once, and on the CPU after a fork.
A call takes its working memory from a bounded pool. A model with state starts every plain call from its initial state;
state that lasts from call to call belongs to an explicit :meth:`Model.session`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from . import state_sizes
from .artifact import Artifact, read_artifact
from .device import Device
from .devices import check_request, open_device
from .entry import Entry, StepTime, TensorSpec, TraceCallback
from .errors import UsageError
from .pool import OwnWorkspace, WorkspacePool

if TYPE_CHECKING:
    from .generation.completion import Completion
    from .generation.generator import Generator
    from .generation.request import Prompt
    from .generation.stream import Stream


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    device: str = "auto",
    entry: str | None = None,
    stream: Any = None,
) -> Model:
    """Load an artifact.

    Everything but the weights is validated first; on a CPU the weights are memory-mapped and not read.

    Args:
        path: the directory that ``tilewright compile`` wrote.
        threads: threads that a call on the CPU may use; by default what the affinity mask and the control group's CPU
            quota allow.
        device: ``"cpu"``, ``"cuda"`` (the first GPU), ``"cuda:1"``, ``"interpreter"`` (the GPU's kernels, interpreted
            on the CPU), or ``"auto"``: a GPU where the artifact and this machine have one in common, else the CPU.
        entry: the entry point that ``model(...)`` runs; by default the first one.
        stream: of a CUDA device, the stream to run in: a handle, or an object with ``__cuda_stream__``,
            ``cuda_stream`` or ``ptr``. Calls then return before they are done, in the order of the stream
            (docs/gpu.md). By default every call has a stream of its own and is done when it returns.

    Raises:
        ArtifactError: damaged, incomplete, made by a newer Tilewright, or not for this machine.
        UsageError: an unknown device or entry point, one that is not there, or an impossible number of threads.
    """
    check_request(device, threads, stream)
    artifact = read_artifact(path)
    if entry is not None and entry not in artifact.plans:
        raise _unknown_entry(entry, artifact.plans)
    return Model(artifact, open_device(artifact, device, threads, stream), entry)


class Model:
    """A loaded artifact; :func:`load` makes it. Call it like the model it was compiled from."""

    def __init__(self, artifact: Artifact, device: Device[Any], entry: str | None = None) -> None:
        """Assemble what :func:`load` has read and opened."""
        self.artifact = artifact
        self.device = device.name
        self.target = device.target
        self.threads = device.threads
        self._device = device
        plain = state_sizes.resolve(device.plans)
        self._pool: WorkspacePool[Any] = WorkspacePool(device.limit, partial(device.workspace, plain), plain)
        self._entries = {name: device.entry(name, self._pool) for name in device.plans}
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

    def entry(self, name: str) -> Entry[Any]:
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

    def session(self, sizes: Mapping[str, int] | None = None) -> Session:
        """A caller of its own, whose state lasts from call to call.

        Args:
            sizes: of states whose size varies, by name, such as ``{"blocks": 512}``; by default the sample's.
                :meth:`state_bytes` tells what they will take.

        Raises:
            UsageError: a name that is no size of a state.
            ShapeError: a size out of range.
            MemoryError: the states' memory cannot be reserved.
        """
        return Session(self._device, self._pool, self._default.name, state_sizes.resolve(self._device.plans, sizes))

    def state_bytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes that the states of a session of these sizes take; nothing is allocated for the answer.

        Raises:
            UsageError: a name that is no size of a state.
            ShapeError: a size out of range.
        """
        return state_sizes.total_bytes(self._device.plans, state_sizes.resolve(self._device.plans, sizes))

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        cache_tokens: int | None = None,
        keep_errors: bool = False,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue prompts with a decoder language model; all run together, and each comes out as when alone.

        Args:
            prompts: texts or lists of token ids, one or several.
            cache_tokens: how many positions the key/value cache holds, of all sequences together. If that is too few
                for all at once, some wait or are computed again. By default enough for all within 1 GiB, and always
                for one.
            keep_errors: give a prompt that is refused or fails as a completion with its ``error``, instead of raising.
            **sampling: fields of ``SamplingParams`` (``runtime/generation/sampling.py``): ``max_tokens``,
                ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``seed``, ``stop``,
                ``logprobs``, ``ignore_eos``. Prompt i gets ``seed + i``; ``seed`` may be a list, too. Without any, the
                likeliest token is taken until the text ends or the context is full.

        Returns:
            A completion per prompt, in their order.

        Raises:
            UsageError: the model does not generate, a parameter is wrong, a prompt is empty or of the wrong type.
            InputError: a prompt is longer than the context, can never fit the cache, has unknown tokens or is not
                valid Unicode; or the model gave numbers that are not finite.
        """
        from .generation.calls import generate

        return generate(self, prompts, cache_tokens=cache_tokens, keep_errors=keep_errors, **sampling)

    def stream(self, prompt: Prompt, *, cache_tokens: int | None = None, **sampling: Any) -> Stream:
        """Continue a prompt piece by piece; takes and raises what :meth:`generate` does.

        Returns:
            An iterator over a piece per token, with the ``completion`` so far. Closing or dropping it, as leaving a
            loop does, cancels the rest and frees the cache.
        """
        from .generation.calls import open_stream, params_for

        return open_stream(self, prompt, params_for(1, sampling)[0], cache_tokens=cache_tokens)

    def generator(self, *, cache_tokens: int | None = None, step_tokens: int | None = None) -> Generator:
        """What serves many requests over one cache: they may be submitted, and cancelled, while others run.

        Args:
            cache_tokens: how many positions the cache holds; by default one sequence of the whole context, within
                1 GiB.
            step_tokens: the most tokens that one step computes; fewer let running requests wait less for new prompts.

        Raises:
            UsageError: the model does not generate, or a number that does not fit it.
        """
        from .generation.calls import open_generator

        return open_generator(self, cache_tokens=cache_tokens, step_tokens=step_tokens)

    def synchronize(self) -> None:
        """Wait for calls that returned before they were done (those in a ``stream``), and raise what they met.

        Raises:
            InputError: an index in an input was out of range.
            DeviceError: a kernel failed.
        """
        self._pool.enter()
        try:
            self._device.synchronize()
        finally:
            self._pool.leave()

    def close(self) -> None:
        """Wait for running calls, then free threads, memory and weights; later calls raise ``UsageError``."""
        with self._close:
            self._pool.close()
            self._device.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        entries = ", ".join(map(repr, self._entries.values()))
        return f"<tilewright model {self.artifact.path.name} for {self._device}: {entries}>"


class Session:
    """One caller with its own state; calls from several threads run one after the other.

    Attributes:
        sizes: of the states whose size varies.
    """

    def __init__(self, device: Device[Any], pool: WorkspacePool[Any], default: str, sizes: Mapping[str, int]) -> None:
        """Start from the initial state; :meth:`Model.session` does this."""
        self.sizes = dict(sizes)
        pool.enter()  # the model stays open meanwhile
        try:
            self._own: OwnWorkspace[Any] = OwnWorkspace(device.workspace(sizes), pool, sizes)
        finally:
            pool.leave()
        self._entries = {name: device.entry(name, self._own) for name in device.plans}
        self._default = self._entries[default]

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the default entry point on the session's state; see :meth:`Entry.__call__`."""
        return self._default(*args, out=out, **kwargs)

    def entry(self, name: str) -> Entry[Any]:
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

    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run the default entry point on the session's state and give when each step ran."""
        return self._default.profile(*args, **kwargs)

    def close(self) -> None:
        """Wait for a running call and free the session's memory; later calls raise ``UsageError``."""
        self._own.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Return to the initial state."""
        workspace = self._own.take()
        try:
            for name in self._entries:
                workspace.reset(name)
        finally:
            self._own.give(workspace)


def _unknown_entry(name: str, known: Mapping[str, object]) -> UsageError:
    return UsageError(f"there is no entry point {name!r}; the artifact has {', '.join(known)}")

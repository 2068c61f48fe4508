"""Entry points: checking the inputs of a call, running it, and giving its results the shape the model had."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from . import sizes
from .arrays import input_array, new_output, output_arrays
from .binding import Binding, cached_binder
from .dtypes import numpy_dtype
from .errors import InputError, UsageError
from .inspection import Reader
from .library import TRACE, Library, Record, Records
from .plan import Plan, Port
from .results import compile_results
from .workspace import Frame, Workspace, bind_arrays

TraceCallback = Callable[[int, int, Reader], None]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at the border: a size is a number or an expression such as ``"batch"`` over symbols with ranges."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    ranges: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        where = ", ".join(f"{name} {low}..{high}" for name, (low, high) in self.ranges.items())
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]{f' with {where}' if where else ''}"


class StepTime(NamedTuple):
    """When a step of the plan ran, by the monotonic clock."""

    step: int
    variant: int
    begin_ns: int
    end_ns: int


class Source(Protocol):
    """Where calls get their workspace: the pool of a model (fresh state each time) or a session (its own)."""

    fresh: bool

    def take(self) -> Workspace:
        """A workspace for one call."""

    def give(self, workspace: Workspace) -> None:
        """Return it."""


class Executable:
    """What all calls of an entry point share; immutable."""

    def __init__(self, plan: Plan, library: Library, weights: np.ndarray) -> None:
        """Prepare an entry point.

        Args:
            plan: of the entry point.
            library: its code.
            weights: the data section of the weight file, as bytes.

        Raises:
            ArtifactError: the library does not export its functions.
        """
        self.plan = plan
        self.name = plan.entry
        self.weights = weights
        self.library = library
        self.run = library.run_function(plan.entry)
        self.arena = library.arena_function(plan.entry)
        arena = self.arena
        self.bind = cached_binder(plan, lambda symbols: int(arena(symbols, None)))
        self.results = compile_results(plan.results)
        self.stateful = bool(plan.states)
        self._names = [port.name for port in plan.inputs]
        self._inputs = tuple((port, numpy_dtype(port.dtype)) for port in plan.inputs)
        self._output_dtypes = tuple(numpy_dtype(port.dtype) for port in plan.outputs)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[np.ndarray]:
        """The arrays of a call, in the order of the plan."""
        if kwargs or len(args) != len(self._inputs):
            args = self._ordered(args, kwargs)
        arrays = []
        for value, (port, dtype) in zip(args, self._inputs, strict=True):
            if not (type(value) is np.ndarray and value.dtype is dtype and value.flags.carray):
                value = input_array(value, port)
            arrays.append(value)
        return arrays

    def outputs(self, binding: Binding, inputs: Sequence[np.ndarray], out: Any) -> list[np.ndarray]:
        """Arrays for the results: those of the caller, new ones for the rest."""
        fresh = zip(binding.outputs, self._output_dtypes, strict=True)
        if out is None:
            return [new_output(shape, dtype, count) for (shape, count), dtype in fresh]
        given = output_arrays(out, self.plan.outputs, [shape for shape, _ in binding.outputs], inputs)
        return [
            new_output(shape, dtype, count) if array is None else array
            for array, ((shape, count), dtype) in zip(given, fresh, strict=True)
        ]

    def fail(self, fault: int) -> NoReturn:
        """Raise the error for what a run returned."""
        step = self.plan.steps[fault - 1]
        origin = step.origin
        where = [f"module {origin.module}"] if origin.module else []
        where += [origin.source] if origin.source else []
        where += [f"node {', '.join(origin.nodes)}"] if origin.nodes else []
        raise InputError(
            f"an index is out of range in step {fault - 1} ({step.name}; {'; '.join(where) or 'origin unknown'}): "
            f"an input holds a value that the model's tables do not have"
        )

    def _ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        names = self._names
        expected = f"entry {self.name!r} takes {', '.join(names) or 'no inputs'}"
        if len(args) > len(names):
            raise UsageError(f"{expected}; got {len(args)} positional inputs")
        values = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise UsageError(f"{expected}; there is no input {name!r}")
            if name in values:
                raise UsageError(f"{expected}; {name!r} was given twice")
            values[name] = value
        if missing := [name for name in names if name not in values]:
            raise UsageError(f"{expected}; {', '.join(missing)} missing")
        return [values[name] for name in names]


class Entry:
    """One entry point, to be called: ``entry(x)``, ``entry(input_ids=..., attention_mask=...)``."""

    def __init__(self, executable: Executable, source: Source) -> None:
        """Bind an entry point to where its calls run; models and sessions do this."""
        self._executable = executable
        self._source = source

    @property
    def name(self) -> str:
        """The entry point's name."""
        return self._executable.name

    @property
    def plan(self) -> Plan:
        """What it executes."""
        return self._executable.plan

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes, symbolic shapes and ranges of the inputs."""
        return tuple(self._spec(port) for port in self.plan.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The same of the outputs."""
        return tuple(self._spec(port) for port in self.plan.outputs)

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            *args: inputs in order: numpy arrays or DLPack tensors on the CPU, of exactly the input's dtype; Python
                numbers and lists of them take the input's dtype.
            out: arrays to write the outputs to: one array, a sequence, or a dictionary by output name.
            **kwargs: inputs by name.

        Returns:
            What the model returns (array, tuple, list or dictionary), with numpy arrays that belong to the caller.

        Raises:
            ShapeError: an input's dtype, rank or size does not fit.
            InputError: an index in an input is out of range.
            UsageError: an input is missing or unknown, ``out`` does not fit, or the model is closed.
        """
        executable = self._executable
        inputs = executable.inputs(args, kwargs)
        binding = executable.bind(tuple([array.shape for array in inputs]))
        outputs = executable.outputs(binding, inputs, out)
        workspace = self._source.take()
        try:
            frame = self._prepare(workspace, binding, inputs, outputs)
            fault = executable.run(frame.reference)
        finally:
            self._source.give(workspace)
        if fault:
            executable.fail(fault)
        return executable.results(outputs, binding.values)

    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run once and give when each step ran; takes the inputs as a call does."""
        executable = self._executable
        inputs = executable.inputs(args, kwargs)
        binding = executable.bind(tuple(array.shape for array in inputs))
        outputs = executable.outputs(binding, inputs, None)
        capacity = len(executable.plan.steps)
        items = (Record * max(capacity, 1))()
        records = Records(items, capacity, 0)
        workspace = self._source.take()
        try:
            frame = self._prepare(workspace, binding, inputs, outputs)
            frame.call.trace = executable.library.record
            frame.call.trace_user = ctypes.addressof(records)
            try:
                fault = executable.run(frame.reference)
            finally:
                frame.call.trace = None
        finally:
            self._source.give(workspace)
        if fault:
            executable.fail(fault)
        return [StepTime(item.step, item.variant, item.begin_ns, item.end_ns) for item in items[: records.count]]

    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run, stopping after each step.

        Args:
            callback: called with the step's index, the index of the variant that ran, and a function that reads any
                operand of the plan (a ``Ref``) as a numpy array as it is at that moment. What it raises ends the run
                and is raised here.
            *args: inputs, as for a call.
            **kwargs: inputs by name.

        Returns:
            What a call returns.
        """
        executable = self._executable
        inputs = executable.inputs(args, kwargs)
        binding = executable.bind(tuple(array.shape for array in inputs))
        outputs = executable.outputs(binding, inputs, None)
        raised: list[BaseException] = []
        workspace = self._source.take()
        try:
            frame = self._prepare(workspace, binding, inputs, outputs)
            offsets = (ctypes.c_int64 * max(len(executable.plan.buffers), 1))()
            executable.arena(binding.symbols, offsets)
            reader = Reader(
                executable.plan, binding.values, list(offsets), workspace, inputs, outputs, executable.weights
            )

            def step_done(user: Any, step: int, variant: int, begin: int, end: int) -> None:
                try:
                    callback(step, variant, reader)
                except BaseException as error:  # must not unwind through C
                    raised.append(error)
                    frame.call.fault = -1

            hook = TRACE(step_done)
            frame.call.trace = ctypes.cast(hook, ctypes.c_void_p).value
            try:
                fault = executable.run(frame.reference)
            finally:
                frame.call.trace = None
        finally:
            self._source.give(workspace)
        if raised:
            raise raised[0]
        if fault:
            executable.fail(fault)
        return executable.results(outputs, binding.values)

    def _prepare(
        self, workspace: Workspace, binding: Binding, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> Frame:
        frame = workspace.frame(self._executable.name, binding)
        if self._executable.stateful and self._source.fresh:
            workspace.reset(self._executable.name)
        bind_arrays(frame, inputs, outputs)
        frame.call.fault = 0
        return frame

    def _spec(self, port: Port) -> TensorSpec:
        shape = tuple(size if isinstance(size, int) else sizes.show(size) for size in port.shape)
        used = frozenset().union(*(sizes.symbols_of(size) for size in port.shape))
        ranges = {name: limits for name, limits in self.plan.ranges().items() if name in used}
        return TensorSpec(port.name, port.dtype, shape, ranges)

    def __repr__(self) -> str:
        inputs, outputs = ("; ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"<entry {self.name}({inputs}) -> ({outputs})>"

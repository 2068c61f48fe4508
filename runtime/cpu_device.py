"""The CPU: a native library per model, with one C function per entry point (``tw_run_<entry>``)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from . import cpu
from .artifact import Artifact, map_weights
from .binding import Binding, cached_binder
from .buffers import input_view, new_view, output_view, view_of
from .device import Device
from .entry import Entry, Source, StepTime, TraceCallback, index_error, ordered
from .library import TRACE, Library, Record, Records, ThreadPool
from .manifest import FILE_NAME
from .plan import Plan, Port, Ref
from .ports import taken_outputs
from .results import compile_results
from .state_sizes import of_plan
from .workspace import Frame, Workspace, bind_tensors


class CpuDevice(Device[Workspace]):
    """The processor, with the model's library and thread pool."""

    name = "cpu"

    def __init__(self, artifact: Artifact, threads: int) -> None:
        """Choose the target that fits this processor, open its library and map the weights.

        Raises:
            ArtifactError: no target fits, or the library cannot be used.
        """
        target = cpu.choose(artifact.manifest.targets, cpu.features(), str(artifact.path / FILE_NAME))
        self.target = target.name
        self.plans = artifact.devices["cpu"]
        self.threads = threads
        self.limit = max(2, threads)
        code = artifact.library(target)
        weights = map_weights(artifact)
        library = Library(code, artifact.weights)
        self._native = ThreadPool(library, threads)
        self._executables = {name: Executable(plan, library, weights) for name, plan in self.plans.items()}
        self._weights = weights

    def workspace(self, sizes: Mapping[str, int]) -> Workspace:
        """Arena and states for one call at a time."""
        return Workspace(self.plans, self._weights, self._native, sizes)

    def entry(self, name: str, source: Source[Workspace]) -> Entry[Workspace]:
        """An entry point whose calls run on workspaces of a source."""
        return CpuEntry(self._executables[name], source)

    def close(self) -> None:
        """End the threads."""
        self._native.close()

    def __str__(self) -> str:
        return f"{self.target}, {self.threads} threads"


class Executable:
    """What all calls of an entry point share; immutable."""

    def __init__(self, plan: Plan, library: Library, weights: memoryview) -> None:
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
        self._inputs: tuple[tuple[Port, Any], ...] = tuple((port, None) for port in plan.inputs)
        self._array_type: Any = None
        self._output_dtypes: Sequence[Any] = ()
        self._nothing = (None,) * len(plan.outputs)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arrays and views of a call, in the order of the plan."""
        if kwargs or len(args) != len(self._inputs):
            args = ordered(self.plan, args, kwargs)
        array_type = self._array_type
        tensors = []
        for value, (port, dtype) in zip(args, self._inputs, strict=True):
            if not (type(value) is array_type and value.dtype is dtype and value.flags.carray):
                value = self._input(value, port)
            tensors.append(value)
        return tensors

    def _input(self, value: Any, port: Port) -> Any:
        view = view_of(value, port)
        return self._arrays.input_array(value, port) if view is None else input_view(view, port)

    @cached_property
    def _arrays(self) -> Any:
        """What handles numpy arrays; numpy is imported by the first call that needs it, and then known to all."""
        from . import arrays, dtypes

        self._inputs = tuple((port, dtypes.numpy_dtype(port.dtype)) for port in self.plan.inputs)
        self._output_dtypes = [dtypes.numpy_dtype(port.dtype) for port in self.plan.outputs]
        self._array_type = arrays.np.ndarray
        return arrays

    def outputs(self, binding: Binding, inputs: Sequence[Any], out: Any) -> list[Any]:
        """Memory for the results: the caller's, and new for the rest, as views if nothing but views was given."""
        ports = self.plan.outputs
        given: Sequence[Any] = self._nothing
        views = bool(inputs) and type(inputs[0]) is memoryview and _all_views(inputs)
        if out is not None:
            given = taken_outputs(out, ports, [shape for shape, _ in binding.outputs], inputs, self._output)
            views = _all_views([*inputs, *(tensor for tensor in given if tensor is not None)])
        if views:
            return [
                new_view(shape, port.dtype, count) if tensor is None else tensor
                for tensor, port, (shape, count) in zip(given, ports, binding.outputs, strict=True)
            ]
        new_output = self._arrays.new_output
        return [
            new_output(shape, dtype, count) if tensor is None else tensor
            for tensor, dtype, (shape, count) in zip(given, self._output_dtypes, binding.outputs, strict=True)
        ]

    def _output(self, value: Any, port: Port, shape: tuple[int, ...]) -> Any:
        view = None if type(value) is self._array_type else view_of(value, port)
        return self._arrays.out_array(value, port, shape) if view is None else output_view(view, port, shape)

    def memory(
        self, workspace: Workspace, binding: Binding, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> Callable[[Ref, int], Any]:
        """A function that gives the bytes of an operand, for a ``Reader``."""
        offsets = (ctypes.c_int64 * max(len(self.plan.buffers), 1))()
        self.arena(binding.symbols, offsets)

        def bytes_of(ref: Ref, count: int) -> Any:
            if ref.kind == "constant":
                return self.weights[self.plan.constants[ref.index].offset :][:count]
            if ref.kind == "state":
                return bytearray(workspace.states[self.plan.states[ref.index].name].view[:count])
            if ref.kind == "buffer":
                return bytearray(workspace.arena[offsets[ref.index] :][:count])
            return bytearray((inputs if ref.kind == "input" else outputs)[ref.index].tobytes())

        return bytes_of


def _all_views(tensors: Sequence[Any]) -> bool:
    return bool(tensors) and all([type(tensor) is memoryview for tensor in tensors])


class CpuEntry(Entry[Workspace]):
    """An entry point on the CPU."""

    def __init__(self, executable: Executable, source: Source[Workspace]) -> None:
        super().__init__(executable.plan, source)
        self._executable = executable
        self._state_sizes = of_plan(executable.plan, source.sizes)

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the model; see :meth:`Entry.__call__`."""
        executable = self._executable
        inputs = executable.inputs(args, kwargs)
        binding = executable.bind(tuple([array.shape for array in inputs]), self._state_sizes)
        outputs = executable.outputs(binding, inputs, out)
        workspace = self._source.take()
        try:
            frame = self._prepare(workspace, binding, inputs, outputs)
            fault = executable.run(frame.reference)
        finally:
            self._source.give(workspace)
        if fault:
            raise index_error(executable.plan, fault - 1)
        return executable.results(outputs, binding.values)

    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run once and give when each step ran, by the monotonic clock."""
        executable = self._executable
        inputs = executable.inputs(args, kwargs)
        binding = executable.bind(tuple(array.shape for array in inputs), self._state_sizes)
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
            raise index_error(executable.plan, fault - 1)
        return [StepTime(item.step, item.variant, item.begin_ns, item.end_ns) for item in items[: records.count]]

    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run, stopping after each step; see :meth:`Entry.trace`."""
        executable = self._executable
        inputs = executable.inputs(args, kwargs)
        binding = executable.bind(tuple(array.shape for array in inputs), self._state_sizes)
        outputs = executable.outputs(binding, inputs, None)
        from .inspection import Reader

        raised: list[BaseException] = []
        workspace = self._source.take()
        try:
            frame = self._prepare(workspace, binding, inputs, outputs)
            reader = Reader(executable.plan, binding.values, executable.memory(workspace, binding, inputs, outputs))

            def step_done(user: Any, step: int, variant: int, begin: int, end: int) -> None:
                try:
                    callback(step, variant, reader)
                except BaseException as error:  # must not unwind through C
                    raised.append(error)
                    frame.call.fault = -1

            hook = TRACE(step_done)
            frame.call.trace = ctypes.c_void_p.from_buffer(hook).value  # ctypes.cast would make a cycle
            try:
                fault = executable.run(frame.reference)
            finally:
                frame.call.trace = None
        finally:
            self._source.give(workspace)
        if raised:
            raise raised[0]
        if fault:
            raise index_error(executable.plan, fault - 1)
        return executable.results(outputs, binding.values)

    def _prepare(self, workspace: Workspace, binding: Binding, inputs: Sequence[Any], outputs: Sequence[Any]) -> Frame:
        frame = workspace.frame(self._executable.name, binding)
        if self._executable.stateful and self._source.fresh:
            workspace.reset(self._executable.name)
        bind_tensors(frame, inputs, outputs)
        frame.call.fault = 0
        return frame

"""The interpreter as a device: the plans and kernels of GPUs, run on the CPU by Triton's interpreter.

Everything is as on a GPU but the binaries: grids, tiles, operands, sizes, memory. On top, every access is checked
against its operands, scratch begins as NaN, and counters must be left zero. Of a kernel's tiles the first one runs
that may be used and, where the artifact has binaries, that there is one of for the first GPU target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import binaries, tiles
from ..arrays import input_array, new_output, out_array
from ..artifact import Artifact, map_weights
from ..device import Device
from ..dtypes import numpy_dtype
from ..entry import Entry, Source, StepTime, TraceCallback, describe_step, index_error, ordered
from ..errors import InterpreterError
from ..inspection import Reader
from ..launches import Launch, Launches, cached_launches
from ..plan import Plan, Tile, Variant
from ..ports import taken_outputs
from ..results import compile_results
from ..state_sizes import of_plan
from . import launch
from .process import Interpreter
from .workspace import CallMemory, InterpreterWorkspace, Weights

SOURCES = "kernels/triton"
StepDone = Callable[[int, int, int, int, Reader], None]
"""Is told of a step that has run: its number and variant, when it began and ended in ns, and what reads operands."""


class InterpreterDevice(Device[InterpreterWorkspace]):
    """Triton's interpreter with the sources and weights of one artifact."""

    name = "interpreter"
    limit = 1  # the worker does one thing at a time

    def __init__(self, artifact: Artifact) -> None:
        """Check the sources and start the worker.

        Raises:
            ArtifactError: a source or the table of binaries is damaged.
            InterpreterError: Triton is not installed.
        """
        self.plans = artifact.devices["cuda"]
        target = next((item for item in artifact.manifest.targets if item.name.startswith("cuda:")), None)
        self.target = target.name if target else "cuda"
        table = binaries.parse(artifact.content(target.library), target.library) if target else None
        for record in artifact.manifest.files:
            if record.path.startswith(f"{SOURCES}/"):
                artifact.check_digest(record.path)
        data = np.frombuffer(map_weights(artifact), np.uint8)
        self._interpreter = Interpreter(artifact.path / SOURCES)
        with open(artifact.weights_path, "rb") as file:
            block = self._interpreter.map(file.fileno(), writable=False)
        self._weights = Weights(data, block, len(artifact.weights.header))
        self._kernels = Kernels(table)

    def workspace(self, sizes: Mapping[str, int]) -> InterpreterWorkspace:
        """New working memory, with all states as they are initially."""
        return InterpreterWorkspace(self._interpreter, self.plans, self._weights.data, sizes)

    def entry(self, name: str, source: Source[InterpreterWorkspace]) -> Entry[InterpreterWorkspace]:
        """An entry point whose calls run on workspaces of a source."""
        return InterpreterEntry(self.plans[name], source, self._interpreter, self._weights, self._kernels)

    def close(self) -> None:
        """End the worker."""
        self._interpreter.close()

    def __str__(self) -> str:
        return f"{self.target}, interpreted"


class Kernels:
    """What a table of binaries says of kernels; without one, all tiles are there and sizes have the bits they need."""

    def __init__(self, table: binaries.Binaries | None) -> None:
        self._table = table

    def choose(self, step: int, variant: Variant, values: Mapping[str, int]) -> Tile:
        """The first tile that may be used."""
        present = self._table.by_name[variant.kernel].tiles if self._table else None
        return tiles.allowed(variant, values, present)[0]

    def size_type(self, item: Launch) -> str:
        """The type of a kernel's sizes."""
        if self._table is None or not item.sizes:
            return "i32" if max(item.sizes, default=0) < 2**31 else "i64"
        return self._table.by_name[item.kernel].parameters[-1]


class InterpreterEntry(Entry[InterpreterWorkspace]):
    """An entry point in the interpreter."""

    def __init__(
        self,
        plan: Plan,
        source: Source[InterpreterWorkspace],
        interpreter: Interpreter,
        weights: Weights,
        kernels: Kernels,
    ) -> None:
        super().__init__(plan, source)
        self._interpreter = interpreter
        self._weights = weights
        self._kernels = kernels
        self._launches = cached_launches(plan, kernels.choose)
        self._state_sizes = of_plan(plan, source.sizes)
        self._results = compile_results(plan.results)

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the model; see :meth:`Entry.__call__`."""
        return self._call(args, kwargs, out)

    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run once and give when each step ran, by the monotonic clock."""
        times: list[StepTime] = []
        self._call(args, kwargs, None, lambda *done: times.append(StepTime(*done[:4])))
        return times

    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run, stopping after each step; see :meth:`Entry.trace`."""
        return self._call(args, kwargs, None, lambda step, variant, begin, end, reader: callback(step, variant, reader))

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, done: StepDone | None = None) -> Any:
        plan = self.plan
        values = zip(ordered(plan, args, kwargs), plan.inputs, strict=True)
        inputs = [input_array(value, port) for value, port in values]
        launches = self._launches(tuple(array.shape for array in inputs), self._state_sizes)
        given: Sequence[Any] = [None] * len(plan.outputs)
        if out is not None:
            given = taken_outputs(out, plan.outputs, [shape for shape, _ in launches.outputs], inputs, out_array)
        outputs = [
            new_output(shape, numpy_dtype(port.dtype), count) if array is None else array
            for array, port, (shape, count) in zip(given, plan.outputs, launches.outputs, strict=True)
        ]
        workspace = self._source.take()
        try:
            if self._source.fresh:
                workspace.reset(self.name)
            memory = CallMemory(plan, launches, workspace, self._weights, inputs)
            self._run(launches, memory, done)
            for index, array in enumerate(outputs):
                array.reshape(-1).view("uint8")[:] = memory.bytes("output", index)
        finally:
            self._source.give(workspace)
        return self._results(outputs, launches.values)

    def _run(self, launches: Launches, memory: CallMemory, done: StepDone | None) -> None:
        plan = self.plan
        reader = Reader(plan, launches.values, memory.read)
        for item in launches.items:
            begin = time.monotonic_ns()
            if item.grid:
                try:
                    self._interpreter.run([self._prepared(item, memory)])
                except InterpreterError as error:
                    raise InterpreterError(f"{describe_step(plan, item.step)}: {error}") from None
            end = time.monotonic_ns()
            if memory.bytes("fault", item.step).any():
                raise index_error(plan, item.step)
            if memory.bytes("counters", 0).any():
                where = describe_step(plan, item.step)
                raise InterpreterError(f"{where}: kernel {item.kernel} does not leave its counters zero")
            if done is not None:
                done(item.step, item.variant, begin, end, reader)

    def _prepared(self, item: Launch, memory: CallMemory) -> launch.Launch:
        return launch.Launch(
            file=f"{item.kernel}.py",
            kernel=item.kernel,
            operands=[memory.operand(operand) for operand in item.operands],
            sizes=item.sizes,
            constants=item.tile.values(),
            grid=item.grid,
            size_type=self._kernels.size_type(item),
        )

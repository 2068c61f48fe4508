"""Entry points on a GPU: taking inputs from host and device, running, and giving results where the inputs were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import input_array, new_output, out_array
from ..dtypes import numpy_dtype
from ..entry import Entry, Source, StepTime, TraceCallback, describe_step, ordered
from ..errors import DeviceError, ShapeError
from ..inspection import Reader
from ..launches import Chooser, Launch, Operand, cached_launches
from ..plan import Plan, Ref
from ..ports import given_outputs, shared_output
from ..results import compile_results
from ..state_sizes import of_plan
from .calls import Addresses, PreparedCall
from .driver import Driver, DriverError
from .results import DeviceArray
from .tensors import DeviceTensor, device_tensor, on_device
from .workspace import CudaWorkspace, Loaded


@dataclass
class _Call:
    """One call on its way.

    Attributes:
        prepared: what runs.
        addresses: of inputs and outputs.
        results: what the caller gets, by output.
        downloads: address, bytes and host array of the outputs that go to the host.
        kept: what must live until the launches are in the stream.
    """

    prepared: PreparedCall
    addresses: Addresses = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    downloads: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)


class CudaEntry(Entry[CudaWorkspace]):
    """An entry point on a GPU.

    Inputs may be in host memory or on the GPU. Results are numpy arrays, unless an input is on the GPU: then they are
    :class:`DeviceArray` objects, which other libraries take through DLPack. Arrays that the caller gives as ``out``
    stay where they are.

    A call is done when it returns. Where the model was loaded with a ``stream`` it is not, unless a result is in host
    memory: its work is in the stream then, and an index out of range is reported by a later call or by
    :meth:`Model.synchronize`.
    """

    def __init__(self, loaded: Loaded, plan: Plan, source: Source[CudaWorkspace], choose: Chooser) -> None:
        super().__init__(plan, source)
        self._loaded = loaded
        self._launches = cached_launches(plan, choose)
        self._state_sizes = of_plan(plan, source.sizes)
        self._results = compile_results(plan.results)

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the model; see :meth:`Entry.__call__`."""
        with self._workspace() as (workspace, driver):
            call = self._prepare(workspace, driver, args, kwargs, out)
            call.prepared.run(driver, workspace.stream.handle, call.addresses)
            return self._deliver(workspace, driver, call)

    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run once, without a graph, and give when each step ran on the GPU since the first one began."""
        with self._workspace() as (workspace, driver):
            call = self._prepare(workspace, driver, args, kwargs, None)
            stream = workspace.stream.handle
            events: list[Any] = []
            try:
                for _ in range(len(self._plan.steps) + 1):
                    events.append(driver("cuEventCreate", driver.api.CUevent_flags.CU_EVENT_DEFAULT))
                waiting = iter(events)
                driver("cuEventRecord", next(waiting), stream)

                def record(launch: Launch) -> None:
                    driver("cuEventRecord", next(waiting), stream)

                call.prepared.each(driver, stream, call.addresses, record)
                self._deliver(workspace, driver, call, wait=True)
                ends = [round(1e6 * driver("cuEventElapsedTime", events[0], event)) for event in events]
            finally:
                for event in events:
                    driver.status("cuEventDestroy", event)
            items = call.prepared.launches.items
            return [
                StepTime(item.step, item.variant, begin, end)
                for item, begin, end in zip(items, ends[:-1], ends[1:], strict=True)
            ]

    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run, without a graph, stopping after each step; see :meth:`Entry.trace`."""
        with self._workspace() as (workspace, driver):
            call = self._prepare(workspace, driver, args, kwargs, None, host=True)
            stream = workspace.stream.handle
            values = call.prepared.launches.values

            def memory(ref: Ref, count: int) -> np.ndarray:
                data = np.empty(count, np.uint8)
                address = self._address(workspace, call, ref)
                if count:
                    driver("cuMemcpyDtoHAsync", data.ctypes.data, address, count, stream)
                    driver("cuStreamSynchronize", stream)
                return data

            reader = Reader(self._plan, values, memory)

            def done(launch: Launch) -> None:
                try:
                    driver("cuStreamSynchronize", stream)
                except DriverError as error:
                    where = describe_step(self._plan, launch.step)
                    raise DeviceError(f"{where}: kernel {launch.kernel} failed: {error}") from error
                callback(launch.step, launch.variant, reader)

            call.prepared.each(driver, stream, call.addresses, done)
            return self._deliver(workspace, driver, call)

    # -- before --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _workspace(self) -> Iterator[tuple[CudaWorkspace, Driver]]:
        """A workspace, in the device's context; when the call fails, nothing of it runs any more at the end."""
        workspace = self._source.take()
        try:
            with self._loaded.context as driver:
                try:
                    yield workspace, driver
                except BaseException:
                    driver.status("cuStreamSynchronize", workspace.stream.handle)
                    raise
        finally:
            self._source.give(workspace)

    def _prepare(
        self,
        workspace: CudaWorkspace,
        driver: Driver,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        host: bool = False,
    ) -> _Call:
        """Everything before the launches: inputs are on the device, outputs have a place, states are reset."""
        workspace.check_faults()  # of earlier calls, which nobody waited for
        plan, stream = self._plan, workspace.stream
        given = args if not kwargs and len(args) == len(plan.inputs) else ordered(plan, args, kwargs)
        context = self._loaded.context
        inputs: list[np.ndarray | DeviceTensor] = []
        for value, port in zip(given, plan.inputs, strict=True):
            if on_device(value):
                inputs.append(device_tensor(value, port, f"input {port.name!r}", context, stream, False))
            else:
                inputs.append(input_array(value, port))
        shapes = tuple(item.shape for item in inputs)
        launches = self._launches(shapes, self._state_sizes)
        call = _Call(workspace.prepare(self.name, shapes, launches))
        call.kept += inputs
        places = self._outputs(workspace, call, inputs, out, host)
        self._place(workspace, driver, call, inputs, places)
        if plan.states and self._source.fresh:
            workspace.reset(self.name)
        return call

    def _outputs(
        self, workspace: CudaWorkspace, call: _Call, inputs: Sequence[Any], out: Any, host: bool
    ) -> list[np.ndarray | None]:
        """Decide where each output goes; gives the host arrays, None for those that stay on the device."""
        plan, stream = self._plan, workspace.stream
        given = [None] * len(plan.outputs) if out is None else given_outputs(out, plan.outputs)
        stay = not host and any(isinstance(item, DeviceTensor) for item in inputs)
        taken = list(inputs)
        arrays: list[np.ndarray | None] = []
        for index, (value, port) in enumerate(zip(given, plan.outputs, strict=True)):
            shape, count = call.prepared.launches.outputs[index]
            array: np.ndarray | None = None
            if value is None and stay:
                result = DeviceArray(self._loaded.results, stream, port.dtype, shape)
                call.addresses["output", index] = result.address
                call.results.append(result)
            elif value is None:
                array = new_output(shape, numpy_dtype(port.dtype), count)
                call.results.append(array)
            elif on_device(value):
                what = f"out: output {port.name!r}"
                tensor = device_tensor(value, port, what, self._loaded.context, stream, True)
                if tensor.shape != shape:
                    raise ShapeError(f"{what}: expected shape {list(shape)}, got {list(tensor.shape)}")
                if any(isinstance(other, DeviceTensor) and tensor.overlaps(other) for other in taken):
                    raise shared_output(port)
                taken.append(tensor)
                call.kept.append(tensor)
                call.addresses["output", index] = tensor.address
                call.results.append(value)
            else:
                array = out_array(value, port, shape)
                if any(isinstance(other, np.ndarray) and np.may_share_memory(array, other) for other in taken):
                    raise shared_output(port)
                taken.append(array)
                call.results.append(array)
            arrays.append(array)
        return arrays

    def _place(
        self,
        workspace: CudaWorkspace,
        driver: Driver,
        call: _Call,
        inputs: Sequence[np.ndarray | DeviceTensor],
        outputs: Sequence[np.ndarray | None],
    ) -> None:
        """Upload the inputs that are in host memory; reserve room for the outputs that go there."""
        border, addresses, stream = call.prepared.border, call.addresses, workspace.stream.handle
        kind = driver.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        base = -1  # no room is needed where everything is on the device
        reading = False
        for index, item in enumerate(inputs):
            if isinstance(item, DeviceTensor):
                addresses["input", index] = item.address
                continue
            if base < 0:
                base = workspace.block("border", border.bytes, "inputs and outputs").address
            addresses["input", index] = place = base + border.inputs[index]
            if item.nbytes:
                source = item.ctypes.data
                driver("cuMemcpyHtoDAsync", place, source, item.nbytes, stream)
                # Of memory that is not page-locked there is a copy now; the driver does not know its address.
                reading = reading or not (workspace.stream.ours or driver.status("cuPointerGetAttribute", kind, source))
        if reading:
            driver("cuStreamSynchronize", stream)  # the caller may change or free its array when the call returns
        for index, array in enumerate(outputs):
            if array is None:
                continue
            if base < 0:
                base = workspace.block("border", border.bytes, "inputs and outputs").address
            addresses["output", index] = place = base + border.outputs[index]
            if array.nbytes:
                call.downloads.append((place, array.nbytes, array))

    # -- after ---------------------------------------------------------------------------------------------------------

    def _deliver(self, workspace: CudaWorkspace, driver: Driver, call: _Call, wait: bool = False) -> Any:
        """Bring outputs to the host and give the results; wait where they are for the host, or the stream is ours."""
        workspace.read_faults(self.name)
        for address, count, array in call.downloads:
            driver("cuMemcpyDtoHAsync", array.ctypes.data, address, count, workspace.stream.handle)
        if wait or call.downloads or workspace.stream.ours:
            self._wait(workspace, driver)
        return self._results(call.results, call.prepared.launches.values)

    def _wait(self, workspace: CudaWorkspace, driver: Driver) -> None:
        try:
            driver("cuStreamSynchronize", workspace.stream.handle)
        except DriverError as error:
            raise DeviceError(
                f"a kernel of entry {self.name!r} failed while it ran: {error}. The GPU's context is lost and every "
                f"later call will fail; in a new process, trace() stops at the step that fails"
            ) from error
        workspace.check_faults()

    def _address(self, workspace: CudaWorkspace, call: _Call, ref: Ref) -> int:
        if ref.kind in ("input", "output"):
            return call.addresses[ref.kind, ref.index]
        plan, launches = self._plan, call.prepared.launches
        offset = 0
        if ref.kind == "buffer":
            offset = launches.offsets[ref.index]
        elif ref.kind == "constant":
            offset = plan.constants[ref.index].offset
        return workspace.address(plan, Operand(ref.kind, ref.index, offset, 0, ""))

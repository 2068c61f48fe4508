"""One combination of shapes made ready in a workspace: packed arguments, launches one by one, and the CUDA graph.

The graph is a chain of kernel nodes, built rather than captured: it is the same without any rule about what other
threads may do meanwhile, and it gives the nodes, whose arguments are exchanged when a caller's tensors lie elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from ..entry import describe_step
from ..errors import ArtifactError, DeviceError
from ..launches import Launch, Launches
from ..plan import Plan
from .driver import Driver, DriverError
from .modules import Function

Addresses = dict[tuple[str, int], int]
"""Where the memories are that differ between calls: (``"input"`` or ``"output"``, index) → address."""

ALIGNMENT = 256
"""Of memories that lie one after the other in a block."""

_WARP = 32
_LIMITS = {"i32": 2**31, "i64": 2**63}


class Arguments:
    """The arguments of one launch as the driver reads them: an array of pointers to 8-byte slots."""

    def __init__(self, values: Sequence[int]) -> None:
        self.slots = (ctypes.c_uint64 * len(values))(*(value & (2**64 - 1) for value in values))
        base = ctypes.addressof(self.slots)
        self._pointers = (ctypes.c_void_p * len(values))(*(base + 8 * index for index in range(len(values))))
        self.address = ctypes.addressof(self._pointers)


class Kernel:
    """One launch with its arguments in place."""

    def __init__(self, launch: Launch, function: Function, addresses: Sequence[int], scratch: tuple[int, int]) -> None:
        """Pack the arguments.

        Args:
            launch: what to launch.
            function: with what.
            addresses: of the operands; those of inputs and outputs are set by :meth:`bind`.
            scratch: addresses of the scratch memory that Triton's last two arguments point to.

        Raises:
            ArtifactError: a size does not fit its type.
        """
        for value, kind in zip(launch.sizes, function.parameters[len(addresses) :], strict=True):
            if not -_LIMITS[kind] <= value < _LIMITS[kind]:
                raise ArtifactError(f"kernel {launch.kernel} takes an {kind}, and cannot take {value}")
        self.launch = launch
        self.function = function
        self.arguments = Arguments([*addresses, *launch.sizes, *scratch])
        self.bound = [
            (slot, (operand.kind, operand.index))
            for slot, operand in enumerate(launch.operands)
            if operand.kind in ("input", "output")
        ]
        self.node: Any = None
        self.in_graph: tuple[int, ...] = ()  # the addresses that the graph has, in the order of self.bound

    def bind(self, addresses: Addresses) -> tuple[int, ...]:
        """Put the addresses of a call's inputs and outputs in place; gives them."""
        slots: Any = self.arguments.slots
        found = tuple(addresses[key] for _, key in self.bound)
        for (slot, _), address in zip(self.bound, found, strict=True):
            slots[slot] = address
        return found

    def start(self, driver: Driver, stream: Any) -> None:
        """Launch it."""
        api, binary = driver.api, self.function.binary
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.launch.grid * binary.cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = _WARP * binary.warps, 1, 1
        config.sharedMemBytes = binary.shared
        config.hStream = stream
        if binary.cluster > 1:
            attribute = api.CUlaunchAttribute()
            attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = binary.cluster
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            config.attrs, config.numAttrs = [attribute], 1
        driver("cuLaunchKernelEx", config, self.function.handle, self.arguments.address, 0)

    def parameters(self, driver: Driver) -> Any:
        """As a node of a graph."""
        binary = self.function.binary
        parameters = driver.api.CUDA_KERNEL_NODE_PARAMS()
        parameters.func = self.function.handle
        parameters.gridDimX, parameters.gridDimY, parameters.gridDimZ = self.launch.grid * binary.cluster, 1, 1
        parameters.blockDimX, parameters.blockDimY, parameters.blockDimZ = _WARP * binary.warps, 1, 1
        parameters.sharedMemBytes = binary.shared
        parameters.kernelParams = self.arguments.address
        return parameters

    def add(self, driver: Driver, graph: Any, after: Any) -> Any:
        """Add it to a graph, after another node or None; gives the node."""
        api, cluster = driver.api, self.function.binary.cluster
        before = [] if after is None else [after]
        self.node = driver("cuGraphAddKernelNode", graph, before, len(before), self.parameters(driver))
        if cluster > 1:
            value = api.CUkernelNodeAttrValue()
            value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
            kind = api.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            driver("cuGraphKernelNodeSetAttribute", self.node, kind, value)
        return self.node


class Border:
    """Where inputs and outputs that are in host memory lie on the device: offsets, and ``bytes`` in all."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        ends = list(accumulate((-(-count // ALIGNMENT) * ALIGNMENT for count in (*inputs, *outputs)), initial=0))
        self.inputs, self.outputs = ends[: len(inputs)], ends[len(inputs) : -1]
        self.bytes = ends[-1]


class PreparedCall:
    """The launches of one combination of shapes in one workspace, and their graph once they have been repeated."""

    def __init__(self, plan: Plan, launches: Launches, kernels: Sequence[Kernel], inputs: Sequence[int]) -> None:
        """Take what is ready.

        Args:
            plan: of the entry point.
            launches: of the call.
            kernels: those of them that have something to do.
            inputs: bytes of the inputs.
        """
        self.launches = launches
        self.border = Border(inputs, [count for _, count in launches.outputs])
        self._plan = plan
        self._kernels = kernels
        self._moving = [kernel for kernel in kernels if kernel.bound]
        self._runs = 0
        self._graph: Any = None
        self._executable: Any = None

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._executable is not None

    def run(self, driver: Driver, stream: Any, addresses: Addresses) -> None:
        """Give the stream all launches: one by one at first, as one graph from the second time on.

        Raises:
            DeviceError: a launch fails; names its step and kernel.
        """
        if self._executable is None and self._runs:
            self._capture(driver, addresses)
        self._runs += 1
        if self._executable is None:
            self.each(driver, stream, addresses, lambda kernel: None)
            return
        for kernel in self._moving:
            if kernel.bind(addresses) != kernel.in_graph:
                driver("cuGraphExecKernelNodeSetParams", self._executable, kernel.node, kernel.parameters(driver))
                kernel.in_graph = kernel.bind(addresses)
        driver("cuGraphLaunch", self._executable, stream)

    def each(self, driver: Driver, stream: Any, addresses: Addresses, after: Callable[[Launch], None]) -> None:
        """Launch one by one, calling a function after each step, also those that have nothing to do."""
        for kernel in self._moving:
            kernel.bind(addresses)
        kernels = {kernel.launch.step: kernel for kernel in self._kernels}
        for launch in self.launches.items:
            if launch.step in kernels:
                try:
                    kernels[launch.step].start(driver, stream)
                except DriverError as error:
                    raise self._failed(error, launch) from error
            after(launch)

    def close(self, driver: Driver) -> None:
        """Destroy the graph; it may not be running."""
        for name, handle in (("cuGraphExecDestroy", self._executable), ("cuGraphDestroy", self._graph)):
            if handle is not None:
                driver.status(name, handle)
        self._executable = self._graph = None

    def _capture(self, driver: Driver, addresses: Addresses) -> None:
        self._graph = driver("cuGraphCreate", 0)
        try:
            node = None
            for kernel in self._kernels:
                kernel.in_graph = kernel.bind(addresses)
                try:
                    node = kernel.add(driver, self._graph, node)
                except DriverError as error:
                    raise self._failed(error, kernel.launch) from error
            self._executable = driver("cuGraphInstantiate", self._graph, 0)
        except BaseException:
            self.close(driver)
            raise

    def _failed(self, error: DriverError, launch: Launch) -> DeviceError:
        return DeviceError(
            f"{describe_step(self._plan, launch.step)}: kernel {launch.kernel}, tile {launch.tile.name}, {launch.grid} "
            f"programs: {error}"
        )

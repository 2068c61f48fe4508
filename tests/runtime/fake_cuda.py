"""A ``cuda.bindings.driver`` without a GPU: memory, streams that work late, events, modules, launches, graphs, errors.

Device memory is host memory, so copies really copy. A stream keeps what it is given until somebody waits for it, or for
an event after it; what runs too late (memory that is freed or overwritten meanwhile) is then seen. Kernels are Python
functions, by the name in a cubin that :func:`image` makes. ``test_cuda_fake.py`` holds every name and value against the
real bindings.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

Kernel = Callable[[list[int], int], None]
"""Takes the arguments (64 bits each) and the number of programs."""


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_CLOCK_RATE = 13
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36
    CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37
    CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE = 38
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
    CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115


class CUstream_flags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(IntEnum):
    CU_EVENT_DEFAULT = 0
    CU_EVENT_DISABLE_TIMING = 2


class CUfunction_attribute(IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class CUpointer_attribute(IntEnum):
    CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9


class CUlaunchAttributeID(IntEnum):
    CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4


CUkernelNodeAttrID = CUlaunchAttributeID


class CUmemAllocationType(IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemLocationType(IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemPool_attribute(IntEnum):
    CU_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4


class Struct:
    """Fields that begin as zeros or structures; any other name is an error."""

    FIELDS: dict[str, Any] = {}

    def __init__(self) -> None:
        for name, kind in self.FIELDS.items():
            object.__setattr__(self, name, kind())

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self.FIELDS, f"{type(self).__name__} has no field {name}"
        object.__setattr__(self, name, value)


class Dim(Struct):
    FIELDS = dict.fromkeys("xyz", int)


class AttributeValue(Struct):
    FIELDS = {"clusterDim": Dim}


class CUlaunchAttribute(Struct):
    FIELDS = {"id": int, "value": AttributeValue}


CUkernelNodeAttrValue = AttributeValue
_GRID = dict.fromkeys(
    ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes"), int
)


class CUlaunchConfig(Struct):
    FIELDS = {**_GRID, "hStream": int, "attrs": list, "numAttrs": int}


class CUDA_KERNEL_NODE_PARAMS(Struct):
    FIELDS = {**_GRID, "func": int, "kernelParams": int}


class CUmemLocation(Struct):
    FIELDS = {"type": int, "id": int}


class CUmemPoolProps(Struct):
    FIELDS = {"allocType": int, "location": CUmemLocation}


class Handle(int):
    """A handle of the driver."""


@dataclass
class Stream:
    work: deque[Callable[[], None]] = field(default_factory=deque)
    given: int = 0
    done: int = 0


@dataclass
class Launched:
    """A launch as it was made."""

    kernel: str
    grid: int
    threads: int
    shared: int
    cluster: int
    arguments: list[int]
    stream: int
    graph: bool


def image(function: str, arguments: int, architecture: str = "sm_90", kind: str = "cubin") -> bytes:
    """A binary that the fake driver loads."""
    return f"FAKE {kind} {architecture} {function} {arguments}".encode()


class FakeCuda:
    """The module, with the machine behind it."""

    __name__ = "cuda.bindings.driver"
    CUresult, CUdevice_attribute, CUstream_flags = CUresult, CUdevice_attribute, CUstream_flags
    CUevent_flags, CUfunction_attribute, CUpointer_attribute = CUevent_flags, CUfunction_attribute, CUpointer_attribute
    CUlaunchAttributeID, CUkernelNodeAttrID = CUlaunchAttributeID, CUkernelNodeAttrID
    CUmemAllocationType, CUmemLocationType = CUmemAllocationType, CUmemLocationType
    CUmemPool_attribute = CUmemPool_attribute
    CUlaunchConfig, CUlaunchAttribute, CUkernelNodeAttrValue = CUlaunchConfig, CUlaunchAttribute, CUkernelNodeAttrValue
    CUDA_KERNEL_NODE_PARAMS, CUmemPoolProps = CUDA_KERNEL_NODE_PARAMS, CUmemPoolProps
    CUstream, cuuint64_t = Handle, Handle

    def __init__(self, devices: int = 1, capability: tuple[int, int] = (9, 0), memory: int = 1 << 30) -> None:
        self.devices, self.capability, self.memory = devices, capability, memory
        self.pools_supported = True
        self.ordinal_of_pointers = 0
        self.kernels: dict[str, Kernel] = {}
        self.launched: list[Launched] = []
        self.calls: Counter[str] = Counter()
        self.allocated: dict[int, tuple[Any, int, str]] = {}  # address → buffer, bytes, "device", "pool" or "host"
        self.streams: dict[int, Stream] = {0: Stream(), 1: Stream()}
        self.live: dict[str, set[int]] = {name: set() for name in ("event", "module", "graph", "executable", "pool")}
        self.retained = 0
        self.functions: dict[int, tuple[str, int]] = {}
        self.most_shared: dict[int, int] = {}
        self.events: dict[int, tuple[int, int]] = {}
        self.graphs: dict[int, list[int]] = {}
        self.nodes: dict[int, dict[str, Any]] = {}
        self.problems: list[str] = []  # what a real device would have crashed on
        self._failures: list[tuple[str, int, str]] = []
        self._current = threading.local()
        self._next = 0x1000
        self._initialised = False
        self._lock = threading.RLock()

    # -- for tests -----------------------------------------------------------------------------------------------------

    def fail(self, function: str, code: str, after: int = 0) -> None:
        """Let a function fail once, after so many calls that do not."""
        self._failures.append((function, self.calls[function] + after + 1, code))

    def leaks(self) -> dict[str, Any]:
        """What is still there though everything should be gone."""
        found: dict[str, Any] = {name: len(handles) for name, handles in self.live.items() if handles}
        if self.allocated:
            found["memory"] = [(kind, count) for _, count, kind in self.allocated.values()]
        if len(self.streams) > 2:
            found["streams"] = len(self.streams) - 2
        if self.retained:
            found["contexts"] = self.retained
        return found

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "cuuint64_t":
            return value

        def function(*arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                self.calls[name] += 1
                for failure in list(self._failures):
                    if failure[:2] == (name, self.calls[name]):
                        self._failures.remove(failure)
                        return self._failed(CUresult[failure[2]])
                if self._initialised is False and name not in ("cuInit", "cuGetErrorString"):
                    return self._failed(CUresult.CUDA_ERROR_NOT_INITIALIZED)
                if name not in FREE and not self._stack():
                    self.problems.append(f"{name} without a context")
                    return self._failed(CUresult.CUDA_ERROR_INVALID_CONTEXT)
                try:
                    result = value(*arguments)
                except Failure as failure:
                    return self._failed(failure.code)
                return (
                    CUresult.CUDA_SUCCESS,
                    *(result if isinstance(result, tuple) else (result,) * (result is not None)),
                )

        return function

    def _failed(self, code: CUresult) -> tuple[Any, ...]:
        return (code, None)

    def _stack(self) -> list[int]:
        if not hasattr(self._current, "stack"):
            self._current.stack = []
        return self._current.stack

    def _handle(self, kind: str = "") -> Handle:
        self._next += 0x10
        if kind:
            self.live[kind].add(self._next)
        return Handle(self._next)

    def _end(self, kind: str, handle: Any) -> None:
        if int(handle) not in self.live[kind]:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        self.live[kind].discard(int(handle))

    def _give(self, stream: Any, work: Callable[[], None]) -> None:
        if int(stream) not in self.streams:
            self.problems.append("work for a stream that is destroyed")
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        queue = self.streams[int(stream)]
        queue.work.append(work)
        queue.given += 1

    def _drain(self, stream: int, until: int | None = None) -> None:
        queue = self.streams.get(stream)
        while queue is not None and queue.work and (until is None or queue.done < until):
            queue.done += 1
            queue.work.popleft()()

    def _check(self, address: int, count: int, what: str) -> None:
        for begin, (_, length, _) in self.allocated.items():
            if begin <= address and address + count <= begin + length:
                return
        self.problems.append(f"{what}: {count} bytes at {address:#x} are not allocated")
        raise Failure(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)

    def _pinned(self, address: int) -> bool:
        return any(
            begin <= address < begin + length for begin, (_, length, kind) in self.allocated.items() if kind == "host"
        )

    # -- devices and contexts ------------------------------------------------------------------------------------------

    def cuInit(self, flags: int) -> None:
        if not self.devices:
            raise Failure(CUresult.CUDA_ERROR_NO_DEVICE)
        self._initialised = True

    def cuGetErrorString(self, code: Any) -> bytes:
        return str(code.name).removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode()

    def cuDeviceGetCount(self) -> int:
        return self.devices

    def cuDeviceGet(self, ordinal: int) -> Handle:
        return Handle(ordinal)

    def cuDeviceGetName(self, length: int, device: Any) -> bytes:
        return b"Fake GPU".ljust(length, b"\0")

    def cuDeviceTotalMem(self, device: Any) -> int:
        return self.memory

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: Any) -> int:
        name = attribute.name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        return {
            "CLOCK_RATE": 1_980_000, "MULTIPROCESSOR_COUNT": 132, "MEMORY_CLOCK_RATE": 3_201_000,
            "GLOBAL_MEMORY_BUS_WIDTH": 6016, "L2_CACHE_SIZE": 1 << 16, "COMPUTE_CAPABILITY_MAJOR": self.capability[0],
            "COMPUTE_CAPABILITY_MINOR": self.capability[1], "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
            "MEMORY_POOLS_SUPPORTED": int(self.pools_supported),
        }[name]  # fmt: skip

    def cuDevicePrimaryCtxRetain(self, device: Any) -> Handle:
        self.retained += 1
        return Handle(0xC0)

    def cuDevicePrimaryCtxRelease(self, device: Any) -> None:
        self.retained -= 1

    def cuCtxPushCurrent(self, context: Any) -> None:
        if not self.retained:
            raise Failure(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._stack().append(int(context))

    def cuCtxPopCurrent(self) -> Handle:
        return Handle(self._stack().pop())

    def cuCtxSynchronize(self) -> None:
        self._drain_all()

    def _drain_all(self) -> None:
        for stream in list(self.streams):
            self._drain(stream)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _allocate(self, count: int, kind: str) -> Handle:
        used = sum(length for _, length, _ in self.allocated.values())
        if not count:
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        if used + count > self.memory:
            raise Failure(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        buffer = (ctypes.c_uint8 * (count + 256))()
        ctypes.memset(buffer, 0xA5, count + 256)
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self.allocated[address] = buffer, count, kind
        return Handle(address)

    def _free(self, address: Any, *kinds: str) -> None:
        if int(address) not in self.allocated or self.allocated[int(address)][2] not in kinds:
            self.problems.append(f"{int(address):#x} is freed, but was not allocated so")
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        del self.allocated[int(address)]

    def cuMemGetInfo(self) -> tuple[int, int]:
        return self.memory - sum(length for _, length, _ in self.allocated.values()), self.memory

    def cuMemAlloc(self, count: int) -> Handle:
        return self._allocate(count, "device")

    def cuMemFree(self, address: Any) -> None:
        self._drain_all()
        self._free(address, "device", "pool")

    def cuMemHostAlloc(self, count: int, flags: int) -> Handle:
        return self._allocate(count, "host")

    def cuMemFreeHost(self, address: Any) -> None:
        self._drain_all()
        self._free(address, "host")

    def cuMemPoolCreate(self, properties: CUmemPoolProps) -> Handle:
        assert properties.location.type == 1
        return self._handle("pool")

    def cuMemPoolSetAttribute(self, pool: Any, attribute: Any, value: Handle) -> None:
        assert isinstance(value, Handle)

    def cuMemPoolDestroy(self, pool: Any) -> None:
        self._end("pool", pool)

    def cuMemAllocFromPoolAsync(self, count: int, pool: Any, stream: Any) -> Handle:
        return self._allocate(count, "pool")

    def cuMemFreeAsync(self, address: Any, stream: Any) -> None:
        self._give(stream, lambda: self._free(address, "pool"))

    def cuMemcpyHtoDAsync(self, target: Any, source: int, count: int, stream: Any) -> None:
        if self._pinned(source):
            self._give(stream, lambda: self._copy(target, source, count))
        else:
            data = ctypes.string_at(source, count)
            self._give(stream, lambda: self._store(target, data))

    def _store(self, target: Any, data: bytes) -> None:
        self._check(int(target), len(data), "copy to the device")
        ctypes.memmove(int(target), data, len(data))

    def _copy(self, target: Any, source: Any, count: int) -> None:
        self._check(int(target), count, "copy")
        self._check(int(source), count, "copy")
        ctypes.memmove(int(target), int(source), count)

    def cuMemcpyDtoHAsync(self, target: int, source: Any, count: int, stream: Any) -> None:
        if self._pinned(target):
            self._give(stream, lambda: self._copy(target, source, count))
            return
        self._drain(int(stream))
        self._check(int(source), count, "copy to the host")
        ctypes.memmove(target, int(source), count)

    def cuMemcpyDtoDAsync(self, target: Any, source: Any, count: int, stream: Any) -> None:
        self._give(stream, lambda: self._copy(target, source, count))

    def cuMemsetD8Async(self, target: Any, value: int, count: int, stream: Any) -> None:
        self._give(stream, lambda: self._store(target, bytes([value]) * count))

    def cuPointerGetAttribute(self, attribute: Any, address: Any) -> int:
        if attribute is CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            return self.ordinal_of_pointers
        if not self._pinned(int(address)):
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)  # of memory that the driver does not know
        return 1

    # -- streams and events --------------------------------------------------------------------------------------------

    def cuStreamCreate(self, flags: int) -> Handle:
        handle = self._handle()
        self.streams[handle] = Stream()
        return handle

    def cuStreamDestroy(self, stream: Any) -> None:
        self._drain(int(stream))
        if self.streams.pop(int(stream), None) is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)

    def cuStreamSynchronize(self, stream: Any) -> None:
        if int(stream) not in self.streams:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        self._drain(int(stream))

    def cuStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        other, position = self.events[int(event)]
        self._give(stream, lambda: self._drain(other, position))

    def cuEventCreate(self, flags: int) -> Handle:
        return self._handle("event")

    def cuEventDestroy(self, event: Any) -> None:
        self._end("event", event)

    def cuEventRecord(self, event: Any, stream: Any) -> None:
        if int(stream) not in self.streams:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        self.events[int(event)] = int(stream), self.streams[int(stream)].given

    def cuEventSynchronize(self, event: Any) -> None:
        self._drain(*self.events[int(event)])

    def cuEventElapsedTime(self, begin: Any, end: Any) -> float:
        (stream, first), (other, last) = self.events[int(begin)], self.events[int(end)]
        assert stream == other and self.streams[stream].done >= last, "an event that has not happened"
        return 0.001 * (last - first)

    # -- code ----------------------------------------------------------------------------------------------------------

    def cuModuleLoadData(self, content: bytes) -> Handle:
        words = content.rstrip(b"\0").decode(errors="replace").split()
        if words[:1] != ["FAKE"]:
            raise Failure(CUresult.CUDA_ERROR_INVALID_IMAGE)
        major, minor = self.capability
        if words[1] == "cubin" and words[2] != f"sm_{major}{minor}" and words[2][:-1] != f"sm_{major}":
            raise Failure(CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU)
        module = self._handle("module")
        self.functions[int(module)] = words[3], int(words[4])
        return module

    def cuModuleGetFunction(self, module: Any, name: bytes) -> Handle:
        if self.functions[int(module)][0].encode() != name:
            raise Failure(CUresult.CUDA_ERROR_NOT_FOUND)
        handle = self._handle()
        self.functions[int(handle)] = self.functions[int(module)]
        return handle

    def cuModuleUnload(self, module: Any) -> None:
        self._end("module", module)

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> None:
        self.most_shared[int(function)] = value

    def _captured(self, config: Any, function: Any, parameters: int) -> dict[str, Any]:
        """A launch with its arguments as they are now."""
        name, count = self.functions[int(function)]
        if config.sharedMemBytes > self.most_shared.get(int(function), 48 << 10):
            raise Failure(CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)
        pointers = (ctypes.c_void_p * count).from_address(parameters)
        arguments = [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]
        assert (config.gridDimY, config.gridDimZ, config.blockDimY, config.blockDimZ) == (1, 1, 1, 1)
        return {
            "kernel": name, "grid": config.gridDimX, "threads": config.blockDimX, "shared": config.sharedMemBytes,
            "cluster": 1, "arguments": arguments,
        }  # fmt: skip

    def _launch(self, what: dict[str, Any], stream: Any, graph: bool) -> None:
        launched = Launched(**what, stream=int(stream), graph=graph)
        self.launched.append(launched)
        kernel = self.kernels.get(launched.kernel)
        if kernel is not None:
            self._give(stream, lambda: kernel(launched.arguments, launched.grid))

    def cuLaunchKernelEx(self, config: CUlaunchConfig, function: Any, parameters: int, extra: int) -> None:
        what = self._captured(config, function, parameters)
        for attribute in config.attrs[: config.numAttrs]:
            assert attribute.id == CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            what["cluster"] = attribute.value.clusterDim.x
        self._launch(what, config.hStream, False)

    def cuGraphCreate(self, flags: int) -> Handle:
        handle = self._handle("graph")
        self.graphs[int(handle)] = []
        return handle

    def cuGraphAddKernelNode(self, graph: Any, before: list[Any], count: int, parameters: Any) -> Handle:
        nodes = self.graphs[int(graph)]
        assert [int(node) for node in before] == nodes[-1:] and count == len(before), "not a chain"
        handle = self._handle()
        self.nodes[int(handle)] = self._captured(parameters, parameters.func, parameters.kernelParams)
        nodes.append(int(handle))
        return handle

    def cuGraphKernelNodeSetAttribute(self, node: Any, kind: Any, value: Any) -> None:
        assert kind == CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        self.nodes[int(node)]["cluster"] = value.clusterDim.x

    def cuGraphInstantiate(self, graph: Any, flags: int) -> Handle:
        handle = self._handle("executable")
        self.graphs[int(handle)] = self.graphs[int(graph)]
        return handle

    def cuGraphExecKernelNodeSetParams(self, executable: Any, node: Any, parameters: Any) -> None:
        assert int(node) in self.graphs[int(executable)]
        cluster = self.nodes[int(node)]["cluster"]
        self.nodes[int(node)] = self._captured(parameters, parameters.func, parameters.kernelParams)
        self.nodes[int(node)]["cluster"] = cluster

    def cuGraphLaunch(self, executable: Any, stream: Any) -> None:
        if int(executable) not in self.live["executable"]:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        for node in self.graphs[int(executable)]:
            self._launch(dict(self.nodes[node]), stream, True)

    def cuGraphExecDestroy(self, executable: Any) -> None:
        self._end("executable", executable)

    def cuGraphDestroy(self, graph: Any) -> None:
        self._end("graph", graph)


class Failure(Exception):
    """What a function answers instead of success."""

    def __init__(self, code: CUresult) -> None:
        super().__init__(code.name)
        self.code = code


FREE = frozenset(
    (
        "cuInit", "cuGetErrorString", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem",
        "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease", "cuCtxPushCurrent",
    )
)  # fmt: skip
"""Functions that need no context."""

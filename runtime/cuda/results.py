"""Results that stay on the GPU: arrays which PyTorch, CuPy, JAX and others take without a copy."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from .. import dlpack
from ..dtypes import numpy_dtype
from ..plan_check import nbytes
from .driver import Driver, DriverError
from .memory import Memory
from .streams import LEGACY_DEFAULT, Stream
from .tensors import CUDA

_CODES = {"bfloat16": 4, "bool": 6}  # of DLPack, for the dtypes that not every numpy exports


class ResultPool:
    """Memory for results, allocated and freed in the order of streams and kept by the driver for the next ones.

    Results are freed in the order of ``home``, a stream of the pool's own, as they may outlive the stream that wrote
    them.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._pool: Any = None
        self.home = Stream(memory.context)
        self._alive = 0
        self._closing = False
        self._lock = threading.RLock()
        context = memory.context
        if context.pools:
            try:
                with context as driver:
                    self._pool = _make_pool(driver, context.ordinal)
                    context.enter()
            except BaseException:
                self.close()
                raise

    def allocate(self, count: int, stream: Stream) -> int:
        """Memory that is there for what the stream does next.

        Raises:
            DeviceError: there is not enough.
        """
        if not count:
            return 0
        with self.memory.context as driver:
            try:
                if self._pool is None:
                    address = int(driver("cuMemAlloc", count))
                else:
                    address = int(driver("cuMemAllocFromPoolAsync", count, self._pool, stream.handle))
            except DriverError as error:
                raise self.memory.exhausted(error, count, "a result") from None
        self.memory.hold("results", count)
        with self._lock:
            self._alive += 1
        self.memory.context.enter()
        return address

    def free(self, address: int, count: int, readers: set[int] | None) -> None:
        """Free memory once the given streams are done with it; None where they are not known."""
        if not address:
            return
        self.memory.hold("results", -count)
        context = self.memory.context

        def give_back() -> None:
            driver = context.driver
            try:
                for reader in (readers or set()) - {self.home.number}:
                    _wait(driver, self.home.handle, driver.api.CUstream(reader))
                known = readers is not None
            except DriverError:  # a stream that its owner has destroyed
                known = False
            if not known or self._pool is None:
                driver("cuCtxSynchronize")
            if self._pool is None:
                driver("cuMemFree", address)
            else:
                driver("cuMemFreeAsync", address, self.home.handle)

        context.quietly(give_back)
        with self._lock:
            self._alive -= 1
            self._finish()
        context.leave()

    def close(self) -> None:
        """End the pool when no result is left."""
        with self._lock:
            self._closing = True
            self._finish()

    def _finish(self) -> None:
        if not self._closing or self._alive:
            return
        if self._pool is not None:
            pool, self._pool = self._pool, None
            self.memory.context.quietly(lambda: self.memory.context.driver("cuMemPoolDestroy", pool))
            self.memory.context.leave()
        self.home.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()


def _make_pool(driver: Driver, ordinal: int) -> Any:
    """A pool of the driver's that keeps what is freed."""
    api = driver.api
    properties = api.CUmemPoolProps()
    properties.allocType = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    pool = driver("cuMemPoolCreate", properties)
    keep = api.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    try:
        driver("cuMemPoolSetAttribute", pool, keep, api.cuuint64_t(2**64 - 1))
    except DriverError:
        driver.status("cuMemPoolDestroy", pool)
        raise
    return pool


class DeviceArray:
    """A result in the memory of a GPU: ``torch.from_dlpack(result)``, ``cupy.asarray(result)``, ``result.numpy()``.

    It belongs to the caller, also after the model is closed.

    Attributes:
        shape: the sizes.
        dtype: the numpy dtype (for bfloat16, that of ml_dtypes).
        nbytes: bytes.
    """

    def __init__(self, pool: ResultPool, stream: Stream, name: str, shape: tuple[int, ...]) -> None:
        """Allocate memory for what a stream is about to write.

        Args:
            pool: of the model.
            stream: that writes it. If it is not a caller's, what it does is done before the caller gets the array.
            name: of the dtype.
            shape: the sizes.
        """
        self.shape = shape
        self.dtype = numpy_dtype(name)
        self.nbytes = nbytes(name, shape)
        self._name = name
        self._pool = pool
        self._context = pool.memory.context
        self._stream = pool.home if stream.ours else stream
        self._readers: set[int] | None = {self._stream.number}
        self.address = 0
        self.address = pool.allocate(self.nbytes, stream)

    def numpy(self) -> np.ndarray:
        """A copy in host memory, when the stream that writes it is done."""
        array = np.empty(self.shape, self.dtype)
        with self._context as driver:
            if self.nbytes:
                driver("cuMemcpyDtoHAsync", array.ctypes.data, self.address, self.nbytes, self._stream.handle)
            driver("cuStreamSynchronize", self._stream.handle)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array in a GPU's memory cannot be viewed from the host without a copy")
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def copy(self) -> DeviceArray:
        """Another array with the same content."""
        other = DeviceArray(self._pool, self._stream, self._name, self.shape)
        if self.nbytes:
            with self._context as driver:
                driver("cuMemcpyDtoDAsync", other.address, self.address, self.nbytes, self._stream.handle)
                if self._stream.ours:
                    driver("cuStreamSynchronize", self._stream.handle)
        return other

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._context.ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export, for work in the given stream, which waits for the one that writes the array."""
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__() or copy:
            raise BufferError("this array is exported where it lies, without a copy")
        reader = LEGACY_DEFAULT if stream is None else stream
        if reader == -1:
            self._readers = None  # who takes it synchronises by other means
        else:
            if self._readers is not None:
                self._readers.add(reader)
            if reader != self._stream.number:
                with self._context as driver:
                    _wait(driver, driver.api.CUstream(reader), self._stream.handle)
        return _capsule(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self._name == "bfloat16":
            raise AttributeError("the CUDA array interface has no bfloat16; use DLPack")
        self._readers = None
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self._stream.number,
            "version": 3,
        }

    def __del__(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            self._pool.free(address, self.nbytes, self._readers)

    def __repr__(self) -> str:
        return f"<{self._name}[{', '.join(map(str, self.shape))}] on {self._context.name}>"


def _wait(driver: Any, waiting: Any, done: Any) -> None:
    """Make a stream wait for what another one has been given so far."""
    event = driver("cuEventCreate", driver.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
    try:
        driver("cuEventRecord", event, done)
        driver("cuStreamWaitEvent", waiting, event, 0)
    finally:
        driver("cuEventDestroy", event)


class _Memory:
    """The memory of an array as numpy describes it. Numpy never reads it, and keeps the array alive."""

    def __init__(self, array: DeviceArray, kind: str) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3, "shape": array.shape, "typestr": kind, "data": (array.address, False), "strides": None,
        }  # fmt: skip


def _capsule(array: DeviceArray) -> Any:
    """``DLManagedTensor`` in a capsule.

    Numpy makes it, of what it takes for host memory, and the device is written over that. Who takes a tensor may let go
    of it while an error is being raised or after Python has ended, where functions of C can be called and ours cannot.
    """
    code = _CODES.get(array.dtype.name)
    kind = array.dtype.str if code is None else f"<u{array.dtype.itemsize}"
    capsule = np.asarray(_Memory(array, kind)).__dlpack__()
    tensor = dlpack.DLTensor.from_address(dlpack.get_pointer(capsule, b"dltensor"))
    tensor.device_type, tensor.device_id = array.__dlpack_device__()
    tensor.data, tensor.byte_offset = array.address, 0
    if code is not None:
        tensor.code = code
    return capsule

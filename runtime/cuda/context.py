"""A GPU's primary context: the one that PyTorch and other users of the CUDA runtime in this process work in, too."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from ..gpus import Gpu
from .driver import Driver, DriverError, open_driver


class Context:
    """The primary context of a GPU; ``with context:`` makes it the current one.

    What lives in the context (memory, streams, modules) is counted. The context is let go of when it was closed, or
    when this object ends, and nothing is left in it: whatever order the garbage collector ends objects in.

    Attributes:
        driver: to call.
        ordinal: number of the GPU.
        gpu: what it is.
        pools: whether memory can be allocated in the order of a stream.
    """

    def __init__(self, ordinal: int) -> None:
        """Retain the context.

        Raises:
            UsageError: no driver, no such GPU, or a forked process.
            DriverError: the context cannot be made.
        """
        driver = open_driver()
        self.driver = driver
        self.ordinal = ordinal
        self.owner = os.getpid()
        count = driver("cuDeviceGetCount")
        if ordinal >= count:
            there = (
                f"this machine has cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}" if count else "there is none"
            )
            raise UsageError(f"there is no GPU cuda:{ordinal}; {there}")
        device = driver("cuDeviceGet", ordinal)
        self.gpu = describe(driver, device)
        attribute = driver.api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED
        self.pools = bool(driver("cuDeviceGetAttribute", attribute, device))
        self.handle = driver("cuDevicePrimaryCtxRetain", device)
        self._device = device
        self._inside = 0
        self._closing = self._released = False
        self._lock = threading.RLock()  # the garbage collector may end an object while one is made

    @property
    def name(self) -> str:
        """As ``load(device=...)`` takes it."""
        return f"cuda:{self.ordinal}"

    def __enter__(self) -> Driver:
        if os.getpid() != self.owner:
            raise UsageError(
                "a model on a GPU belongs to the process that loaded it and cannot be used after a fork; load it "
                "in the child, from a parent that does not use CUDA"
            )
        self.driver("cuCtxPushCurrent", self.handle)
        return self.driver

    def __exit__(self, *_: object) -> None:
        self.driver.api.cuCtxPopCurrent()  # an error here would hide the one that destroyed the context

    def enter(self) -> None:
        """Count something that lives in the context."""
        with self._lock:
            self._inside += 1

    def leave(self) -> None:
        """The counterpart of :meth:`enter`."""
        with self._lock:
            self._inside -= 1
            self._finish()

    def close(self) -> None:
        """Let go of the context as soon as nothing is left in it."""
        with self._lock:
            self._closing = True
            self._finish()

    def _finish(self) -> None:
        if self._closing and not self._inside and not self._released:
            self._released = True
            if os.getpid() == self.owner:
                self.driver.status("cuDevicePrimaryCtxRelease", self._device)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def quietly(self, action: Callable[[], Any]) -> None:
        """Do something in the context when things end: nothing in a forked child, and no error for what is gone."""
        if os.getpid() != self.owner:
            return
        try:
            with self:
                action()
        except DriverError:
            pass  # a failed launch destroys the context and all that is in it


def describe(driver: Driver, device: Any) -> Gpu:
    """What a GPU is, by its handle."""
    kinds = driver.api.CUdevice_attribute

    def attribute(name: str) -> int:
        return int(driver("cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    # GPUs that share the host's memory report no rates of it: those of LPDDR5X, as the cost model divides by them.
    bandwidth = 2e3 * attribute("MEMORY_CLOCK_RATE") * attribute("GLOBAL_MEMORY_BUS_WIDTH") / 8
    return Gpu(
        name=driver("cuDeviceGetName", 256, device).split(b"\0")[0].decode(),
        major=attribute("COMPUTE_CAPABILITY_MAJOR"),
        minor=attribute("COMPUTE_CAPABILITY_MINOR"),
        multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        clock=1e3 * attribute("CLOCK_RATE") or 1.5e9,
        bandwidth=bandwidth or 2.7e11,
        memory=int(driver("cuDeviceTotalMem", device)),
        shared_limit=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        cache=attribute("L2_CACHE_SIZE"),
    )

"""Memory of a GPU: blocks that know what they are for, so that running out of it can be explained."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..errors import DeviceError
from .context import Context
from .driver import Driver, DriverError

STAGING = 16 << 20
"""Bytes of each of the two page-locked buffers that weights pass through."""


class Block:
    """Memory of the device, for ``what``; freed by :meth:`free` or with this object. Empty blocks are at address 0."""

    def __init__(self, memory: Memory, address: int, count: int, what: str) -> None:
        self.address = address
        self.bytes = count
        self.what = what
        self._memory = memory

    def free(self) -> None:
        """Give it back, once everything that uses it is done; twice does nothing."""
        if self.address:
            address, self.address = self.address, 0
            self._memory.release(address, self)

    def __del__(self) -> None:
        self.free()


class Memory:
    """What one model holds of a GPU's memory."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._held: dict[str, int] = {}
        self._lock = threading.RLock()  # the garbage collector may free a block while one is allocated

    def allocate(self, count: int, what: str) -> Block:
        """Uninitialised memory that begins at a multiple of 256.

        Args:
            count: bytes.
            what: it is for, in the plural: ``"the weights"``.

        Raises:
            DeviceError: there is not enough; says how much was needed and what the model holds.
        """
        if not count:
            return Block(self, 0, 0, what)
        with self.context as driver:
            try:
                address = int(driver("cuMemAlloc", count))
            except DriverError as error:
                raise self.exhausted(error, count, what) from None
        self.context.enter()
        self.hold(what, count)
        return Block(self, address, count, what)

    def release(self, address: int, block: Block) -> None:
        """Free a block's memory; blocks do this."""
        self.hold(block.what, -block.bytes)
        self.context.quietly(lambda: self.context.driver("cuMemFree", address))
        self.context.leave()

    def hold(self, what: str, count: int) -> None:
        """Note what is held."""
        with self._lock:
            self._held[what] = self._held.get(what, 0) + count

    def exhausted(self, error: DriverError, count: int, what: str) -> DeviceError:
        """The error to raise for one that the driver gave when asked for memory; call it in the context."""
        if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
            return error
        free, total = self.context.driver("cuMemGetInfo")
        with self._lock:
            held = ", ".join(f"{size(amount)} for {name}" for name, amount in self._held.items() if amount)
        return DeviceError(
            f"{self.context.name} ({self.context.gpu.name}) is out of memory: {size(count)} were needed for {what}, "
            f"{size(free)} of {size(total)} are free; this model holds {held or 'nothing yet'}"
        )


def size(count: int) -> str:
    """A number of bytes as messages show it."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


class Pinned:
    """Page-locked memory of the host, as ``array``: uint8 [bytes]."""

    def __init__(self, context: Context, count: int) -> None:
        self._context = context
        with context as driver:
            try:
                self.address = int(driver("cuMemHostAlloc", count, 0))
            except DriverError as error:
                raise DeviceError(f"{size(count)} of page-locked memory cannot be allocated: {error}") from None
        context.enter()
        self.array = _bytes_at(self.address, count)

    def free(self) -> None:
        """Give it back; twice does nothing."""
        if self.address:
            address, self.address = self.address, 0
            self.array = np.empty(0, np.uint8)
            self._context.quietly(lambda: self._context.driver("cuMemFreeHost", address))
            self._context.leave()

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self.free()


def _bytes_at(address: int, count: int) -> np.ndarray:
    memory: Any = (ctypes.c_uint8 * count).from_address(address)
    return np.frombuffer(memory, np.uint8)


def upload(context: Context, pieces: Iterable[tuple[int, np.ndarray]], chunk: int = STAGING) -> None:
    """Copy arrays of the host (mapped files, say) to the device, through two page-locked buffers in turns.

    While one buffer is on its way to the device, the other is filled.

    Args:
        context: of the device.
        pieces: address on the device, and bytes (uint8).
        chunk: bytes of a buffer.

    Raises:
        DeviceError: a copy fails, or no page-locked memory is left.
    """
    parts = [
        (address + begin, data[begin : begin + chunk])
        for address, data in pieces
        for begin in range(0, len(data), chunk)
    ]
    if not parts:
        return
    largest = max(len(data) for _, data in parts)
    with context as driver, ExitStack() as stack:
        stream = driver("cuStreamCreate", driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        stack.callback(_quiet, driver, "cuStreamDestroy", stream)
        buffers = []
        for _ in range(min(2, len(parts))):
            pinned = Pinned(context, largest)
            stack.callback(pinned.free)
            event = driver("cuEventCreate", driver.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            stack.callback(_quiet, driver, "cuEventDestroy", event)
            buffers.append((pinned, event))
        stack.callback(_quiet, driver, "cuStreamSynchronize", stream)  # first of all: the buffers are in use
        for number, (address, data) in enumerate(parts):
            pinned, event = buffers[number % len(buffers)]
            if number >= len(buffers):
                driver("cuEventSynchronize", event)
            pinned.array[: len(data)] = data
            driver("cuMemcpyHtoDAsync", address, pinned.address, len(data), stream)
            driver("cuEventRecord", event, stream)
        driver("cuStreamSynchronize", stream)


def _quiet(driver: Driver, function: str, handle: Any) -> None:
    driver.status(function, handle)

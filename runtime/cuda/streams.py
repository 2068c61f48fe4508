"""Streams: those of the caller's, and our own."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from .context import Context

LEGACY_DEFAULT = 1
"""How DLPack and the CUDA array interface number the default stream, whose handle is 0."""


class Stream:
    """A stream to work in: ``handle`` for the driver; ``ours`` tells whether it is nobody else's."""

    def __init__(self, context: Context, given: Any = None) -> None:
        """Take the caller's stream, or make one.

        Args:
            context: of the device.
            given: a handle, or an object with ``__cuda_stream__``, ``cuda_stream`` (PyTorch) or ``ptr`` (CuPy).

        Raises:
            UsageError: ``given`` is none of these.
        """
        self.ours = given is None
        self.closed = True  # until it is there
        self._context = context
        self._given = given  # kept alive
        if given is None:
            with context as driver:
                self.handle = driver("cuStreamCreate", driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING)
            context.enter()
        else:
            self.handle = context.driver.api.CUstream(stream_handle(given))
        self.closed = False
        self.number = int(self.handle) or LEGACY_DEFAULT

    def close(self) -> None:
        """Wait for what it does, and destroy it if it is ours; twice does nothing."""
        if self.closed:
            return
        self.closed = True
        driver = self._context.driver
        self._context.quietly(lambda: driver("cuStreamSynchronize", self.handle))
        if self.ours:
            self._context.quietly(lambda: driver("cuStreamDestroy", self.handle))
            self._context.leave()

    def __del__(self) -> None:
        if self.ours:
            self.close()


def stream_handle(given: Any) -> int:
    """The handle of a stream that a caller names.

    Raises:
        UsageError: it is no stream.
    """
    if hasattr(given, "__cuda_stream__"):
        protocol = given.__cuda_stream__
        _, given = protocol() if callable(protocol) else protocol
    else:
        given = getattr(given, "cuda_stream", getattr(given, "ptr", given))
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise UsageError(
            f"stream: expected a handle or an object with __cuda_stream__, cuda_stream or ptr, got {given!r}"
        )
    return given

"""The CUDA driver: its functions with errors raised, and finding it. Nothing else here names ``cuda.bindings``."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

from ..errors import DeviceError, UsageError

MODULE = "cuda.bindings.driver"


class DriverError(DeviceError):
    """A function of the driver failed.

    Attributes:
        function: its name.
        code: the name of the driver's error, such as ``"CUDA_ERROR_OUT_OF_MEMORY"``.
    """

    def __init__(self, function: str, code: str, description: str) -> None:
        super().__init__(f"the CUDA driver answered {function} with {code}: {description}")
        self.function = function
        self.code = code
        self.description = description


class Driver:
    """The bindings (``api``: types and enumerations), and their functions, which raise what they return as errors."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self._functions: dict[str, Any] = {}

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function by its name.

        Returns:
            What it gives besides its status: nothing, a value or a tuple.

        Raises:
            DriverError: the status is not success.
        """
        found = self._functions.get(function)
        if found is None:
            found = self._functions[function] = getattr(self.api, function)
        status, *values = found(*arguments)
        if status:
            raise self.error(function, status)
        return values[0] if len(values) == 1 else tuple(values)

    def status(self, function: str, *arguments: Any) -> Any:
        """Call a function that gives its status alone, which may be other than success, and return that."""
        return getattr(self.api, function)(*arguments)[0]

    def error(self, function: str, status: Any) -> DriverError:
        """The error for a status."""
        code = getattr(status, "name", str(status))
        found, text = self.api.cuGetErrorString(status)
        return DriverError(function, code, text.decode() if not found and text else "unknown error")


@cache
def _initialised() -> tuple[Driver, int]:
    try:
        api = importlib.import_module(MODULE)
    except ImportError as error:
        raise UsageError(
            f"a GPU needs the package cuda-bindings, which cannot be imported ({error}); pip install 'tilewright[cuda]'"
        ) from None
    driver = Driver(api)
    try:
        driver("cuInit", 0)
    except DriverError as error:
        if error.code == "CUDA_ERROR_NO_DEVICE":
            raise UsageError("this machine has no GPU that the NVIDIA driver can use") from None
        raise UsageError(f"the NVIDIA driver does not start: {error.code}, {error.description}") from None
    except (RuntimeError, OSError) as error:  # the bindings find no library
        raise UsageError(f"this machine has no NVIDIA driver: {error}") from None
    return driver, os.getpid()


def open_driver() -> Driver:
    """The driver, initialised.

    Raises:
        UsageError: the bindings or the driver are not installed, there is no GPU, or this process was forked from one
            that uses it.
    """
    driver, owner = _initialised()
    if owner != os.getpid():
        raise UsageError(
            "CUDA cannot be used in this process: it was forked from one that uses CUDA. Start processes with 'spawn' "
            "or 'forkserver', or load models in the children only"
        )
    return driver


def forget() -> None:
    """Find the driver anew when it is next opened; for tests."""
    _initialised.cache_clear()

"""Host values: small tensors kept as Python numbers while an ONNX graph is interpreted.

Exporters spell sizes out as tensor arithmetic (Shape, Gather, Concat, Reshape...). Kept as Python integers, and as
``torch.SymInt`` while exporting, such chains never read tensor data, so ``torch.export`` sees ordinary symbolic sizes.
A ``SymInt`` in a floating-point host value stands for an integer that the float holds exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

LIMIT = 256  # elements; larger values are tensors
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
INTEGERS = {
    torch.int8: (8, True),
    torch.int16: (16, True),
    torch.int32: (32, True),
    torch.int64: (64, True),
    torch.uint8: (8, False),
    torch.uint16: (16, False),
    torch.uint32: (32, False),
    torch.uint64: (64, False),
}
_FLOATS: dict[torch.dtype, Any] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}
DTYPES = frozenset((torch.bool, *INTEGERS, *_FLOATS))


class NotOnHost(Exception):
    """This value cannot be computed from Python numbers; the interpreter uses tensors instead."""


class DataDependent(Exception):
    """A size or an axis was asked of a tensor whose values are known only when the model runs."""


@dataclass(frozen=True, eq=False)
class Host:
    """A small tensor as Python numbers.

    Attributes:
        array: object array of ``int``, ``bool``, ``float`` and their symbolic forms, in the tensor's shape.
        dtype: the tensor's element type.
        stored: the model's own tensor with these values, if it is an initializer.
    """

    array: np.ndarray
    dtype: torch.dtype
    stored: torch.Tensor | None = None

    @staticmethod
    def of(values: Iterable[Any], dtype: torch.dtype, shape: Sequence[int] | None = None) -> Host:
        """From a flat sequence of numbers, as a vector unless a shape is given."""
        flat = list(values)
        array = np.empty(len(flat), dtype=object)
        for index, value in enumerate(flat):
            array[index] = wrap(value, dtype)
        return Host(array if shape is None else array.reshape(tuple(shape)), dtype)

    @staticmethod
    def read(tensor: torch.Tensor) -> Host:
        """From a tensor with real data.

        Raises:
            DataDependent: while exporting, when tensors have no data.
        """
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            raise DataDependent("its value is computed from the model's inputs")
        return Host.of(tensor.detach().flatten().tolist(), tensor.dtype, tensor.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""
        return self.array.shape

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.array.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.array.size

    @property
    def values(self) -> list[Any]:
        """All elements in row-major order."""
        return [self.array[index] for index in np.ndindex(self.shape)]

    @property
    def concrete(self) -> bool:
        """Whether no element is symbolic."""
        return not any(isinstance(value, SYMBOLIC) for value in self.values)

    def item(self) -> Any:
        """The only element."""
        if self.size != 1:
            raise ValueError(f"one number is needed, got a tensor of shape {list(self.shape)}")
        return self.values[0]

    def tensor(self) -> torch.Tensor:
        """As a tensor on the CPU."""
        if self.stored is not None:
            return self.stored
        values = self.values
        if not values:
            return torch.zeros(self.shape, dtype=self.dtype)
        if self.concrete:
            if all(value == values[0] for value in values):
                return torch.full(self.shape, values[0], dtype=self.dtype)
            return torch.tensor(self.array.tolist(), dtype=self.dtype)
        parts = [torch.full((), _plain(value), dtype=self.dtype) for value in values]
        return parts[0].reshape(self.shape) if len(parts) == 1 else torch.stack(parts).reshape(self.shape)


def wrap(value: Any, dtype: torch.dtype) -> Any:
    """A number as its element type holds it: integers wrap around, floats are rounded.

    Raises:
        NotOnHost: a symbolic number that is not an integer.
    """
    if isinstance(value, torch.SymFloat) or (isinstance(value, torch.SymBool) and dtype != torch.bool):
        raise NotOnHost
    if isinstance(value, SYMBOLIC):
        return value
    if dtype == torch.bool:
        return bool(value)
    if dtype in INTEGERS:
        bits, signed = INTEGERS[dtype]
        low = -(1 << (bits - 1)) if signed else 0
        return (int(value) - low) % (1 << bits) + low
    if dtype in _FLOATS:
        with np.errstate(over="ignore"):
            return float(_FLOATS[dtype](value))
    raise NotOnHost


def elementwise(function: Callable[..., Any], *operands: Host, dtype: torch.dtype | None = None) -> Host:
    """Apply a function of numbers with broadcasting; the result has the first operand's type unless one is given.

    Raises:
        NotOnHost: the result is too large.
    """
    dtype = operands[0].dtype if dtype is None else dtype
    shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    if np.prod(shape, dtype=int) > LIMIT:
        raise NotOnHost
    arrays = [np.broadcast_to(operand.array, shape) for operand in operands]
    return Host.of((function(*(a[index] for a in arrays)) for index in np.ndindex(shape)), dtype, shape)


def reduce(function: Callable[[Any, Any], Any], value: Host, axes: Sequence[int], keep: bool, first: Any) -> Host:
    """Reduce axes with a function of two numbers that starts from ``first``."""
    kept = [1 if axis in axes else size for axis, size in enumerate(value.shape)]
    results = []
    for index in np.ndindex(*kept):
        ranges = [range(n) if axis in axes else (index[axis],) for axis, n in enumerate(value.shape)]
        total = first
        for element in itertools.product(*ranges):
            total = wrap(function(total, value.array[element]), value.dtype)
        results.append(total)
    shape = kept if keep else [size for axis, size in enumerate(kept) if axis not in axes]
    return Host.of(results, value.dtype, shape)


def _plain(value: Any) -> Any:
    """A number that ``torch.full`` takes; a symbolic truth value is decided, with a guard."""
    return bool(value) if isinstance(value, torch.SymBool) else value

"""Shortcuts past Triton's semantic checks for the operations that kernels are mostly made of.

They apply where operands have one type already, or one is a Python number that takes the other's type: arithmetic and
comparisons of float32, float64, int32 and int64, masks combined, pointers moved, axes inserted. Anything else goes the
way it went, which takes four times as long.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

Operation = Callable[[Any, Any], Any]

FLOATS = frozenset((tl.float32.name, tl.float64.name))
INTEGERS = frozenset((tl.int32.name, tl.int64.name))
NUMBERS = FLOATS | INTEGERS
MASKS = frozenset((tl.int1.name,))
WHOLE = slice(None)


def _quotient(a: Any, b: Any) -> Any:
    """Integer division that rounds to zero, as C and Triton have it."""
    return (a - np.fmod(a, b)) // b


ARITHMETIC: dict[str, tuple[Operation, frozenset[str]]] = {
    "__add__": (operator.add, NUMBERS),
    "__sub__": (operator.sub, NUMBERS),
    "__mul__": (operator.mul, NUMBERS),
    "__truediv__": (operator.truediv, FLOATS),
    "__floordiv__": (_quotient, INTEGERS),
    "__mod__": (np.fmod, INTEGERS),
    "__and__": (operator.and_, MASKS | INTEGERS),
    "__or__": (operator.or_, MASKS | INTEGERS),
}
COMPARISONS: dict[str, Operation] = {
    "__lt__": operator.lt,
    "__le__": operator.le,
    "__gt__": operator.gt,
    "__ge__": operator.ge,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
}


def apply() -> None:
    """Put the shortcuts into ``tl.tensor``, whose methods the interpreter has replaced before."""
    for name, (operation, dtypes) in ARITHMETIC.items():
        _replace(name, _binary(operation, dtypes, None))
        reverse = f"__r{name.removeprefix('__')}"
        _replace(reverse, _binary(_reversed(operation), dtypes, None))
    for name, operation in COMPARISONS.items():
        _replace(name, _binary(operation, NUMBERS, tl.int1))
    _replace("__add__", _move_pointer)
    _replace("__getitem__", _insert_axes)


def _replace(name: str, quick: Callable[[Any, Any], Any]) -> None:
    """Try a function first, and where it gives None what was there before."""
    plain = getattr(tl.tensor, name)

    def method(self: Any, other: Any) -> Any:
        result = quick(self, other)
        return plain(self, other) if result is None else result

    setattr(tl.tensor, name, method)


def _reversed(operation: Operation) -> Operation:
    return lambda a, b: operation(b, a)


def _binary(operation: Operation, dtypes: frozenset[str], result: Any) -> Callable[[Any, Any], Any]:
    """An operation on tensors of one dtype, or on one and a number; gives ``result`` or the operands' dtype."""

    def run(self: Any, other: Any) -> Any:
        name = self.dtype.name
        if name not in dtypes:
            return None
        kind = type(other)
        if kind is tl.constexpr:
            other = other.value
            kind = type(other)
        if kind is tl.tensor:
            if other.dtype.name != name:
                return None
            data = operation(self.handle.data, other.handle.data)
        elif kind is int and name in NUMBERS and -(2**31) <= other < 2**31:
            data = operation(self.handle.data, float(other) if name in FLOATS else other)
        elif kind is float and name in FLOATS:
            data = operation(self.handle.data, other)
        else:
            return None
        dtype = result or self.dtype
        is_block = self.type.is_block() or (kind is tl.tensor and other.type.is_block())
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, data.shape) if is_block else dtype)

    return run


def _move_pointer(self: Any, other: Any) -> Any:
    """A pointer or a block of them, plus a block of offsets in elements."""
    if not self.dtype.is_ptr() or type(other) is not tl.tensor or other.dtype.name not in INTEGERS:
        return None
    size = np.uint64(max(1, self.dtype.element_ty.primitive_bitwidth // 8))
    data = self.handle.data + size * other.handle.data.astype(np.uint64)
    is_block = self.type.is_block() or other.type.is_block()
    return tl.tensor(TensorHandle(data, self.dtype), tl.block_type(self.dtype, data.shape) if is_block else self.dtype)


def _insert_axes(self: Any, key: Any) -> Any:
    """Indexing by ``:`` and ``None`` alone."""
    key = key if type(key) is tuple else (key,)
    if not self.type.is_block() or any(part is not None and part != WHOLE for part in key):
        return None
    data = self.handle.data[key]
    return tl.tensor(TensorHandle(data, self.dtype), tl.block_type(self.dtype, data.shape))

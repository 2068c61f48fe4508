"""Changes to Triton's interpreter (3.6 to 3.9), made once in the worker.

- It patches ``triton.language`` at every launch and every call of a function, a millisecond each: here once.
- It builds types and shapes anew for every value, half of the time that an operation takes: here once for each shape,
  and ``quick`` passes by most of the checks.
- It computes bfloat16 on the raw bits and truncates where a GPU rounds to the nearest: here with ml_dtypes.
- It reduces and scans with a custom function element by element: here whole slices at a time.
- In Triton 3.6 it rounds a fused multiply-add twice.
- It reads and writes any address, and a wrong one ends the process or goes unnoticed: here every access is checked
  against the operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from ml_dtypes import bfloat16
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, ReduceOps, ScanOps, TensorHandle

from . import quick

BFLOAT16 = np.dtype(bfloat16)


class Bounds:
    """Where kernels may read and write: inside of one operand each."""

    def __init__(self) -> None:
        self._starts = self._ends = np.zeros(0, np.uint64)

    def operands(self, spans: Sequence[tuple[int, int]]) -> None:
        """Allow (address, bytes) of each operand, and nothing else."""
        ordered = sorted((start, start + size) for start, size in spans)
        self._starts = np.array([start for start, _ in ordered], np.uint64)
        self._ends = np.array([end for _, end in ordered], np.uint64)

    def check(self, pointers: np.ndarray, mask: np.ndarray, item: int) -> None:
        """Raise IndexError unless every address that the mask lets through lies in an operand."""
        mask = np.asarray(mask)  # Triton 3.6 gives a memoryview for descriptors
        used = pointers if mask.all() else pointers[np.broadcast_to(mask, pointers.shape)]
        if not used.size:
            return
        inside = self._inside(used.min(), used.max(), item)
        if not inside and not self._each_inside(used.ravel(), item):
            raise IndexError("an access out of the bounds of the operands")

    def _inside(self, low: Any, high: Any, item: int) -> bool:
        index = int(np.searchsorted(self._starts, low, "right")) - 1
        return index >= 0 and int(high) + item <= int(self._ends[index])

    def _each_inside(self, pointers: np.ndarray, item: int) -> bool:
        """The same for accesses that lie in several operands, element by element."""
        index = np.searchsorted(self._starts, pointers, "right") - 1
        return bool((index >= 0).all() and (pointers + np.uint64(item) <= self._ends[index]).all())


def apply() -> Bounds:
    """Change the interpreter of this process; returns what says where kernels may read and write."""
    bounds = Bounds()
    np.seterr(all="ignore")  # infinities and NaN are as silent as on a GPU
    _patch_language_once()
    _keep_types()
    quick.apply()
    _check_accesses(bounds)
    _compute_bfloat16()
    _compare_to_bool()
    ReduceOps.generic_reduce = _reduce_slices
    ScanOps.generic_scan = _scan_slices
    if not hasattr(interpreter._interpreter, "fma_fp64"):
        InterpreterBuilder.create_fma = _fma
    interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)  # its result is not looked at
    return bounds


def _patch_language_once() -> None:
    def scope() -> None:
        """Has the globals that say what is to be patched."""

    interpreter._patch_lang(FunctionType(scope.__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: None
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    tl.tensor.__index__ = lambda self: self.handle.data.item()  # Triton 3.6 converts what NumPy 2 refuses


def _keep_types() -> None:
    plain = tl.block_type.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}

    def block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
        key = (element_ty.name, *[size if isinstance(size, int) else size.value for size in shape])
        if key not in types:
            plain(self, element_ty, list(shape))
            sizes = [tl.constexpr(size) for size in self.shape]
            self.tw_shape, self.tw_numel = type(self.shape)(sizes), tl.constexpr(self.numel)
            types[key] = dict(vars(self))
        else:
            self.__dict__.update(types[key])

    scalar_shape, scalar_numel = tl.tuple([]), tl.constexpr(1)

    def tensor(self: Any, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = (type.tw_shape, type.tw_numel) if type.is_block() else (scalar_shape, scalar_numel)

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unlike(self: TritonSemantic, left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        one, other = left.type, right.type
        same = one.shape.values == other.shape.values if one.is_block() and other.is_block() else False
        return (left, right) if same else broadcast(self, left, right)

    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    TritonSemantic.broadcast_impl_value = broadcast_unlike


def _check_accesses(bounds: Bounds) -> None:
    native = interpreter._interpreter

    def load(pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        bounds.check(pointers, mask, dtype.itemsize)
        if dtype == BFLOAT16:
            return native.load(pointers, mask, other.view(np.uint16), np.dtype(np.uint16)).view(BFLOAT16)
        return native.load(pointers, mask, other, dtype)

    def store(pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        bounds.check(pointers, mask, value.dtype.itemsize)
        native.store(pointers, value.view(np.uint16) if value.dtype == BFLOAT16 else value, mask)

    def atomic_rmw(operation: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any) -> np.ndarray:
        bounds.check(pointers, mask, value.dtype.itemsize)
        return native.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(pointers: np.ndarray, compare: np.ndarray, value: np.ndarray, order: Any) -> np.ndarray:
        bounds.check(pointers, np.ones(1, np.bool_), value.dtype.itemsize)
        return native.atomic_cas(pointers, compare, value, order)

    checked = ModuleType("checked_interpreter")
    checked.__dict__.update(vars(native))
    checked.__dict__.update(load=load, store=store, atomic_rmw=atomic_rmw, atomic_cas=atomic_cas)
    interpreter._interpreter = checked


def _compute_bfloat16() -> None:
    plain = interpreter._get_np_dtype
    convert = interpreter._convert_float
    known: dict[str, np.dtype] = {tl.bfloat16.name: BFLOAT16}

    def numpy_dtype(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = plain(scalar)
        return known[scalar.name]

    def cast(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        return TensorHandle(source.data.astype(numpy_dtype(dtype)), dtype.scalar)

    def cast_float(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype, rounding: Any) -> TensorHandle:
        eight_bits = 8 in (source.dtype.scalar.primitive_bitwidth, dtype.scalar.primitive_bitwidth)
        if not eight_bits and rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            return cast(self, source, dtype)
        data = convert(source.data, source.dtype.scalar, dtype.scalar, rounding)
        return TensorHandle(data.view(numpy_dtype(dtype)), dtype.scalar)

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
        left, right = a.data, b.data
        if a.dtype.scalar.is_floating() and a.dtype.scalar.primitive_bitwidth == 8:
            left = convert(left, a.dtype, tl.float16, None).view(np.float16)
            right = convert(right, b.dtype, tl.float16, None).view(np.float16)
        # In float64, rounded once: BLAS libraries add up in an order that depends on where in the block a row lies.
        wide = np.float64 if d.data.dtype == np.float32 else d.data.dtype
        result = np.matmul(left.astype(wide), right.astype(wide)).astype(d.data.dtype)
        return TensorHandle(result + d.data, d.dtype.scalar)

    interpreter._get_np_dtype = numpy_dtype
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = cast_float
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(np.array([value], BFLOAT16), tl.bfloat16)
    InterpreterBuilder.create_dot = dot


def _compare_to_bool() -> None:
    def boolean(compare: Any) -> Any:
        def run(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle) -> TensorHandle:
            return TensorHandle(compare(self, left, right).data.astype(np.bool_), tl.int1)

        return run

    for name, function in list(vars(InterpreterBuilder).items()):
        if name.startswith(("create_icmp", "create_fcmp")):
            setattr(InterpreterBuilder, name, boolean(function))


def _reduce_slices(self: ReduceOps, values: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Reduce with a custom function: neighbours along the axis in pairs, then pairs of those."""
    shape = values[0].handle.data.shape
    flat = self.axis is None
    axis = 0 if flat else self.axis
    parts = [value.handle.data.ravel() if flat else np.moveaxis(value.handle.data, axis, 0) for value in values]
    while len(parts[0]) > 1:
        parts = _combine(self, values, [part[0::2] for part in parts], [part[1::2] for part in parts])
    parts = [part[0] for part in parts]
    if self.keep_dims:
        parts = [part.reshape([1] * len(shape)) if flat else np.expand_dims(part, axis) for part in parts]
    return _tensors(self, values, parts)


def _scan_slices(self: ScanOps, values: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Scan with a custom function: one slice of the axis after the other."""
    parts = [np.moveaxis(value.handle.data, self.axis, 0) for value in values]
    rows = [[part[0] for part in parts]]
    for index in range(1, len(parts[0])):
        combined = _combine(self, values, rows[-1], [part[index] for part in parts])
        rows.append([item.reshape(part[0].shape) for item, part in zip(combined, parts, strict=True)])
    return _tensors(self, values, [np.stack(row, self.axis) for row in zip(*rows, strict=True)])


def _combine(self: Any, values: Sequence[tl.tensor], left: Sequence[Any], right: Sequence[Any]) -> list[np.ndarray]:
    result = self.combine_fn(*_tensors(self, values, left), *_tensors(self, values, right))
    return [item.handle.data for item in (result if isinstance(result, tuple | tl.tuple) else (result,))]


def _tensors(self: Any, values: Sequence[tl.tensor], parts: Sequence[Any]) -> list[tl.tensor]:
    return [self.to_tensor(part, value.dtype) for value, part in zip(values, parts, strict=True)]


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Give x * y + z with the product's error (Dekker 1971); float32 in float64."""
    a, b, c = (item.data.astype(np.float64) for item in (x, y, z))
    product = a * b
    if z.data.dtype == np.float64:
        (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
        error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
        product = np.where(np.isfinite(error), (product + c) + error, product + c)
        return TensorHandle(product, z.dtype.scalar)
    return TensorHandle((product + c).astype(z.data.dtype), z.dtype.scalar)


def _halves(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers of 26 bits whose sum is the value (Veltkamp)."""
    scaled = value * 134217729.0
    high = scaled - (scaled - value)
    return high, value - high

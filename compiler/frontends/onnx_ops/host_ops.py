"""Operators evaluated on Python numbers: the shape arithmetic of exported models. Raise NotOnHost to use tensors."""

from __future__ import annotations

import math
import operator as py
from typing import Any

import numpy as np
import torch

from . import host as h
from .host import LIMIT, SYMBOLIC, Host, NotOnHost
from .registry import Node, axes_of, host_operator, normalize_axis
from .tensors import torch_dtype


def _is_float(value: Host) -> bool:
    return value.dtype.is_floating_point


def _numbers(function: Any) -> Any:
    """A function of plain numbers only; symbolic ones are left to tensors."""

    def apply(*values: Any) -> Any:
        if any(isinstance(value, SYMBOLIC) for value in values):
            raise NotOnHost
        return function(*values)

    return apply


def _divide(a: Any, b: Any) -> Any:
    """C division: integers round towards zero."""
    if isinstance(b, int) and b == 0:
        raise NotOnHost
    # On symbolic sizes each sign leaves a guard, which lets the division be exact.
    negative = bool(a < 0) != bool(b < 0)
    return -(abs(a) // abs(b)) if negative else abs(a) // abs(b) if a < 0 else a // b


def _divide_floats(a: Any, b: Any) -> Any:
    if isinstance(a, SYMBOLIC) or isinstance(b, SYMBOLIC) or b == 0:
        raise NotOnHost
    return a / b


def _whole(value: Any) -> Any:
    """A float as an integer when it is one, so that it can meet symbolic integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _arithmetic(function: Any) -> Any:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, SYMBOLIC) or isinstance(b, SYMBOLIC):
            a, b = _whole(a), _whole(b)
            if isinstance(a, float) or isinstance(b, float):
                raise NotOnHost
        return function(a, b)

    return apply


@host_operator("Add", "Sub", "Mul")
def binary(node: Node, a: Host, b: Host) -> Host:
    """Arithmetic with wrap-around as the type has it."""
    function = {"Add": py.add, "Sub": py.sub, "Mul": py.mul}[node.op_type]
    return h.elementwise(_arithmetic(function), a, b)


@host_operator("Div")
def divide(node: Node, a: Host, b: Host) -> Host:
    """Quotient."""
    return h.elementwise(_divide_floats if _is_float(a) else _divide, a, b)


@host_operator("Mod")
def modulo(node: Node, a: Host, b: Host) -> Host:
    """Remainder, of the divisor's sign, or of the dividend's with fmod."""
    if _is_float(a) or node.get("fmod", 0):
        return h.elementwise(_numbers(math.fmod), a, b)
    if any(not isinstance(v, SYMBOLIC) and v == 0 for v in b.values):
        raise NotOnHost
    return h.elementwise(py.mod, a, b)


@host_operator("Pow")
def power(node: Node, a: Host, b: Host) -> Host:
    """Powers of plain numbers."""

    def apply(x: Any, y: Any) -> Any:
        if (y < 0 and not _is_float(a)) or (x < 0 and not float(y).is_integer()) or (x == 0 and y < 0) or abs(y) > 64:
            raise NotOnHost
        return x**y

    return h.elementwise(_numbers(apply), a, b)


@host_operator("Neg", "Abs", "Sign", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Not", "BitwiseNot")
def unary(node: Node, x: Host) -> Host:
    """Functions of one number."""
    if node.op_type in ("Floor", "Ceil", "Round"):
        rounding = {"Floor": math.floor, "Ceil": math.ceil, "Round": round}[node.op_type]
        return h.elementwise(lambda v: v if isinstance(v, SYMBOLIC) else _finite(rounding, v), x)
    if node.op_type == "Neg":
        return h.elementwise(py.neg, x)
    if node.op_type == "Abs":
        return h.elementwise(lambda v: -v if v < 0 else v, x)
    if node.op_type == "Not":
        return h.elementwise(lambda v: torch.sym_not(v) if isinstance(v, SYMBOLIC) else not v, x)
    if node.op_type == "Sqrt":
        return h.elementwise(_numbers(lambda v: math.sqrt(v) if v >= 0 else math.nan), x)
    if node.op_type == "Reciprocal":
        return h.elementwise(lambda v: _divide_floats(1.0, v), x)
    if node.op_type == "Sign":
        return h.elementwise(_numbers(lambda v: (v > 0) - (v < 0)), x)
    return h.elementwise(_numbers(lambda v: ~v), x)


def _finite(function: Any, value: float) -> float:
    return function(value) if math.isfinite(value) else value


@host_operator("Min", "Max")
def extremum(node: Node, *values: Host) -> Host:
    """Smallest or largest of several."""

    def pick(a: Any, b: Any) -> Any:
        if a != a or b != b:
            return math.nan
        return (torch.sym_min if node.op_type == "Min" else torch.sym_max)(a, b)

    result = values[0]
    for value in values[1:]:
        result = h.elementwise(_arithmetic(pick), result, value)
    return result


@host_operator("Sum")
def total(node: Node, *values: Host) -> Host:
    """Sum of several."""
    result = values[0]
    for value in values[1:]:
        result = h.elementwise(_arithmetic(py.add), result, value)
    return result


_COMPARISONS = {"Equal": py.eq, "Less": py.lt, "Greater": py.gt, "LessOrEqual": py.le, "GreaterOrEqual": py.ge}


@host_operator(*_COMPARISONS)
def compare(node: Node, a: Host, b: Host) -> Host:
    """Relations."""
    return h.elementwise(_arithmetic(_COMPARISONS[node.op_type]), a, b, dtype=torch.bool)


@host_operator("And", "Or", "Xor")
def logical(node: Node, a: Host, b: Host) -> Host:
    """Truth values; symbolic ones are decided, with a guard."""
    function = {"And": py.and_, "Or": py.or_, "Xor": py.xor}[node.op_type]
    return h.elementwise(lambda x, y: function(bool(x), bool(y)), a, b)


@host_operator("Where")
def where(node: Node, condition: Host, a: Host, b: Host) -> Host:
    """Choice; a symbolic condition is decided, with a guard."""
    return h.elementwise(lambda c, x, y: x if bool(c) else y, condition, a, b, dtype=a.dtype)


@host_operator("Cast", "CastLike")
def cast(node: Node, x: Host, like: Host | None = None) -> Host:
    """Another element type; floats are cut towards zero."""
    dtype = like.dtype if like is not None else torch_dtype(node.get("to"))
    if dtype not in h.DTYPES:
        raise NotOnHost

    def apply(value: Any) -> Any:
        if dtype == torch.bool:
            return value != 0
        if isinstance(value, float) and dtype in h.INTEGERS and not math.isfinite(value):
            raise NotOnHost
        return value

    return h.elementwise(apply, x, dtype=dtype)


@host_operator("Identity", "Dropout")
def identity(node: Node, x: Host, *rest: Host) -> Host:
    """The value itself."""
    if len(node.outputs) > 1:
        raise NotOnHost
    return x


@host_operator("Size")
def size(node: Node, x: Host) -> Host:
    """Number of elements."""
    return Host.of([x.size], torch.int64, ())


@host_operator("Concat")
def concat(node: Node, *values: Host) -> Host:
    """Joined along an axis."""
    axis = normalize_axis(node.get("axis"), values[0].rank)
    if sum(value.size for value in values) > LIMIT:
        raise NotOnHost
    return Host(np.concatenate([value.array for value in values], axis=axis), values[0].dtype)


@host_operator("Gather")
def gather(node: Node, data: Host, indices: Host) -> Host:
    """Elements or slices by index."""
    axis = normalize_axis(node.get("axis", 0), data.rank)
    chosen = _integers(indices)
    return _array(np.take(data.array, chosen, axis=axis), data)


@host_operator("GatherElements")
def gather_elements(node: Node, data: Host, indices: Host) -> Host:
    """One element per index."""
    axis = normalize_axis(node.get("axis", 0), data.rank)
    return _array(np.take_along_axis(data.array, _integers(indices), axis=axis), data)


@host_operator("ScatterElements")
def scatter_elements(node: Node, data: Host, indices: Host, updates: Host) -> Host:
    """A copy with elements replaced."""
    if node.get("reduction", "none") != "none":
        raise NotOnHost
    result = data.array.copy()
    np.put_along_axis(result, _integers(indices), updates.array, axis=normalize_axis(node.get("axis", 0), data.rank))
    return Host(result, data.dtype)


@host_operator("ScatterND")
def scatter_nd(node: Node, data: Host, indices: Host, updates: Host) -> Host:
    """A copy with elements or slices replaced."""
    if node.get("reduction", "none") != "none":
        raise NotOnHost
    result, where_ = data.array.copy(), _integers(indices)
    for index in np.ndindex(where_.shape[:-1]):
        result[tuple(where_[index])] = updates.array[index]
    return Host(result, data.dtype)


@host_operator("Slice")
def slice_(node: Node, x: Host, *parameters: Host) -> Host:
    """A strided part."""
    starts, ends, axes, steps = slice_parameters(node, x.rank, parameters)
    index: list[slice] = [slice(None)] * x.rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if any(isinstance(value, SYMBOLIC) for value in (start, end, step)):
            raise NotOnHost
        low, high = (0, x.shape[axis]) if step > 0 else (-1, x.shape[axis] - 1)
        bounds = [value + x.shape[axis] if value < 0 else value for value in (start, end)]
        first, last = (min(max(value, low), high) for value in bounds)
        if step < 0:
            first = max(first, 0)
        index[axis] = slice(first, None if last < 0 else last, step)
    return Host(x.array[tuple(index)], x.dtype)


def slice_parameters(node: Node, rank: int, given: tuple[Host | None, ...]) -> tuple[list, list, list[int], list]:
    """Starts, ends, axes and steps of a Slice, from inputs (opset 10) or attributes."""
    starts, ends, axes, steps = [*given, None, None, None, None][:4]
    start_values = starts.values if starts is not None else list(node.get("starts"))
    end_values = ends.values if ends is not None else list(node.get("ends"))
    chosen = axes_of(node, axes, rank)
    chosen = list(range(len(start_values))) if chosen is None else chosen
    return start_values, end_values, chosen, steps.values if steps is not None else [1] * len(start_values)


@host_operator("Reshape")
def reshape(node: Node, x: Host, shape: Host | None = None) -> Host:
    """Another shape of as many elements."""
    sizes = _sizes(shape) if shape is not None else list(node.get("shape"))
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if n == 0 else n for axis, n in enumerate(sizes)]
    return Host(x.array.reshape(sizes), x.dtype)


@host_operator("Flatten")
def flatten(node: Node, x: Host) -> Host:
    """A matrix, split at an axis."""
    axis = node.get("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    return Host(x.array.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])), x.dtype)


@host_operator("Squeeze")
def squeeze(node: Node, x: Host, axes: Host | None = None) -> Host:
    """Without axes of size 1."""
    chosen = axes_of(node, axes, x.rank)
    return _array(x.array.squeeze(None if chosen is None else tuple(chosen)), x)


@host_operator("Unsqueeze")
def unsqueeze(node: Node, x: Host, axes: Host | None = None) -> Host:
    """With new axes of size 1."""
    count = axes.size if axes is not None else len(node.get("axes"))
    return Host(np.expand_dims(x.array, tuple(axes_of(node, axes, x.rank + count) or ())), x.dtype)


@host_operator("Transpose")
def transpose(node: Node, x: Host) -> Host:
    """Permuted axes."""
    return Host(x.array.transpose(node.get("perm")), x.dtype)


@host_operator("Expand")
def expand(node: Node, x: Host, shape: Host) -> Host:
    """Broadcast in both directions."""
    target = np.broadcast_shapes(x.shape, tuple(_sizes(shape)))
    if math.prod(target) > LIMIT:
        raise NotOnHost
    return Host(np.broadcast_to(x.array, target), x.dtype)


@host_operator("Tile")
def tile(node: Node, x: Host, repeats: Host) -> Host:
    """Repeated along each axis."""
    counts = _sizes(repeats)
    if x.size * math.prod(counts) > LIMIT:
        raise NotOnHost
    return Host(np.tile(x.array, counts), x.dtype)


@host_operator("Split")
def split(node: Node, x: Host, sizes: Host | None = None) -> tuple[Host, ...]:
    """Parts along an axis."""
    axis = normalize_axis(node.get("axis", 0), x.rank)
    lengths = split_sizes(node, x.shape[axis], sizes)
    if any(isinstance(length, SYMBOLIC) for length in lengths):
        raise NotOnHost
    borders = np.cumsum(lengths)[:-1]
    return tuple(Host(part, x.dtype) for part in np.split(x.array, borders, axis=axis))


def split_sizes(node: Node, total_size: Any, sizes: Host | None) -> list:
    """Lengths of a Split's parts, from an input, an attribute, or equal ones of which the last may be smaller."""
    if sizes is not None:
        return sizes.values
    if node.get("split") is not None:
        return list(node.get("split"))
    parts = node.get("num_outputs", len(node.outputs))
    length = (total_size + parts - 1) // parts
    return [length] * (parts - 1) + [total_size - length * (parts - 1)]


_REDUCTIONS: dict[str, tuple[Any, Any]] = {
    "ReduceSum": (py.add, 0),
    "ReduceProd": (py.mul, 1),
    "ReduceMax": (torch.sym_max, None),
    "ReduceMin": (torch.sym_min, None),
}


@host_operator(*_REDUCTIONS)
def reduce(node: Node, x: Host, axes: Host | None = None) -> Host:
    """Sum, product or extremum over axes."""
    chosen = axes_of(node, axes, x.rank)
    if not chosen:
        if node.get("noop_with_empty_axes", 0):
            return x
        chosen = list(range(x.rank))
    function, first = _REDUCTIONS[node.op_type]
    if first is None and (
        x.size == 0 or x.dtype == torch.bool or any(v != v for v in x.values if isinstance(v, float))
    ):
        raise NotOnHost
    if x.dtype.is_floating_point and not x.concrete:
        raise NotOnHost
    return h.reduce(lambda a, b: b if a is None else function(a, b), x, chosen, bool(node.get("keepdims", 1)), first)


@host_operator("Range")
def range_(node: Node, start: Host, limit: Host, delta: Host) -> Host:
    """Evenly spaced integers."""
    if not (start.concrete and limit.concrete and delta.concrete) or start.dtype not in h.INTEGERS:
        raise NotOnHost
    values = range(start.item(), limit.item(), delta.item())
    if len(values) > LIMIT:
        raise NotOnHost
    return Host.of(values, start.dtype)


@host_operator("ConstantOfShape")
def constant_of_shape(node: Node, shape: Host) -> Host:
    """A constant of the given shape."""
    if not shape.concrete or math.prod(shape.values) > LIMIT:
        raise NotOnHost
    value = node.get("value")
    if value is None or value.dtype.is_floating_point:
        raise NotOnHost
    return Host.of([value.item()] * math.prod(shape.values), value.dtype, shape.values)


@host_operator("NonZero")
def nonzero(node: Node, x: Host) -> Host:
    """Indices of the elements that are not zero."""
    found = [index for index in np.ndindex(x.shape) if bool(x.array[index] != 0)]
    flat = [index[axis] for axis in range(x.rank) for index in found]
    return Host.of(flat, torch.int64, (x.rank, len(found)))


@host_operator("Compress")
def compress(node: Node, x: Host, condition: Host) -> Host:
    """The slices whose condition holds."""
    keep = [bool(value) for value in condition.values]
    axis = node.get("axis")
    data = x.array.reshape(-1) if axis is None else x.array
    return Host(np.compress(keep, data, axis=0 if axis is None else axis), x.dtype)


@host_operator("CumSum")
def cumsum(node: Node, x: Host, axis: Host) -> Host:
    """Running sum of a vector."""
    if x.rank != 1 or node.get("exclusive", 0) or node.get("reverse", 0) or (_is_float(x) and not x.concrete):
        raise NotOnHost
    results: list[Any] = []
    for value in x.values:
        results.append(results[-1] + value if results else value)
    return Host.of(results, x.dtype)


def _integers(value: Host) -> np.ndarray:
    if not value.concrete:
        raise NotOnHost
    return np.array(value.values, dtype=np.int64).reshape(value.shape)


def _sizes(value: Host) -> list[int]:
    if not value.concrete:
        raise NotOnHost
    return [int(size) for size in value.values]


def _array(result: Any, like: Host) -> Host:
    """Numpy hands back a bare object instead of an object array of rank 0."""
    if not isinstance(result, np.ndarray):
        array = np.empty((), dtype=object)
        array[()] = result
        result = array
    return Host(result, like.dtype)

"""Element-for-element operators: arithmetic, comparisons, functions, conversions, selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...runtime import sizes
from ...runtime.sizes import Size
from ..expr import COMPUTE_DTYPE, Expr
from ..registry import Region, lowers, overloads
from ..values import Value, broadcast, dtype_name

aten = torch.ops.aten


def _promoted(node: fx.Node) -> str:
    """The dtype in which a node's operands meet, by PyTorch's promotion rules."""
    operands = [_fake(argument) for argument in node.args[:2]]
    return dtype_name(torch.result_type(*operands))


def _fake(argument: Any) -> Any:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if isinstance(value, torch.SymInt):
        return 1
    return 1.0 if isinstance(value, torch.SymFloat) else value


def _binary(op: str) -> Callable[..., Value]:
    def build(region: Region, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
        dtype = region.dtype(node)
        compute = COMPUTE_DTYPE.get(dtype, dtype)

        def combine(x: Expr, y: Expr) -> Expr:
            if alpha != 1:
                y = region.builder.call("mul", compute, y, region.number(alpha, compute))
            return region.builder.call(op, compute, x, y)

        operands = [region.value(a, dtype), region.value(b, dtype)]
        return region.pointwise(region.shape(node), dtype, operands, combine, compute)

    return build


for _op, _names in {
    "add": ("add.Tensor", "add.Scalar"),
    "sub": ("sub.Tensor", "sub.Scalar"),
    "mul": ("mul.Tensor", "mul.Scalar"),
    "maximum": ("maximum",),
    "minimum": ("minimum",),
    "pow": ("pow.Tensor_Tensor", "pow.Scalar"),
    "atan2": ("atan2",),
    "fmod": ("fmod.Tensor", "fmod.Scalar"),
    "remainder": ("remainder.Tensor", "remainder.Scalar"),
    "bitand": ("bitwise_and.Tensor", "bitwise_and.Scalar", "__and__.Tensor", "__and__.Scalar"),
    "bitor": ("bitwise_or.Tensor", "bitwise_or.Scalar", "__or__.Tensor", "__or__.Scalar"),
    "bitxor": ("bitwise_xor.Tensor", "bitwise_xor.Scalar", "__xor__.Tensor", "__xor__.Scalar"),
    "shl": ("bitwise_left_shift.Tensor", "bitwise_left_shift.Tensor_Scalar", "__lshift__.Scalar", "__lshift__.Tensor"),
    "shr": (
        "bitwise_right_shift.Tensor",
        "bitwise_right_shift.Tensor_Scalar",
        "__rshift__.Scalar",
        "__rshift__.Tensor",
    ),
}.items():
    lowers(*overloads(*_names), role="pointwise")(_binary(_op))


@lowers(*overloads("rsub.Scalar", "rsub.Tensor"), role="pointwise")
def _rsub(region: Region, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _binary("sub")(region, node, b, a) if alpha == 1 else _binary("sub")(region, node, b, a, alpha)


@lowers(*overloads("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode", "floor_divide"), role="pointwise")
def _div(region: Region, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if node.target in overloads("floor_divide"):
        rounding_mode = "floor"
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)

    def combine(x: Expr, y: Expr) -> Expr:
        if rounding_mode == "floor":
            return region.builder.call("floordiv", compute, x, y)
        quotient = region.builder.call("div", compute, x, y)
        if rounding_mode == "trunc" and compute.startswith("float"):
            return region.builder.call("trunc", compute, quotient)
        return quotient

    return region.pointwise(
        region.shape(node), dtype, [region.value(a, dtype), region.value(b, dtype)], combine, compute
    )


@lowers(*overloads("pow.Tensor_Scalar"), role="pointwise")
def _pow_scalar(region: Region, node: fx.Node, a: Any, exponent: Any) -> Value:
    builder = region.builder
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)

    def combine(x: Expr) -> Expr:
        if exponent == 0.5:
            return builder.call("sqrt", compute, x)
        if exponent == -0.5:
            return builder.call("rsqrt", compute, x)
        if exponent in (1, 2, 3, 4, -1, -2):
            result = x
            if abs(exponent) >= 2:
                square = builder.call("mul", compute, x, x)
                result = {2: square, 3: builder.call("mul", compute, square, x)}.get(abs(exponent)) or builder.call(
                    "mul", compute, square, square
                )
            return result if exponent > 0 else builder.call("div", compute, builder.const(1, compute), result)
        if exponent == 0:
            return builder.const(1, compute)
        return builder.call("pow", compute, x, builder.const(exponent, compute))

    return region.pointwise(region.shape(node), dtype, [region.value(a, dtype)], combine, compute)


def _compare(op: str) -> Callable[..., Value]:
    def build(region: Region, node: fx.Node, a: Any, b: Any) -> Value:
        common = _promoted(node)
        compute = COMPUTE_DTYPE.get(common, common)
        operands = [region.value(a, common), region.value(b, common)]
        return region.pointwise(
            region.shape(node), "bool", operands, lambda x, y: region.builder.call(op, "bool", x, y), compute
        )

    return build


for _op in ("lt", "le", "gt", "ge", "eq", "ne"):
    lowers(*overloads(f"{_op}.Tensor", f"{_op}.Scalar"), role="pointwise")(_compare(_op))


def _logical(op: str) -> Callable[..., Value]:
    def build(region: Region, node: fx.Node, *operands: Any) -> Value:
        values = [region.value(operand, "bool") for operand in operands]
        return region.pointwise(
            region.shape(node), "bool", values, lambda *parts: region.builder.call(op, "bool", *parts), "bool"
        )

    return build


for _op in ("and", "or", "xor", "not"):
    lowers(*overloads(f"logical_{_op}"), role="pointwise")(_logical(_op))


@lowers(*overloads("bitwise_not"), role="pointwise")
def _bitwise_not(region: Region, node: fx.Node, a: Value) -> Value:
    dtype = region.dtype(node)
    op = "not" if dtype == "bool" else "bitnot"
    return region.pointwise(region.shape(node), dtype, [a], lambda x: region.builder.call(op, dtype, x), dtype)


def _unary(op: str) -> Callable[..., Value]:
    def build(region: Region, node: fx.Node, a: Value) -> Value:
        dtype = region.dtype(node)
        compute = COMPUTE_DTYPE.get(dtype, dtype)
        return region.pointwise(region.shape(node), dtype, [a], lambda x: region.builder.call(op, compute, x), compute)

    return build


_SAME_NAME = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "erf", "sigmoid", "sin", "cos", "tan", "asin",
    "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "sqrt", "rsqrt", "sign", "silu", "neg", "abs", "square",
)  # fmt: skip
for _op in _SAME_NAME:
    lowers(*overloads(_op), role="pointwise")(_unary(_op))


def _rounding(op: str) -> Callable[..., Value]:
    def build(region: Region, node: fx.Node, a: Value) -> Value:
        return a if not a.dtype.startswith(("float", "bfloat")) else _unary(op)(region, node, a)

    return build


for _op in ("floor", "ceil", "round", "trunc"):
    lowers(*overloads(_op), role="pointwise")(_rounding(_op))


def _formula(make: Callable[..., Expr]) -> Callable[..., Value]:
    """A unary operator with number parameters, written as an expression of (builder, dtype, x, *parameters)."""

    def build(region: Region, node: fx.Node, a: Value, *parameters: Any, **named: Any) -> Value:
        dtype = region.dtype(node)
        compute = COMPUTE_DTYPE.get(dtype, dtype)
        operators = _Operators(region, compute)
        return region.pointwise(
            region.shape(node), dtype, [a], lambda x: make(operators, x, *parameters, **named), compute
        )

    return build


class _Operators:
    """Short forms for writing formulas."""

    def __init__(self, region: Region, dtype: str) -> None:
        self.region = region
        self.builder = region.builder
        self.dtype = dtype

    def __call__(self, op: str, *args: Any) -> Expr:
        operands = tuple(arg if isinstance(arg, Expr) else self.region.number(arg, self.dtype) for arg in args)
        return self.builder.call(
            op, "bool" if op in ("lt", "le", "gt", "ge", "eq", "ne", "isnan") else self.dtype, *operands
        )


@lowers(*overloads("relu"), role="pointwise")
def _relu(region: Region, node: fx.Node, a: Value) -> Value:
    # max(x, 0) would lose a NaN on some machines; comparing with <= keeps it, as PyTorch does.
    return _formula(lambda o, x: o("where", o("le", x, 0), 0, x))(region, node, a)


def _clamp(o: _Operators, x: Expr, low: Any = None, high: Any = None) -> Expr:
    if low is not None:
        x = o("where", o("lt", x, low), low, x)
    if high is not None:
        x = o("where", o("gt", x, high), high, x)
    return x


lowers(*overloads("relu6"), role="pointwise")(_formula(lambda o, x: _clamp(o, x, 0, 6)))
lowers(*overloads("hardtanh"), role="pointwise")(_formula(lambda o, x, low=-1, high=1: _clamp(o, x, low, high)))
lowers(*overloads("clamp", "clip"), role="pointwise")(_formula(lambda o, x, min=None, max=None: _clamp(o, x, min, max)))
lowers(*overloads("clamp_min"), role="pointwise")(_formula(lambda o, x, low: _clamp(o, x, low)))
lowers(*overloads("clamp_max"), role="pointwise")(_formula(lambda o, x, high: _clamp(o, x, None, high)))
lowers(*overloads("hardsigmoid"), role="pointwise")(
    _formula(lambda o, x: o("mul", _clamp(o, o("add", x, 3), 0, 6), 1 / 6))
)
lowers(*overloads("hardswish"), role="pointwise")(
    _formula(lambda o, x: o("mul", x, o("mul", _clamp(o, o("add", x, 3), 0, 6), 1 / 6)))
)
lowers(*overloads("gelu"), role="pointwise")(
    _formula(lambda o, x, approximate="none": o("gelu" if approximate == "none" else "gelu_tanh", x))
)
lowers(*overloads("leaky_relu"), role="pointwise")(
    _formula(lambda o, x, slope=0.01: o("where", o("gt", x, 0), x, o("mul", x, slope)))
)
lowers(*overloads("elu"), role="pointwise")(
    _formula(
        lambda o, x, alpha=1.0, scale=1.0, input_scale=1.0: o(
            "where",
            o("gt", x, 0),
            o("mul", x, scale),
            o("mul", o("expm1", o("mul", x, input_scale)), alpha * scale),
        )
    )
)
lowers(*overloads("selu"), role="pointwise")(
    _formula(
        lambda o, x: o(
            "where",
            o("gt", x, 0),
            o("mul", x, 1.0507009873554805),
            o("mul", o("expm1", x), 1.0507009873554805 * 1.6732632423543772),
        )
    )
)
lowers(*overloads("softplus"), role="pointwise")(
    _formula(
        lambda o, x, beta=1.0, threshold=20.0: o(
            "where", o("gt", o("mul", x, beta), threshold), x, o("div", o("softplus", o("mul", x, beta)), beta)
        )
    )
)
lowers(*overloads("log_sigmoid", "log_sigmoid_forward"), role="pointwise")(
    _formula(lambda o, x: o("neg", o("softplus", o("neg", x))))
)
lowers(*overloads("mish"), role="pointwise")(_formula(lambda o, x: o("mul", x, o("tanh", o("softplus", x)))))
lowers(*overloads("reciprocal"), role="pointwise")(_formula(lambda o, x: o("div", 1, x)))
lowers(*overloads("threshold"), role="pointwise")(
    _formula(lambda o, x, threshold, value: o("where", o("le", x, threshold), value, x))
)
lowers(*overloads("hardshrink"), role="pointwise")(
    _formula(lambda o, x, lambd=0.5: o("where", o("le", o("abs", x), lambd), 0, x))
)
lowers(*overloads("softshrink"), role="pointwise")(
    _formula(
        lambda o, x, lambd=0.5: o(
            "where", o("gt", x, lambd), o("sub", x, lambd), o("where", o("lt", x, -lambd), o("add", x, lambd), 0)
        )
    )
)


@lowers(*overloads("erfc"), role="pointwise")
def _erfc(region: Region, node: fx.Node, a: Value) -> Value:
    return _formula(lambda o, x: o("sub", 1, o("erf", x)))(region, node, a)


def _predicate(make: Callable[..., Expr]) -> Callable[..., Value]:
    def build(region: Region, node: fx.Node, a: Value) -> Value:
        builder = region.builder
        if not a.compute.startswith("float"):
            constant = node.target in overloads("isfinite")
            return region.kernel.constant(constant, "bool", region.shape(node))
        return region.pointwise(region.shape(node), "bool", [a], lambda x: make(builder, x), a.compute)

    return build


lowers(*overloads("isnan"), role="pointwise")(_predicate(lambda b, x: b.call("isnan", "bool", x)))
lowers(*overloads("isinf"), role="pointwise")(
    _predicate(lambda b, x: b.call("eq", "bool", b.call("abs", x.dtype, x), b.const(math.inf, x.dtype)))
)
lowers(*overloads("isfinite"), role="pointwise")(
    _predicate(lambda b, x: b.call("lt", "bool", b.call("abs", x.dtype, x), b.const(math.inf, x.dtype)))
)


@lowers(*overloads("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"), role="pointwise")
def _where(region: Region, node: fx.Node, condition: Value, a: Any, b: Any) -> Value:
    return _select(region, node, condition, region.value(a, region.dtype(node)), region.value(b, region.dtype(node)))


@lowers(*overloads("masked_fill.Scalar", "masked_fill.Tensor"), role="pointwise")
def _masked_fill(region: Region, node: fx.Node, a: Value, mask: Value, value: Any) -> Value:
    return _select(region, node, mask, region.value(value, region.dtype(node)), a)


def _select(region: Region, node: fx.Node, condition: Value, a: Value, b: Value) -> Value:
    shape, dtype = region.shape(node), region.dtype(node)
    wide = [broadcast(value, shape) for value in (condition, a, b)]
    builder = region.builder

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        chosen, x, y = (value.at(index, mask) for value in wide)
        compute = COMPUTE_DTYPE.get(dtype, dtype)
        return builder.call(
            "where", compute, builder.cast(chosen, "bool"), builder.cast(x, compute), builder.cast(y, compute)
        )

    return Value(shape, dtype, at)


@lowers(
    *overloads(
        "_to_copy", "to.dtype", "to.dtype_layout", "to.device", "type_as", "clone", "contiguous", "alias", "detach",
        "lift_fresh_copy", "lift_fresh", "positive", "detach_copy", "to.other",
    ),
    torch.ops.prims.convert_element_type.default,
    role="pointwise",
)  # fmt: skip
def _convert(region: Region, node: fx.Node, a: Value, *args: Any, **kwargs: Any) -> Value:
    dtype = region.dtype(node)
    if a.dtype == dtype:
        return a
    rounds_through = dtype in COMPUTE_DTYPE and COMPUTE_DTYPE[dtype] == a.compute
    if rounds_through:
        # The value stays in float32 inside the kernel; it is rounded when a buffer of the narrow dtype is stored.
        return Value(a.shape, dtype, a.at)
    return region.pointwise(region.shape(node), dtype, [a], lambda x: x, COMPUTE_DTYPE.get(dtype, dtype))


@lowers(*overloads("full", "full_like", "new_full", "scalar_tensor"), role="pointwise")
def _full(region: Region, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    name = str(node.target)
    fill = args[0] if "scalar_tensor" in name else (args[2] if "new_full" in name else args[1])
    return broadcast(region.value(fill, region.dtype(node)), region.shape(node))


@lowers(*overloads("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"), role="pointwise")
def _zeros_or_ones(region: Region, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    number = 1 if "ones" in str(node.target) else 0
    return region.kernel.constant(number, region.dtype(node), region.shape(node))


@lowers(*overloads("empty.memory_format", "empty_like", "new_empty"), role="pointwise")
def _empty(region: Region, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    return region.kernel.constant(0, region.dtype(node), region.shape(node))


@lowers(*overloads("arange", "arange.start", "arange.start_step"), role="pointwise")
def _arange(region: Region, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    start, step = 0, 1
    if len(args) == 2:
        start = args[0]
    elif len(args) >= 3:
        start, step = args[0], args[2]
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    base, stride = region.value(start, compute), region.value(step, compute)

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        position = region.builder.index(index[0], compute)
        scaled = position if step == 1 else region.builder.call("mul", compute, position, stride.at(()))
        return scaled if start == 0 else region.builder.call("add", compute, scaled, base.at(()))

    return Value(region.shape(node), dtype, at)


@lowers(*overloads("linspace"), role="pointwise")
def _linspace(region: Region, node: fx.Node, start: Any, end: Any, steps: Any, **kwargs: Any) -> Value:
    """Steps from the start in the first half and back from the end in the second, so that both ends are exact."""
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    builder, (count,) = region.builder, region.shape(node)
    first, last = region.number(start, compute), region.number(end, compute)
    intervals = builder.index(sizes.maximum(sizes.add(count, -1), 1), compute)
    step = builder.call("div", compute, builder.call("sub", compute, last, first), intervals)

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        forward, backward = (
            builder.call("mul", compute, builder.index(position, compute), step)
            for position in (index[0], sizes.sub(sizes.add(count, -1), index[0]))
        )
        early = builder.call("lt", "bool", builder.index(index[0]), builder.index(sizes.floordiv(count, 2)))
        above, below = builder.call("add", compute, first, forward), builder.call("sub", compute, last, backward)
        return builder.call("where", compute, early, above, below)

    return Value((count,), dtype, at)

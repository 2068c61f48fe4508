"""The C dialect: how types, literals, sizes, operations and reductions are written in C.

Functions named ``tw_<operation>_<type>`` live in ``templates/c/tw_math.h``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ...runtime import sizes
from ...runtime.sizes import Size
from ..operations import FUNCTIONS, INFIX, may_be_negative

TYPES = {
    "float64": "double",
    "float32": "float",
    "int64": "int64_t",
    "int32": "int32_t",
    "int16": "int16_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "bool": "int32_t",
}
STORAGE = TYPES | {"float16": "uint16_t", "bfloat16": "uint16_t", "bool": "uint8_t"}

_SIZE_SIGNS = {
    "add": " + ", "mul": " * ", "floordiv": " / ", "mod": " % ", "eq": " == ", "ne": " != ", "le": " <= ", "lt": " < ",
}  # fmt: skip
_FLOOR = {"floordiv": "tw_floordiv_i64", "mod": "tw_remainder_i64"}
EXPENSIVE = frozenset(FUNCTIONS - {"floor", "ceil", "trunc", "maximum", "minimum", "sign"}) | {"div"}


def size(value: Size) -> str:
    """An index expression in C, whose division rounds towards zero: a numerator that may be negative takes the floor.

    Names stand for loop variables, sizes and checked indices, none of which is negative; divisors are positive.
    """
    if isinstance(value, int):
        return str(value) if abs(value) < 2**31 else f"INT64_C({value})"
    if isinstance(value, str):
        return value
    args = [_operand(arg) for arg in value.args]
    if value.op in ("max", "min"):
        return f"tw_{value.op}_i64({args[0]}, {args[1]})"
    if value.op in _FLOOR and may_be_negative(value.args[0]):
        return f"{_FLOOR[value.op]}({size(value.args[0])}, {size(value.args[1])})"
    return _SIZE_SIGNS[value.op].join(args).replace("+ -", "- ")


def _operand(value: Size) -> str:
    text = size(value)
    compound = isinstance(value, sizes.Op) and value.op not in ("max", "min")
    return f"({text})" if compound else text


def literal(value: Any, dtype: str) -> str:
    """A constant of a computation dtype."""
    if dtype.startswith("float"):
        value = float(value)
        suffix = "f" if dtype == "float32" else ""
        if math.isnan(value):
            return f"(({TYPES[dtype]})NAN)"
        if math.isinf(value):
            return f"({'-' if value < 0 else ''}({TYPES[dtype]})INFINITY)"
        if suffix:
            # The nearest float32, written exactly; a double beyond its range becomes infinite, as in a tensor.
            if abs(value) > 3.4028235677973366e38:
                return literal(math.copysign(math.inf, value), dtype)
            return f"{value:.9g}f" if ("." in f"{value:.9g}" or "e" in f"{value:.9g}") else f"{value:.9g}.0f"
        return repr(value)
    if dtype == "bool":
        return "1" if value else "0"
    value = int(value)
    if value == -(2**63):
        return "INT64_MIN"
    return f"INT64_C({value})" if dtype == "int64" and abs(value) >= 2**31 else str(value)


def from_storage(text: str, dtype: str) -> str:
    """A loaded element as a value of the computation."""
    if dtype == "float16":
        return f"tw_f16_to_f32({text})"
    if dtype == "bfloat16":
        return f"tw_bf16_to_f32({text})"
    return text


def to_storage(text: str, dtype: str, storage: str) -> str:
    """A computed value as it is stored."""
    if storage == "float16":
        return f"tw_f32_to_f16({text})"
    if storage == "bfloat16":
        return f"tw_f32_to_bf16({text})"
    if storage == "bool" and dtype != "bool":
        return f"({text}) != 0"
    return text


def call(op: str, dtype: str, arg_dtypes: list[str], args: list[str]) -> str:
    """One operation on rendered operands."""
    kind = arg_dtypes[-1] if arg_dtypes else dtype
    if op == "cast":
        return _cast(arg_dtypes[0], dtype, args[0])
    if op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if op in INFIX:
        return f"{args[0]} {INFIX[op]} {args[1]}"
    if op == "not":
        return f"!{args[0]}"
    if op == "bitnot":
        return f"~{args[0]}"
    if op == "neg":
        return f"-{args[0]}"
    if op == "div":
        # An integer division by zero must not trap: tw_truncdiv gives 0.
        return (
            f"{args[0]} / {args[1]}"
            if dtype.startswith("float")
            else f"tw_truncdiv_{SUFFIX[dtype]}({args[0]}, {args[1]})"
        )
    if op == "abs":
        if kind.startswith("float"):
            return f"{'fabsf' if kind == 'float32' else 'fabs'}({args[0]})"
        return f"{args[0]} < 0 ? -{args[0]} : {args[0]}"
    if op == "isnan":
        return f"{args[0]} != {args[0]}"
    if op == "square":
        return f"{args[0]} * {args[0]}"
    if op in FUNCTIONS:
        return f"tw_{op}_{SUFFIX[dtype]}({', '.join(args)})"
    raise KeyError(f"the C dialect has no operation {op!r}")


_LIMITS = {
    "int64": ("INT64_MIN", "INT64_MAX"),
    "int32": ("INT32_MIN", "INT32_MAX"),
    "int16": ("INT16_MIN", "INT16_MAX"),
    "int8": ("INT8_MIN", "INT8_MAX"),
    "uint8": ("0", "UINT8_MAX"),
    "bool": ("0", "1"),
}
SUFFIX = {
    "float32": "f32",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "int16": "i32",
    "int8": "i32",
    "uint8": "i32",
}


def _cast(source: str, dtype: str, text: str) -> str:
    if dtype == "bool":
        return f"{text} != 0"
    if source.startswith("float") and not dtype.startswith("float"):
        return (
            f"tw_{SUFFIX[source]}_to_{dtype}({text})"
            if dtype in ("int64", "int32")
            else f"({TYPES[dtype]})(int64_t)({text})"
        )
    return f"({TYPES[dtype]})({text})"


@dataclass
class Reduction:
    """C text of one reduction: declarations, the per-element update, what follows the loops, and the result."""

    declare: list[str]
    result: str
    clause: str = ""
    finish: list[str] = field(default_factory=list)
    initialise: list[str] = field(default_factory=list)
    _update: list[str] = field(default_factory=list)

    def update(self, value: str, position: str) -> list[str]:
        """Statements that take one element in."""
        return [line.replace("@value", value).replace("@position", position) for line in self._update]


def reduction(op: str, dtype: str, name: str, lanes: tuple[str, int] | None = None) -> Reduction:
    """The text for a reduction; with ``lanes`` = (variable, number) one accumulator per lane.

    Maxima and minima propagate NaN as PyTorch does: NaNs are collected beside the accumulator, which keeps the loop a
    plain vector reduction.
    """
    c_type = TYPES[dtype]
    at = f"[{lanes[0]}]" if lanes else ""
    is_float = dtype.startswith("float")
    low, high = (f"(-({c_type})INFINITY)", f"(({c_type})INFINITY)") if is_float else _LIMITS[dtype]
    start = {"sum": "0", "prod": "1", "any": "0", "all": "1", "max": low, "min": high, "argmax": low, "argmin": high}[
        op
    ]

    def declared(variable: str, kind: str, value: str) -> tuple[list[str], list[str]]:
        if lanes:
            return [f"{kind} {variable}[{lanes[1]}] __attribute__((aligned(64)));"], [f"{variable}{at} = {value};"]
        return [f"{kind} {variable} = {value};"], []

    declare, initialise = declared(name, c_type, start)
    result = f"{name}{at}"
    if op in ("sum", "prod", "any", "all"):
        sign = {"sum": "+", "prod": "*", "any": "|", "all": "&"}[op]
        value = "@value" if op in ("sum", "prod") else "(@value != 0)"
        return Reduction(declare, result, f"reduction({sign}:{name})", [], initialise, [f"{name}{at} {sign}= {value};"])
    better = ">" if op in ("max", "argmax") else "<"
    if op in ("max", "min"):
        update = [f"{name}{at} = @value {better} {name}{at} ? @value : {name}{at};"]
        clause = f"reduction({op}:{name})"
        if not is_float:
            return Reduction(declare, result, clause, [], initialise, update)
        flag_declare, flag_initialise = declared(f"{name}_nan", "int32_t", "0")
        update.append(f"{name}_nan{at} |= @value != @value;")
        clause += f" reduction(|:{name}_nan)"
        result = f"({name}_nan{at} ? ({c_type})NAN : {name}{at})"
        return Reduction(declare + flag_declare, result, clause, [], initialise + flag_initialise, update)
    place_declare, place_initialise = declared(f"{name}_at", "int64_t", "-1")
    nan = f" || (@value != @value && {name}{at} == {name}{at})" if is_float else ""
    update = [
        f"if (@value {better} {name}{at} || {name}_at{at} < 0{nan}) {{",
        f"    {name}{at} = @value;",
        f"    {name}_at{at} = @position;",
        "}",
    ]
    return Reduction(declare + place_declare, f"{name}_at{at}", "", [], initialise + place_initialise, update)

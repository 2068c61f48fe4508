"""The Triton dialect: how types, literals, sizes, operations and reductions are written in Triton's Python.

Functions ``tw.*`` live in ``templates/triton/tw_math.py``. Values are blocks or scalars; broadcasting does the rest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from ...runtime import sizes
from ...runtime.sizes import Size
from ..operations import COMPARISONS, FUNCTIONS, INFIX, may_be_negative

POINTERS = {
    "float64": "*fp64", "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int64": "*i64", "int32": "*i32",
    "int16": "*i16", "int8": "*i8", "uint8": "*u8", "bool": "*u8",
}  # fmt: skip
"""Storage dtype → type of a pointer argument. A boolean is a byte in memory."""

TYPES = {
    "float64": "tl.float64", "float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16",
    "int64": "tl.int64", "int32": "tl.int32", "int16": "tl.int16", "int8": "tl.int8", "uint8": "tl.uint8",
    "bool": "tl.int1",
}  # fmt: skip

_OF_BOOLS = {"add": "|", "mul": "&", "maximum": "|", "minimum": "&"}
_SIZE_SIGNS = {
    "add": " + ", "mul": " * ", "floordiv": " // ", "mod": " % ", "eq": " == ", "ne": " != ", "le": " <= ", "lt": " < ",
}  # fmt: skip


def size(value: Size, text: Callable[[str], str] = str) -> str:
    """An index expression. Integer division of blocks rounds towards zero: a numerator below 0 takes ``tw``'s floor.

    Args:
        value: the expression; its divisors are positive.
        text: how a name reads.
    """
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return text(value)
    args = [_operand(arg, text) for arg in value.args]
    if value.op in ("max", "min"):
        return f"tl.{value.op}imum({args[0]}, {args[1]})"
    if value.op in ("floordiv", "mod") and may_be_negative(value.args[0]):
        return f"tw.index_{value.op}({args[0]}, {args[1]})"
    return _SIZE_SIGNS[value.op].join(args).replace("+ -", "- ")


def _operand(value: Size, text: Callable[[str], str]) -> str:
    inner = size(value, text)
    plain = inner.replace("_", "").isalnum() or _is_enclosed(inner)
    if isinstance(value, sizes.Op):
        plain = value.op in ("max", "min") or (value.op in ("floordiv", "mod") and may_be_negative(value.args[0]))
    return inner if plain else f"({inner})"


def _is_enclosed(text: str) -> bool:
    """Whether one pair of parentheses holds all of a text."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return character == ")" and position == len(text) - 1
    return False


def literal(value: Any, dtype: str) -> str:
    """A constant of a computation dtype."""
    if dtype.startswith("float"):
        value = float(value)
        if math.isnan(value):
            return 'float("nan")'
        if dtype == "float32" and abs(value) > 3.4028235677973366e38:
            value = math.copysign(math.inf, value)
        if math.isinf(value):
            return 'float("-inf")' if value < 0 else 'float("inf")'
        short = f"{value:.9g}" if dtype == "float32" else repr(value)
        return short if any(mark in short for mark in ".e") else f"{short}.0"
    if dtype == "bool":
        return "True" if value else "False"
    return str(int(value))


def typed(value: Any, dtype: str) -> str:
    """A constant as a scalar of its dtype."""
    return f"tl.full((), {literal(value, dtype)}, {TYPES[dtype]})"


def constant(value: Any, dtype: str) -> str:
    """A constant as an operand: a literal where the operation then takes it exactly."""
    if dtype == "float64" and math.isfinite(value):
        exact = value == 0 or (
            2.0**-126 <= abs(value) < 2.0**128 and struct.unpack("f", struct.pack("f", value))[0] == value
        )
        return literal(value, dtype) if exact else typed(value, dtype)
    return literal(value, dtype)


def cast(text: str, dtype: str) -> str:
    """A value or a literal as another dtype, as ``Tensor.to`` converts."""
    return f"({text} != 0)" if dtype == "bool" else f"tl.cast({text}, {TYPES[dtype]})"


def call(op: str, dtype: str, arg_dtypes: list[str], args: list[str]) -> str:
    """One operation on rendered operands."""
    if op == "cast":
        towards_zero = arg_dtypes[0].startswith("float") and not dtype.startswith("float") and dtype != "bool"
        return f"tw.to_int({args[0]}, {TYPES[dtype]})" if towards_zero else cast(args[0], dtype)
    if op == "where":
        return f"tl.where({', '.join(args)})"
    if arg_dtypes and arg_dtypes[0] == "bool" and op in _OF_BOOLS:
        return f"{args[0]} {_OF_BOOLS[op]} {args[1]}"
    if op in COMPARISONS and arg_dtypes[0] == "bool" and op not in ("eq", "ne"):
        args = [cast(arg, "int32") for arg in args]  # one bit with a sign orders the other way round
    if op in INFIX:
        return f"{args[0]} {INFIX[op]} {args[1]}"
    if op == "not":
        return f"({args[0]}) == 0"
    if op == "bitnot":
        return f"~{args[0]}"
    if op == "neg":
        return f"-{args[0]}"
    if op == "div":
        return f"{args[0]} / {args[1]}" if dtype.startswith("float") else f"tw.truncdiv({args[0]}, {args[1]})"
    if op == "abs":
        return f"tl.abs({args[0]})"
    if op == "isnan":
        return f"{args[0]} != {args[0]}"
    if op == "square":
        return f"{args[0]} * {args[0]}"
    if op in FUNCTIONS:
        return f"tw.{op}({', '.join(args)})"
    raise KeyError(f"the Triton dialect has no operation {op!r}")


_LIMITS = {
    "int64": (-(2**63), 2**63 - 1), "int32": (-(2**31), 2**31 - 1), "int16": (-(2**15), 2**15 - 1),
    "int8": (-128, 127), "uint8": (0, 255), "bool": (0, 1),
}  # fmt: skip


def neutral(op: str, dtype: str) -> str:
    """What a reduction starts from: taking it in changes nothing."""
    if op in ("sum", "any"):
        return literal(0, dtype)
    if op in ("prod", "all"):
        return literal(1, dtype)
    least = op in ("max", "argmax")
    if dtype.startswith("float"):
        return literal(-math.inf if least else math.inf, dtype)
    return literal(_LIMITS[dtype][0 if least else 1], dtype)


def combine(op: str, total: str, value: str) -> str:
    """One more value taken into a reduction (not ``argmax`` and ``argmin``); maxima and minima propagate NaN."""
    if op in ("max", "min"):
        return f"tw.{op}imum({total}, {value})"
    return f"{total} {({'sum': '+', 'prod': '*', 'any': '|', 'all': '&'})[op]} {value}"


def better(op: str, value: str, best: str) -> str:
    """Whether a value replaces the best one of an ``argmax`` or ``argmin``: the first NaN wins, then the extremum."""
    sign = ">" if op == "argmax" else "<"
    return f"({value} {sign} {best}) | (({value} != {value}) & ({best} == {best}))"

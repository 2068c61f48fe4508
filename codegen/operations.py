"""The operations that expressions name (``expr.Call``), and what the dialects write alike."""

from __future__ import annotations

from ..runtime.sizes import Size

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<", "shr": ">>", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
"""Written between their operands."""

COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))

FUNCTIONS = frozenset(
    (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "tanh", "erf", "sigmoid", "softplus", "sin", "cos",
        "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "sqrt", "rsqrt", "pow", "atan2",
        "floor", "ceil", "round", "trunc", "maximum", "minimum", "fmod", "remainder", "floordiv", "sign", "gelu",
        "gelu_tanh", "silu",
    )
)  # fmt: skip
"""With a function of that name in each dialect's header."""


def may_be_negative(value: Size) -> bool:
    """Whether an index expression can be below 0, where its names (loop variables, sizes, indices) are not."""
    if isinstance(value, int):
        return value < 0
    if isinstance(value, str) or value.op in ("mod", "eq", "ne", "le", "lt"):
        return False
    if value.op == "max":
        return all(map(may_be_negative, value.args))
    return any(map(may_be_negative, value.args))

"""Recognise GELU and SiLU that were written out.

Before:  0.5 * x * (1 + erf(x / sqrt(2)))                                  After:  gelu(x)
Before:  0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))         After:  gelu(x, approximate="tanh")
Before:  x * sigmoid(x)                                                     After:  silu(x)

Both sides are compared as polynomials in x and the erf, tanh or sigmoid of it, so any grouping, order and spelling of
the powers matches. ``x * sigmoid(1.702 * x)`` is no operator of ATen and stays a pointwise chain.
"""

from __future__ import annotations

import math

from torch import fx

from .base import Pass, Report
from .graph.edit import insert, same_shape, tensor_shape
from .graph.match import (
    Polynomial,
    argument,
    aten,
    dtype_of,
    is_op,
    is_tensor,
    polynomial,
    same_polynomial,
    substitute,
    users_of,
    without_copies,
)
from .graph.program import Program
from .graph.query import calls

_HALF_GATE: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_TANH_INNER: Polynomial = {(1,): math.sqrt(2 / math.pi), (3,): math.sqrt(2 / math.pi) * 0.044715}
_GATES = (aten.erf.default, aten.tanh.default, aten.sigmoid.default)
_REACH = 6  # products between the gate and the result


class RecogniseGelu(Pass):
    """Replace written-out GELU and SiLU by ``aten.gelu.default`` and ``aten.silu.default``."""

    def run(self, program: Program, report: Report) -> None:
        """Start from each erf, tanh and sigmoid, find its x, then the product that makes the activation."""
        for gate in calls(program.graph, _GATES):
            self._recognise(gate, report)

    def _recognise(self, gate: fx.Node, report: Report) -> None:
        x = _argument_of(gate)
        if x is None:
            if gate.target is aten.erf.default:
                report.refuse(gate, "its argument is not x / sqrt(2)")
            return
        found = False
        while (result := _result(gate, x)) is not None:
            if gate.target is aten.sigmoid.default:
                new = insert(gate.graph, result, aten.silu.default, (x,), origins=(gate, result))
            else:
                kind = {} if gate.target is aten.erf.default else {"approximate": "tanh"}
                new = insert(gate.graph, result, aten.gelu.default, (x,), kind, origins=(gate, result))
            report.change(result, f"{new.target} of {x.name}, written out with {gate.name}")
            substitute(result, new)
            found = True
            if gate._erased:
                return
        if not found and gate.target is not aten.sigmoid.default:
            report.refuse(gate, f"no product of {x.name} / 2 and 1 + {gate.name} follows")


def _argument_of(gate: fx.Node) -> fx.Node | None:
    """The x of which the gate's argument is the right function."""
    inner = gate.args[0]
    assert isinstance(inner, fx.Node)
    if gate.target is aten.sigmoid.default:
        return inner
    wanted: Polynomial = _TANH_INNER if gate.target is aten.tanh.default else {(1,): math.sqrt(0.5)}
    seen: list[fx.Node] = []
    pending = [without_copies(inner)]
    while pending and len(seen) < 24:
        x = pending.pop(0)
        if x in seen or not is_tensor(x):
            continue
        seen.append(x)
        if same_polynomial(polynomial(inner, (x,)), wanted, dtype_of(x)) and _same_type(x, gate):
            return x
        if x.op == "call_function":
            pending.extend(map(without_copies, x.all_input_nodes))
    return None


def _result(gate: fx.Node, x: fx.Node) -> fx.Node | None:
    """The nearest node that is the whole activation."""
    wanted: Polynomial = {(1, 1): 1.0} if gate.target is aten.sigmoid.default else _HALF_GATE
    level = [gate]
    for _ in range(_REACH):
        level = [user for node in level for user in users_of(node) if _arithmetic(user)]
        for node in level:
            if same_polynomial(polynomial(node, (x, gate)), wanted, dtype_of(x)) and _same_type(x, node):
                return node
    return None


def _arithmetic(node: fx.Node) -> bool:
    return is_tensor(node) and not is_op(node, *_GATES) and argument(node, 0, "self") is not None


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    return dtype_of(a) == dtype_of(b) and same_shape(tensor_shape(a), tensor_shape(b))

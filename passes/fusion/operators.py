"""What fusion asks about single operators: the part they play, what they cost per element, how they read an operand.

Operators are known by name, so that every overload and every torch version is covered; one that is not named here
counts as expensive, which costs a buffer but never time.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph.edit import same_shape, same_size, tensor_shape
from ..graph.query import arguments
from ..graph.regions import is_region
from ..graph.roles import Roles

EXPENSIVE = 1000  # cost per element above which a value is never computed twice
MANY = 3  # what a value that is read many times may cost per element
SHARED = 1  # what a value that several regions each compute for themselves may cost


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GENERATORS = _names("arange full scalar_tensor zeros ones empty linspace eye")
_FROM_SIZE = _names("full_like zeros_like ones_like empty_like new_full new_zeros new_ones new_empty")
_FREE = _names("alias detach clone contiguous positive lift_fresh lift_fresh_copy detach_copy")
_CHEAP = _names(
    "add sub rsub mul neg abs square maximum minimum relu relu6 hardtanh clamp clip clamp_min clamp_max leaky_relu "
    "threshold lt le gt ge eq ne logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor "
    "bitwise_not bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ where masked_fill _to_copy to type_as "
    "convert_element_type isnan isinf isfinite floor ceil round trunc sign"
)
_MODERATE = _names("div floor_divide sqrt rsqrt reciprocal hardsigmoid hardswish remainder fmod")
_LOOKUPS = _names("embedding index_select gather index take_along_dim")

# Views that choose between operands or repeat elements: they have a cost, so they are no free index maps.
_ASSEMBLED = _names("cat concat concatenate stack constant_pad_nd pad roll repeat tile repeat_interleave tril triu")
_READ_ONCE = _names("constant_pad_nd roll tril triu")
# Pointwise by role, but they read their operands at other places than they write.
_MOVING = _names("slice_scatter select_scatter")

_ROWWISE = _names("softmax _softmax _safe_softmax log_softmax _log_softmax")
_SINGLE_PASS = _names("sum prod mean amax amin any all argmax argmin max min")
_SPREAD = _names("var std")
_NEAREST = "upsample_nearest"


def operator_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload: ``add`` for ``aten.add.Tensor``."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else getattr(node.target, "__name__", node.target)
    return str(name).split("::")[-1]


def part(node: fx.Node, roles: Roles) -> str:
    """What a node is to fusion.

    ``"leaf"`` (inputs, constants), ``"region"``, ``"size"``, ``"anchor"``, ``"view"`` (an index map that costs
    nothing), ``"assembled"`` (a view with a cost), ``"pointwise"``, ``"gather"``, ``"reduction"``, ``"window"``,
    ``"item"`` (one result of a node that computes several) or ``"unknown"``.
    """
    if node.op in ("placeholder", "get_attr") or is_region(node, "constant"):
        return "leaf"
    if node.op == "call_module":
        return "region"
    value = node.meta.get("val")
    if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
        return "size"
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        inner = part(source, roles)
        return "view" if inner == "view" else "unknown" if inner in ("unknown", "region") else "item"
    if node.op != "call_function" or not roles.known(node.target):
        return "unknown"
    if node.target in roles.anchors:
        return "anchor"
    name = operator_name(node)
    if node.target in roles.view:
        assembled = name in _ASSEMBLED or name.startswith(("reflection_pad", "replication_pad"))
        return "assembled" if assembled else "view"
    if node.target in roles.pointwise:
        return "assembled" if name in _MOVING else "pointwise"
    if node.target in roles.gather:
        return "gather"
    return "reduction" if node.target in roles.reduction else "window"


def cost(node: fx.Node, what: str) -> int:
    """Roughly the instructions per element of a value, given its operands."""
    name = operator_name(node)
    if what in ("view", "item") or name in _FREE or name in _FROM_SIZE:
        return 0
    if what == "pointwise":
        if name == "pow" and isinstance(exponent := node.args[-1], int | float):
            return 1 if exponent in (1, 2, 3) else 2 if exponent in (4, -1, -2, 0.5, -0.5) else EXPENSIVE
        return 1 if name in _CHEAP or name in _GENERATORS else 2 if name in _MODERATE else EXPENSIVE
    if what == "assembled":
        pieces = node.args[0] if isinstance(node.args[0], list | tuple) else ()
        return max(2, len(pieces))
    if what == "gather":
        return 2 if name in _LOOKUPS or name.startswith(_NEAREST) else EXPENSIVE
    return EXPENSIVE


def is_generated(node: Any) -> bool:
    """Whether a value follows from its index and sizes alone (positions, masks made from them), whatever the inputs."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr" and not tensor_shape(current):
            continue
        if current.op in ("placeholder", "get_attr", "call_module") or len(seen) > 32:
            return False
        if isinstance(current.meta.get("val"), int | torch.SymInt) or operator_name(current) in _FROM_SIZE:
            continue
        pending.extend(current.all_input_nodes)
    return True


def reduction_kind(node: fx.Node) -> str:
    """How a reduction walks its first operand.

    ``"row"``: gives its operand's shape, over the last axis only; ``"statistic"``: reduces the last axis only;
    ``"single"``: reads every element once; ``"several"``: reads elements several times.
    """
    name = operator_name(node)
    if isinstance(node.meta["val"], tuple | list):
        return "single" if name in _SINGLE_PASS else "several"
    rank = len(tensor_shape(_operand(node)))
    if name in _ROWWISE:
        return "row" if rank and _axes(node, rank) == [rank - 1] else "several"
    if name in ("layer_norm", "rms_norm"):
        return "row" if len(arguments(node)["normalized_shape"]) == 1 else "several"
    if name in _SINGLE_PASS or name in _SPREAD:
        if rank and _axes(node, rank) == [rank - 1]:
            return "statistic"
        return "single" if name in _SINGLE_PASS else "several"
    return "several"


def _axes(node: fx.Node, rank: int) -> list[int]:
    dim = arguments(node).get("dim")
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    return sorted(axis % rank for axis in (dim if isinstance(dim, list | tuple) else [dim]))


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def reads_once(node: fx.Node, what: str, operand: fx.Node) -> bool:
    """Whether an operator that is no pointwise one evaluates each element of an operand at most once, in any place."""
    if what == "view":
        return not operator_name(node).startswith(("expand", "broadcast_to"))
    if what == "assembled":
        return operator_name(node) in _READ_ONCE
    if node.args[0] is not operand:
        return False
    if what == "reduction":
        return reduction_kind(node) in ("single", "statistic") and operator_name(node) not in _SPREAD
    if what == "window" and operator_name(node).startswith(("adaptive", "_adaptive")):
        rank = int(operator_name(node).removesuffix("d")[-1])
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        return all(same_size(size, 1) for size in value.shape[-rank:])
    return False


def is_row_of(small: Any, large: Any) -> bool:
    """Whether a shape is another one with its last axis reduced to one element."""
    return len(small) == len(large) > 0 and same_size(small[-1], 1) and same_shape(small[:-1], large[:-1])


def has_constant_root(node: fx.Node, roles: Roles) -> bool:
    """Whether a view is one of a constant, which nobody has folded."""
    while part(node, roles) == "view":
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        node = operand
    return part(node, roles) == "leaf" and node.op != "placeholder"

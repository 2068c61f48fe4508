"""Questions that passes ask about nodes: which operator, which arguments, is it a constant, may it go.

The answers never add guards: sizes are compared by their expressions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .edit import insert, replace, same_size
from .regions import is_region

aten = torch.ops.aten

# Operators that check something and give nothing; their checks are made when the model is exported.
ASSERTIONS = ("aten._assert", "aten.sym_constrain_range", "aten._functional_assert", "_operator.assert")
# A value that is put together from quantized data stays visible to lowering, which computes on the integers.
OPAQUE = ("tilewright.dequantize",)
# Memory that nobody filled: two calls differ.
UNINITIALISED = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
# Constants of up to this many bytes are computed when a pass meets them; larger ones when the artifact is written.
SMALL = 64 * 1024


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node (anything else is none) calls one of the operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(graph: fx.Graph, targets: Iterable[Any]) -> list[fx.Node]:
    """All calls of the operators, in graph order; a list, so the graph may change while it is walked."""
    wanted = set(targets)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in wanted]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator call by its schema's name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    bound: dict[str, Any] = {}
    for index, parameter in enumerate(node.target._schema.arguments):
        if index < len(node.args) and not parameter.kwarg_only:
            bound[parameter.name] = node.args[index]
        elif parameter.name in node.kwargs:
            bound[parameter.name] = node.kwargs[parameter.name]
        else:
            bound[parameter.name] = parameter.default_value
    return bound


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only checks something."""
    return node.op == "call_function" and str(node.target).startswith(ASSERTIONS)


def is_random(node: fx.Node) -> bool:
    """Whether two calls with the same arguments may differ: random numbers, or memory that is not filled."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags or node.target in UNINITIALISED


def is_pure(node: fx.Node) -> bool:
    """Whether a node does nothing but give its value: it may go when unused (random ones may, too)."""
    if node.op == "get_attr" or is_region(node):
        return True
    if node.op != "call_function" or is_assertion(node):
        return False
    return not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable


def is_constant(node: Any) -> bool:
    """Whether a value is known when compiling: a weight, or pure operators on nothing but such values.

    Walks up to the weights; sizes that vary and quantized data are no constants, and neither is what a factory such as
    ``full`` fills when it is large: computing it where it is used costs less than reading it.
    """
    pending, seen = [node], set()
    found = False
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if not isinstance(current, fx.Node):
            return False
        if current.op == "get_attr" or is_region(current, "constant"):
            found = True
        elif current.op == "call_function" and is_foldable(current):
            pending.extend(current.all_input_nodes)
            if not current.all_input_nodes:
                if size_in_bytes(current) > SMALL:
                    return False
                found = True
        else:
            return False
    return found


def is_foldable(node: fx.Node) -> bool:
    """Whether an operator's value is fixed by its operands' values and its size is fixed as well."""
    if not is_pure(node) or is_random(node) or str(node.target).startswith(OPAQUE):
        return False
    value = node.meta.get("val")
    items = value if isinstance(value, tuple | list) else (value,)
    return all(isinstance(item, torch.Tensor) and is_static(item) for item in items)


def size_in_bytes(node: fx.Node) -> int:
    """The size of a value (of all its tensors together) whose sizes do not vary."""
    value = node.meta["val"]
    items = value if isinstance(value, tuple | list) else (value,)
    return sum(item.numel() * item.element_size() for item in items)


def is_static(tensor: torch.Tensor) -> bool:
    """Whether all sizes of a tensor are plain integers."""
    return all(isinstance(size, int) for size in tensor.shape)


def tensor_of(node: Any) -> torch.Tensor | None:
    """The tensor behind a weight or constant node; None for anything computed."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = attribute(node.graph.owning_module, node.target)
    return value if isinstance(value, torch.Tensor) else None


def attribute(module: Any, target: Any) -> Any:
    """What a module has under a dotted name."""
    for part in str(target).split("."):
        module = getattr(module, part)
    return module


def scalar_of(value: Any) -> int | float | bool | None:
    """The number that an argument is: a Python number, or a constant without dimensions; else None."""
    if isinstance(value, bool | int | float):
        return value
    tensor = tensor_of(value)
    if tensor is None or tensor.dim() != 0 or tensor.is_complex():
        return None
    number = tensor.item()
    assert isinstance(number, bool | int | float)
    return number


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of a node; None when it has none or several, or is used twice by the one."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses = 0

    def count(used: fx.Node) -> fx.Node:
        nonlocal uses
        uses += used is node
        return used

    fx.map_arg((user.args, user.kwargs), count)
    return user if uses == 1 else None


def size_at(before: fx.Node, source: fx.Node, axis: int) -> int | fx.Node:
    """A value's size along an axis as an argument: an int, or a node that gives it (one that exists if possible)."""
    size = source.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    for node in before.graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and same_size(value, size):
            return node
    return insert(before.graph, before, aten.sym_size.int, (source, axis), origins=(source,))


def remove_unused(*nodes: Any) -> None:
    """Erase nodes without users, and then the operands that have none left; inputs, outputs and others stay."""
    pending = [node for node in nodes if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop()
        if node._erased or node.users or not is_pure(node):
            continue
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        pending.extend(operands)


def supersede(old: fx.Node, new: fx.Node, *, name: str | None = None) -> None:
    """Put a new node in the place of an old one, which goes with the operands that only it used.

    The new node takes the old one's name (or ``name``, of a node that is gone), so that its users read as before.
    """
    operands = old.all_input_nodes
    replace(old, new)
    remove_unused(*operands)
    if old._erased:
        new.name = name or old.name


def is_size(node: Any) -> bool:
    """Whether a node gives a size (an integer that may vary) and no tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.SymInt | int)

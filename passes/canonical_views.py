"""Canonical form of views and copies: the rules that ``canonicalize`` applies to them.

Before:  permute(permute(clone(x), p), q)        reshape(view(x, a), b)       slice(x, 0, 0, whole)
After:   permute(x, p[q])                        reshape(x, b)                x
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .graph.edit import faking, inherit, insert, same_shape, same_size, tensor_shape, value_of
from .graph.query import arguments, aten, is_call, only_user, size_at

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
PERMUTES = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
)
COPIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
CASTS = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
)
# Operators that give several views.
PARTS = (
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
)
# Operators whose operands broadcast against each other, so that an expanded operand says nothing new.
BROADCASTING = frozenset(
    getattr(aten, name).Tensor
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "bitwise_and",
        "bitwise_or",
        "remainder",
    )
) | {
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Tensor_Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.addcmul.default,
}
# dtypes that hold every value of another exactly.
_HOLDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.uint8: (torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64),
    torch.int8: (torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.int16: (torch.int32, torch.int64, torch.float32, torch.float64),
    torch.int32: (torch.int64, torch.float64),
    torch.bool: (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32),
}

Rewrite = tuple[fx.Node, str] | None


def insert_like(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A node in front of ``node`` for a value of the same shape and dtype, which need not be computed anew."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta["val"] = node.meta["val"]
    inherit(new, (node,))
    return new


def permutation(node: fx.Node) -> list[int]:
    """The axes of a call of one of ``PERMUTES`` as a permutation: result axis i is operand axis p[i]."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    rank = len(tensor_shape(operand))
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [dim % rank for dim in dims]
    order = list(range(rank))
    if rank < 2:
        return order
    if node.target is aten.mT.default:
        order[-1], order[-2] = order[-2], order[-1]
    elif node.target in (aten.t.default, aten.numpy_T.default):
        order.reverse()
    elif node.target is aten.transpose.int:
        first, second = _axes(node.args[1], rank) + _axes(node.args[2], rank)
        order[first], order[second] = order[second], order[first]
    else:
        moved, places = _axes(node.args[1], rank), _axes(node.args[2], rank)
        order = [axis for axis in order if axis not in moved]
        for place, axis in sorted(zip(places, moved, strict=True)):
            order.insert(place, axis)
    return order


def _axes(dims: Any, rank: int) -> list[int]:
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


def compose(outer: list[int], inner: list[int]) -> list[int]:
    """The permutation of permuting by ``inner`` first and by ``outer`` then."""
    return [inner[axis] for axis in outer]


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _unchanged(node: fx.Node) -> Rewrite:
    """A view, cast or copy whose value has its operand's shape and dtype (for these operators: is its operand)."""
    source = _source(node)
    if node.meta["val"].dtype == source.meta["val"].dtype and same_shape(tensor_shape(node), tensor_shape(source)):
        return source, f"{node.target} gives its operand"
    return None


def _full_slice(node: fx.Node) -> Rewrite:
    return _unchanged(node) if arguments(node)["step"] == 1 else None


def _inference_dropout(node: fx.Node) -> Rewrite:
    return (_source(node), "dropout does nothing in inference") if not arguments(node)["train"] else None


def _cast(node: fx.Node) -> Rewrite:
    """One form of cast; a cast to a dtype that holds every value is skipped by the next cast."""
    if (same := _unchanged(node)) is not None:
        return same
    source, dtype = _source(node), node.meta["val"].dtype
    if is_call(source, aten._to_copy.default):
        first = _source(source)
        if source.meta["val"].dtype in _HOLDS.get(first.meta["val"].dtype, ()):
            if first.meta["val"].dtype == dtype:
                return first, "widened and narrowed back"
            return insert(
                node.graph, node, aten._to_copy.default, (first,), {"dtype": dtype}, origins=(node,)
            ), "two casts"
    if node.target is aten._to_copy.default and node.kwargs == {"dtype": dtype}:
        return None
    return insert(
        node.graph, node, aten._to_copy.default, (source,), {"dtype": dtype}, origins=(node,)
    ), "cast by _to_copy"


def _reshape(node: fx.Node) -> Rewrite:
    """One form of regrouping, straight from the value that has the elements."""
    source, skipped = _source(node), False
    while is_call(source, *RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        source, skipped = _source(source), True
    if same_shape(tensor_shape(source), tensor_shape(node)):
        return source, "regrouped to its own shape"
    if (moved := _regrouped_rows(node, source)) is not None:
        return moved
    sizes = reshape_sizes(node, source)
    if sizes is None or (node.target is aten.reshape.default and not skipped and sizes == list(node.args[1])):  # type: ignore[arg-type]
        return None
    return insert_like(node, aten.reshape.default, (source, sizes)), "regrouped at once" if skipped else "as reshape"


def _regrouped_rows(node: fx.Node, linear: fx.Node) -> Rewrite:
    """A linear map of rows that were flattened, and whose result is unflattened: of the rows in that shape."""
    if not is_call(linear, aten.linear.default) or only_user(linear) is not node:
        return None
    rows = _source(linear)
    if not is_call(rows, *RESHAPES) or not same_size(tensor_shape(node)[-1], tensor_shape(linear)[-1]):
        return None
    sizes, columns = reshape_sizes(node, linear), tensor_shape(rows)[-1]
    if sizes is None or not isinstance(columns, int):
        return None
    shape = (_source(rows), [*sizes[:-1], columns])
    regrouped = insert(node.graph, node, aten.reshape.default, shape, origins=(rows, node))
    return insert_like(node, aten.linear.default, (regrouped, *linear.args[1:])), "its rows are regrouped before it"


def reshape_sizes(node: fx.Node, source: fx.Node) -> list[Any] | None:
    """The shape of ``node`` as arguments: ints, nodes, -1 for the only axis that varies; None if it cannot be said."""
    shape = tensor_shape(node)
    given = node.args[1] if node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default) else ()
    assert isinstance(given, list | tuple)
    varying = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    inferred = varying[0] if len(varying) == 1 and 0 not in shape else None
    sizes: list[Any] = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis == inferred:
            sizes.append(-1)
        elif given and isinstance(given[axis], fx.Node):
            sizes.append(given[axis])
        elif given:
            sizes.append(-1)
        else:
            equal = [i for i, other in enumerate(tensor_shape(source)) if same_size(size, other)]
            sizes.append(size_at(node, source, equal[0]) if equal else -1)
    return sizes if sizes.count(-1) <= 1 else None


def _permute(node: fx.Node) -> Rewrite:
    """One form of reordering, all in one; gone when nothing moves."""
    source, order = _source(node), permutation(node)
    composed = is_call(source, *PERMUTES)
    if composed:
        order, source = compose(order, permutation(source)), _source(source)
    if order == list(range(len(order))):
        return source, "no axis moves"
    if node.target is aten.permute.default and not composed and list(node.args[1]) == order:  # type: ignore[arg-type]
        return None
    return insert_like(node, aten.permute.default, (source, order)), "permuted at once" if composed else "as permute"


def _expand(node: fx.Node) -> Rewrite:
    if (same := _unchanged(node)) is not None:
        return same
    source = _source(node)
    if is_call(source, aten.expand.default) and len(tensor_shape(source)) == len(tensor_shape(node)):
        return insert_like(node, aten.expand.default, (_source(source), node.args[1])), "expanded at once"
    dropped = [user for user in list(node.users) if _broadcasts(user, node, source)]
    for user in dropped:
        user.replace_input_with(node, source)
    return (node, f"{len(dropped)} users broadcast by themselves") if dropped else None


def _broadcasts(user: fx.Node, node: fx.Node, source: fx.Node) -> bool:
    """Whether a user's value keeps its shape when it takes the operand without its expansion."""
    if user.op != "call_function" or user.target not in BROADCASTING:
        return False
    args, kwargs = fx.map_arg((user.args, user.kwargs), lambda used: source if used is node else used)
    with faking(node.graph):
        value = user.target(*value_of(args), **value_of(kwargs))  # type: ignore[operator]
    return value.dtype == user.meta["val"].dtype and same_shape(value.shape, tensor_shape(user))


def _unit_axis(node: fx.Node) -> Rewrite:
    """Adding an axis and taking it away again, in either order."""
    if (same := _unchanged(node)) is not None:
        return same
    source = _source(node)
    if is_call(source, *RESHAPES):
        return _reshape(node)
    rank = max(len(tensor_shape(node)), len(tensor_shape(source)))
    axis = int(arguments(node)["dim"]) % rank
    pairs = {aten.squeeze.dim: aten.unsqueeze.default, aten.unsqueeze.default: aten.squeeze.dim}
    if is_call(source, pairs[node.target]):  # type: ignore[index]
        first = _source(source)
        if axis == int(arguments(source)["dim"]) % rank and same_shape(tensor_shape(first), tensor_shape(node)):
            return first, "an axis was added and taken away"
    if node.target is aten.squeeze.dim and is_call(source, aten.permute.default):
        order = permutation(source)
        squeezed = insert(node.graph, node, aten.squeeze.dim, (_source(source), order[axis]), origins=(node,))
        return insert_like(node, aten.permute.default, (squeezed, _without(order, axis))), "squeezed before permuting"
    return None


def _without(order: list[int], axis: int) -> list[int]:
    """A permutation of the other axes when result axis ``axis`` is gone."""
    gone = order[axis]
    return [dim - (dim > gone) for place, dim in enumerate(order) if place != axis]


def _select(node: fx.Node) -> Rewrite:
    """Selecting before reordering: the value that is selected from is then the one that was computed."""
    source = _source(node)
    if not is_call(source, aten.permute.default):
        return None
    order = permutation(source)
    axis = int(arguments(node)["dim"]) % len(order)
    given = (_source(source), order[axis], arguments(node)["index"])
    selected = insert(node.graph, node, aten.select.int, given, origins=(node,))
    return insert_like(node, aten.permute.default, (selected, _without(order, axis))), "selected before permuting"


def _part(node: fx.Node) -> Rewrite:
    """One of several parts of a value, by itself: a slice, or a selection."""
    whole, index = node.args
    if not is_call(whole, *PARTS) or not isinstance(index, int):
        return None
    assert isinstance(whole, fx.Node)
    given = arguments(whole)
    source, dim = _source(whole), int(given["dim"])
    parts = whole.meta["val"]
    index = index % len(parts)
    if whole.target is aten.unbind.int:
        return insert(node.graph, node, aten.select.int, (source, dim, index), origins=(node,)), "selected"
    sizes = [part.shape[dim] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    bounds = (source, dim, start, start + sizes[index])
    return insert(node.graph, node, aten.slice.Tensor, bounds, origins=(node,)), "sliced"


def _pad(node: fx.Node) -> Rewrite:
    given = arguments(node)
    if given["mode"] != "constant":
        return None
    value = 0.0 if given["value"] is None else given["value"]
    return insert_like(node, aten.constant_pad_nd.default, (node.args[0], given["pad"], value)), "as constant_pad_nd"


def _one_part(node: fx.Node) -> Rewrite:
    parts: Any = node.args[0]
    if len(parts) != 1:
        return None
    if node.target is aten.cat.default:
        return parts[0], "cat of one tensor"
    dim = int(arguments(node)["dim"])
    return insert(node.graph, node, aten.unsqueeze.default, (parts[0], dim), origins=(node,)), "stack of one tensor"


def _static_size(node: fx.Node) -> Rewrite:
    size = node.meta["val"]
    if not isinstance(size, int) or not node.users:
        return None
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda used: size if used is node else used)
        user.kwargs = fx.map_arg(user.kwargs, lambda used: size if used is node else used)
    return node, f"the size is always {size}"


VIEWS: dict[object, list[Any]] = {
    **{target: [_reshape] for target in RESHAPES},
    **{target: [_permute] for target in PERMUTES},
    **{target: [_unchanged] for target in (*COPIES, aten.repeat.default)},
    **{target: [_cast] for target in CASTS},
    aten.dropout.default: [_inference_dropout],
    aten.slice.Tensor: [_full_slice],
    aten.expand.default: [_expand],
    aten.squeeze.dim: [_unit_axis],
    aten.unsqueeze.default: [_unit_axis],
    aten.select.int: [_select],
    aten.pad.default: [_pad],
    operator.getitem: [_part],
    aten.cat.default: [_one_part],
    aten.stack.default: [_one_part],
    aten.sym_size.int: [_static_size],
}

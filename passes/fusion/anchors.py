"""The regions around anchors: what follows a product, convolution or attention inside its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from torch import fx

from ..graph.edit import same_shape, tensor_shape
from ..graph.query import aten, only_user
from ..graph.roles import Roles
from .grouping import Grouping, Vertex
from .operators import is_generated, part

LONGEST = 32  # operators considered after an anchor

Refuse = Callable[[fx.Node, str], None]


def grow_anchors(grouping: Grouping, nodes: Sequence[fx.Node], roles: Roles, refuse: Refuse) -> None:
    """Make a region of every anchor, the last ones first: of two that feed one operator, the later one takes it in."""
    for node in reversed(nodes):
        if part(node, roles) != "anchor":
            continue
        anchor = roles.anchors[node.target]
        vertex = grouping.of[node]
        vertex.family, vertex.root, vertex.shape = anchor.family, node, tensor_shape(node)
        _take(vertex, node)
        if anchor.epilogue:
            _epilogue(grouping, vertex, node, roles, refuse)
        elif anchor.tail:
            _tail(grouping, vertex, node)


def _epilogue(grouping: Grouping, vertex: Vertex, anchor: fx.Node, roles: Roles, refuse: Refuse) -> None:
    """Take in the longest run of pointwise operators on the result that again ends in one value."""
    reached, reason = _pointwise_after(grouping, anchor, roles)
    for end in reversed(reached):
        chosen = _upstream(end, {anchor, *reached})
        if all(user in chosen for node in chosen if node is not end for user in node.users):
            for node in sorted(chosen - {anchor}, key=grouping.index.__getitem__):
                if not grouping.merge(grouping.of[node], vertex):
                    refuse(node, f"would make a cycle with {anchor}")
                    return
                _take(vertex, node)
            return
    if reason:
        refuse(anchor, reason)


def _pointwise_after(grouping: Grouping, anchor: fx.Node, roles: Roles) -> tuple[list[fx.Node], str]:
    """Pointwise operators of the anchor's shape that depend on its result, in order; and why there are none."""
    shape = tensor_shape(anchor)
    reached: dict[fx.Node, None] = {anchor: None}
    pending = [anchor]
    reason = ""
    while pending and len(reached) <= LONGEST:
        node = pending.pop(0)
        for user in node.users:
            if user in reached or user not in grouping.of or part(user, roles) != "pointwise" or is_generated(user):
                continue
            if grouping.of[user].family:
                reason = reason or f"{user} is already after {grouping.of[user].root}"
            elif same_shape(tensor_shape(user), shape):
                reached[user] = None
                pending.append(user)
            else:
                reason = reason or f"{user} has another shape"
    found = sorted((node for node in reached if node is not anchor), key=grouping.index.__getitem__)
    return found, "has other users" if found else reason


def _upstream(end: fx.Node, within: set[fx.Node]) -> set[fx.Node]:
    chosen, pending = {end}, [end]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand in within and operand not in chosen:
                chosen.add(operand)
                pending.append(operand)
    return chosen


def _tail(grouping: Grouping, vertex: Vertex, anchor: fx.Node) -> None:
    """Let the kernel store in another order: a permutation of the result, then a reshape, if nothing else reads it."""
    last = anchor
    for targets in ((aten.permute.default, aten.transpose.int), (aten.reshape.default, aten.view.default)):
        user = only_user(last)
        if user is None or user.op != "call_function" or user.target not in targets:
            return
        if not grouping.merge(grouping.of[user], vertex):
            return
        _take(vertex, user)
        last = user
        vertex.shape = tensor_shape(user)


def _take(vertex: Vertex, node: fx.Node) -> None:
    vertex.allow[node] = inf
    vertex.place[node] = "element"

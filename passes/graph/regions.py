"""Regions: nested graph modules that stand for one kernel, or for one constant computed at compile time.

A region is a ``call_module`` node whose target is a GraphModule with one placeholder per operand. A region with one
result returns it bare; one with several returns a tuple, read through ``operator.getitem``. The graph with regions
still runs in eager PyTorch.

``node.meta["region"]`` is a :class:`Region`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from .edit import inherit


@dataclass(frozen=True)
class Region:
    """What a region becomes.

    Attributes:
        kind: ``"kernel"``: one kernel. ``"constant"``: operands are constants only; the value is computed when the
            artifact is written, one at a time, and never twice.
        family: for kernels, the family whose template makes it (``"loop"``, ``"matmul"``, ``"convolution"``,
            ``"attention"``, ...); empty for constants.
        updates: position of the operand whose memory the one result takes, for kernels that work in place.
    """

    kind: Literal["kernel", "constant"]
    family: str = ""
    updates: int | None = None


def is_region(node: fx.Node, kind: str | None = None) -> bool:
    """Whether a node is a region (of the kind)."""
    region = node.meta.get("region")
    return node.op == "call_module" and region is not None and (kind is None or region.kind == kind)


def body(node: fx.Node) -> fx.GraphModule:
    """The nested module of a region node."""
    owner = node.graph.owning_module
    assert owner is not None, "a region's graph belongs to a module"
    module = owner.get_submodule(str(node.target))
    assert isinstance(module, fx.GraphModule)
    return module


def outline(module: fx.GraphModule, nodes: Sequence[fx.Node], region: Region, name: str) -> fx.Node:
    """Move nodes (in graph order, convex: no path leaves and re-enters) into a region placed where the last one was.

    Values used outside become the region's results, in graph order. Nodes of ``nodes`` that are also used by others may
    be listed in a clone's place: clone first, then outline. The new node's ``meta["val"]`` is the result's value or the
    tuple of them; ``getitem`` nodes carry their own.

    Returns:
        The ``call_module`` node.
    """
    graph = module.graph
    inside = set(nodes)
    operands: list[fx.Node] = []
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and operand not in operands:
                operands.append(operand)
    results = [node for node in nodes if any(user not in inside for user in node.users)]

    nested = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        copies[operand] = nested.placeholder(operand.name)
        copies[operand].meta["val"] = operand.meta["val"]
    for node in nodes:
        copies[node] = nested.node_copy(node, lambda used: copies[used])
        copies[node].meta = dict(node.meta)
    outputs = tuple(copies[node] for node in results)
    nested.output(outputs[0] if len(outputs) == 1 else outputs)

    target = _unique_name(module, name)
    module.add_submodule(target, fx.GraphModule(module, nested))
    with graph.inserting_after(max(nodes)):
        call = graph.call_module(target, tuple(operands))
    call.meta["region"] = region
    inherit(call, nodes)
    if len(results) == 1:
        call.meta["val"] = results[0].meta["val"]
        _redirect(results[0], call, inside)
    else:
        call.meta["val"] = tuple(node.meta["val"] for node in results)
        anchor = call
        for index, node in enumerate(results):
            with graph.inserting_after(anchor):
                item = graph.call_function(operator.getitem, (call, index))
            anchor = item
            item.meta["val"] = node.meta["val"]
            inherit(item, (node,))
            _redirect(node, item, inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call


def _redirect(old: fx.Node, new: fx.Node, inside: set[fx.Node]) -> None:
    for user in list(old.users):
        if user not in inside:
            user.replace_input_with(old, new)


def _unique_name(module: fx.GraphModule, name: str) -> str:
    candidate, count = name, 1
    while hasattr(module, candidate):
        candidate = f"{name}_{count}"
        count += 1
    return candidate

"""Compute half-precision models in float32 where the target has no arithmetic of their type.

Before:  y = op(x, w)                                  x, w, y: float16 or bfloat16
After:   y = to(op(to(x, float32), to(w, float32)), y's dtype)

Conversions stand at the borders only: after inputs, states and constants, before outputs and new states. Nothing is
lost: every half-precision number is a float32, and intermediate values keep the digits that they would have been
rounded to. Caches stay as they are: what is appended to them is rounded to their type in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import Pass, Report
from .graph.caches import caches
from .graph.edit import faking, insert, value_of
from .graph.program import Program

HALVES = (torch.float16, torch.bfloat16)
_TO = torch.ops.aten._to_copy.default


class WidenFloats(Pass):
    """Replace float16 and bfloat16 arithmetic by float32."""

    def run(self, program: Program, report: Report) -> None:
        """Rewrite the program in place."""
        graph = program.graph
        kept = caches(graph)
        halves = [node for node in graph.nodes if _is_half(node) and node not in kept]
        computed = [node for node in halves if node.op == "call_function" and not _at_border(node)]
        if not computed:
            return
        narrow = {node: node.meta["val"].dtype for node in halves}
        sources: dict[fx.Node, fx.Node] = {}  # what _widen_source inserted -> what it converts
        for node in list(graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                if node in narrow and node.users:
                    sources[_widen_source(node)] = node
            elif node.op == "call_function":
                _widen_node(node)
            elif node.op == "output":
                _restore(node, narrow, sources)
        kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in narrow.values()}))
        report.change(computed[0], f"{len(computed)} nodes of {kinds} computed in float32")


def _restore(output: fx.Node, narrow: dict[fx.Node, torch.dtype], sources: dict[fx.Node, fx.Node]) -> None:
    """Give results the dtype that they had; a source that is given out needs no conversion there and back."""
    converted: dict[fx.Node, fx.Node] = {}

    def restored(node: fx.Node) -> fx.Node:
        if node in sources:
            return sources[node]
        dtype = narrow.get(node)
        if dtype is None or node.meta["val"].dtype == dtype:
            return node
        if node not in converted:
            converted[node] = insert(node.graph, output, _TO, (node,), {"dtype": dtype}, origins=(node,))
        return converted[node]

    output.args = fx.map_arg(output.args, restored)


def _is_half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in HALVES


def _at_border(node: fx.Node) -> bool:
    """Whether a node is the conversion of a result, which this pass itself leaves behind."""
    return node.target is _TO and all(user.op == "output" for user in node.users)


def _widen_source(node: fx.Node) -> fx.Node:
    users = [user for user in node.users]
    following = node.next
    wide = insert(node.graph, following, _TO, (node,), {"dtype": torch.float32}, origins=(node,))
    for user in users:
        user.replace_input_with(node, wide)
    return wide


def _widen_node(node: fx.Node) -> None:
    """Recompute a node's value on its widened operands, with explicit half dtypes replaced."""
    node.args = _widened(node.args)
    node.kwargs = _widened(node.kwargs)
    if isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        with faking(node.graph):
            node.meta["val"] = node.target(*value_of(node.args), **value_of(node.kwargs))  # type: ignore[operator]


def _widened(arguments: Any) -> Any:
    def one(value: Any) -> Any:
        return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value

    return torch.fx.node.map_aggregate(arguments, one)

"""From a grouping to a graph of regions: nodes put in order, groups moved into nested graphs and named."""

from __future__ import annotations

import re

from torch import fx

from ..base import Report
from ..graph.program import Program
from ..graph.regions import Region, outline
from ..graph.roles import Roles
from .grouping import Grouping
from .operators import operator_name, part

_WORDS = {"scaled_dot_product_attention": "attention", "to_copy": "cast", "convert_element_type": "cast"}
_LONGEST = 6  # words in a name


def outline_regions(program: Program, grouping: Grouping, roles: Roles, report: Report) -> None:
    """Bring the graph into the grouping's order and make a region of every group."""
    vertices = grouping.vertices()
    members = {vertex: grouping.members(vertex) for vertex in vertices}
    end = program.graph.output_node()
    for vertex in vertices:
        for node in members[vertex]:
            end.prepend(node)
    used: dict[str, int] = {}
    for vertex in vertices:
        if vertex.family:
            name = region_name(members[vertex], roles)
            used[name] = used.get(name, -1) + 1
            name += f"_{used[name]}" if used[name] else ""
            listed = ", ".join(f"%{node}" for node in members[vertex])
            updated = _updated(vertex.root, roles)
            call = outline(program.module, members[vertex], Region("kernel", vertex.family), name)
            if updated is not None:
                call.meta["region"] = Region("kernel", vertex.family, call.args.index(updated))
            report.change(call, f"one {vertex.family} kernel computes {listed}")


def _updated(root: fx.Node | None, roles: Roles) -> fx.Node | None:
    """The operand that an anchor updates in place, if it does."""
    anchor = roles.anchors.get(root.target) if root is not None else None
    if root is None or anchor is None or anchor.updates is None:
        return None
    operand = root.args[anchor.updates]
    assert isinstance(operand, fx.Node), f"{root} updates an operand that is no tensor"
    return operand


def region_name(nodes: list[fx.Node], roles: Roles) -> str:
    """The operators in order, views only where there is nothing else: ``linear_gelu``, ``add_layer_norm``."""
    working = [node for node in nodes if part(node, roles) not in ("view", "item")]
    words: list[str] = []
    for node in working or nodes:
        word = operator_name(node).strip("_")
        word = re.sub(r"\W+", "_", _WORDS.get(word, word))
        if word != "getitem" and (not words or words[-1] != word):
            words.append(word)
    more = ["more"] if len(words) > _LONGEST else []
    return "_".join([*words[:_LONGEST], *more]) or "view"

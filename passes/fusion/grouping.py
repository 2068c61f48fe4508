"""The dependency graph of a grouping: vertices are groups of nodes, and merging two never makes a cycle.

The vertices keep a topological order that is repaired locally after a merge (Pearce and Kelly, "A dynamic topological
sort algorithm for directed acyclic graphs", 2006), so that the search for a path that leaves a group and comes back
stays between the places of the two vertices and does not walk the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx
from torch import fx


@dataclass(eq=False)
class Vertex:
    """A set of nodes that run as one: an operator not yet grouped, or a region to be.

    Attributes:
        nodes: the members.
        order: the place in the topological order of all vertices.
        family: the kernel family of a region; empty while undecided and for what stays as it is.
        root: the member that gives the kernel its iteration space (the anchor, if there is one).
        shape: logical shape of all results.
        allow: what operands of a member may cost per element; absent without limit.
        place: for members, how their index follows from the kernel's: ``"element"``, ``"row"`` or ``"other"``.
        reduced: members that are computed inside the loop of a reduction.
        reductions: the members that are reductions or windows.
        results: the members that are results by decision and not only because they end the chain.
    """

    nodes: list[fx.Node]
    order: int
    family: str = ""
    root: fx.Node | None = None
    shape: Any = None
    allow: dict[fx.Node, float] = field(default_factory=dict)
    place: dict[fx.Node, str] = field(default_factory=dict)
    reduced: set[fx.Node] = field(default_factory=set)
    reductions: list[fx.Node] = field(default_factory=list)
    results: set[fx.Node] = field(default_factory=set)


class Grouping:
    """The vertices of a graph's nodes (all but inputs and the output) and their dependencies."""

    def __init__(self, graph: fx.Graph) -> None:
        self.index: dict[fx.Node, int] = {}
        self.of: dict[fx.Node, Vertex] = {}
        self.dependencies: networkx.DiGraph = networkx.DiGraph()
        for position, node in enumerate(graph.nodes):
            self.index[node] = position
            if node.op in ("placeholder", "output"):
                continue
            vertex = self.of[node] = Vertex([node], position)
            self.dependencies.add_node(vertex)
            self._depend(vertex, node)

    def vertices(self) -> list[Vertex]:
        """All vertices in an order that respects every dependency and otherwise keeps the graph's order."""
        key = {vertex: max(self.index[node] for node in vertex.nodes) for vertex in self.dependencies}
        return list(networkx.lexicographical_topological_sort(self.dependencies, key=key.__getitem__))

    def members(self, vertex: Vertex) -> list[fx.Node]:
        """The nodes of a vertex, operands before users."""
        return sorted(vertex.nodes, key=self.index.__getitem__)

    def merge(self, other: Vertex, into: Vertex) -> bool:
        """Move the nodes of a vertex into another; refuses, changing nothing, if that would make a cycle."""
        first, last = sorted((other, into), key=lambda vertex: vertex.order)
        after = self._reach(first, last, self.dependencies.successors)
        if after is None:
            return False
        if after:
            before = self._reach(last, first, self.dependencies.predecessors) or set()
            self._reorder(before, (first, last), after)
        else:
            first.order = last.order
        into.order = last.order
        for source in list(self.dependencies.predecessors(other)):
            if source is not into:
                self.dependencies.add_edge(source, into)
        for target in list(self.dependencies.successors(other)):
            if target is not into:
                self.dependencies.add_edge(into, target)
        self.dependencies.remove_node(other)
        into.nodes.extend(other.nodes)
        for node in other.nodes:
            self.of[node] = into
        return True

    def duplicate(self, node: fx.Node, vertex: Vertex) -> fx.Node:
        """Give a vertex its own copy of an ungrouped node that it uses; returns the copy."""
        graph = node.graph
        with graph.inserting_after(node):
            copy = graph.node_copy(node)
        copy.meta = dict(node.meta)
        self.index[copy] = self.index[node]
        for user in [user for user in node.users if self.of.get(user) is vertex]:
            user.replace_input_with(node, copy)
        self.of[copy] = vertex
        vertex.nodes.append(copy)
        self._depend(vertex, copy)
        self.dependencies.remove_edge(self.of[node], vertex)
        return copy

    def remove(self, node: fx.Node) -> None:
        """Forget and erase an ungrouped node without users."""
        self.dependencies.remove_node(self.of.pop(node))
        node.graph.erase_node(node)

    def _depend(self, vertex: Vertex, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            source = self.of.get(operand)
            if source is not None and source is not vertex:
                self.dependencies.add_edge(source, vertex)

    def _reach(
        self, start: Vertex, end: Vertex, neighbours: Callable[[Vertex], Iterable[Vertex]]
    ) -> set[Vertex] | None:
        """What can be reached from ``start`` between the places of the two; None if ``end`` can be, through others."""
        low, high = sorted((start.order, end.order))
        pending = [vertex for vertex in neighbours(start) if vertex is not end and low < vertex.order < high]
        seen = set(pending)
        while pending:
            for vertex in neighbours(pending.pop()):
                if vertex is end:
                    return None
                if low < vertex.order < high and vertex not in seen:
                    seen.add(vertex)
                    pending.append(vertex)
        return seen

    @staticmethod
    def _reorder(before: set[Vertex], merged: tuple[Vertex, Vertex], after: set[Vertex]) -> None:
        """Give what must come before, the merged vertices and what must come after the places that they have, anew."""
        slots = sorted(vertex.order for vertex in (*before, *merged, *after))
        arranged = [*sorted(before, key=_order), *merged, *sorted(after, key=_order)]
        for vertex, slot in zip(arranged, slots, strict=True):
            vertex.order = slot


def _order(vertex: Vertex) -> int:
    return vertex.order

"""Loop kernels: every remaining operator is computed where it is read, or starts a kernel of its own.

The walk goes from the outputs to the inputs, so that the readers of a value are in their regions when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import fx

from ..graph.edit import same_shape, tensor_shape
from ..graph.query import aten
from ..graph.roles import Roles
from .grouping import Grouping, Vertex
from .legality import MASK, Admission, admit, takes_view, uses_in
from .operators import SHARED, cost, has_constant_root, is_generated, part

RESULTS = 3  # results of one kernel
COPIES = 3  # regions that compute one cheap value each for themselves

Refuse = Callable[[fx.Node, str], None]
_TO = aten._to_copy.default
_ANYWHERE = Admission(inf, "other", False)


class LoopFusion:
    """Places everything that is no anchor."""

    def __init__(self, grouping: Grouping, roles: Roles, refuse: Refuse) -> None:
        self.grouping = grouping
        self.roles = roles
        self.refuse = refuse

    def run(self, nodes: Sequence[fx.Node]) -> None:
        """Place the nodes, given in graph order."""
        for node in reversed(nodes):
            vertex = self.grouping.of.get(node)
            if vertex is None or vertex.family:
                continue
            what = part(node, self.roles)
            if what == "view":
                self._view(node)
            elif what in ("pointwise", "assembled", "gather", "reduction", "window"):
                self._operator(node, what)

    def _readers(self, node: fx.Node) -> tuple[list[Vertex], bool]:
        """The regions that read a node, and whether something reads it that needs it in memory."""
        regions: dict[Vertex, None] = {}
        outside = False
        for user in node.users:
            vertex = self.grouping.of.get(user)
            if vertex is not None and vertex.family:
                regions[vertex] = None
            else:
                outside = True
        return list(regions), outside

    # -- views ---------------------------------------------------------------------------------------------------------

    def _view(self, node: fx.Node) -> None:
        """Every reader gets a view of its own; if one cannot, or there are others, all read a copy in memory."""
        regions, stored = self._readers(node)
        constant = has_constant_root(node, self.roles)
        for region in regions:
            reason = takes_view(region, node, constant, self.roles)
            if reason is not None:
                self.refuse(node, reason)
                stored = True
        if stored and not isinstance(node.meta["val"], tuple | list):
            self._start(node)
            return
        for region in regions[1:]:
            _enter(region, self.grouping.duplicate(node, region), _ANYWHERE)
        self.grouping.merge(self.grouping.of[node], regions[0])
        _enter(regions[0], node, _ANYWHERE)

    # -- operators -----------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node, what: str) -> None:
        items = [user for user in node.users if part(user, self.roles) == "item"]
        if items:
            self._start(node, items)
            return
        regions, stored = self._readers(node)
        answers = {region: admit(region, node, self.roles) for region in regions}
        if not stored and len(regions) == 1:
            (region,) = regions
            answer = answers[region]
            if isinstance(answer, Admission):
                self.grouping.merge(self.grouping.of[node], region)
                _enter(region, node, answer, reduces=what in ("reduction", "window"))
                return
            self.refuse(node, answer)
        elif not stored and not _reasons(answers) and (left := self._left_after(node, what, answers)) >= 0:
            for region, answer in answers.items():
                assert isinstance(answer, Admission)
                copy = self.grouping.duplicate(node, region)
                _enter(region, copy, Admission(min(answer.allow, left), answer.place, answer.reduced))
            self.grouping.remove(node)
            return
        elif regions:
            if self._as_result(node, what, answers):
                return
            self.refuse(node, _reasons(answers) or "has other users")
        self._start(node)

    def _left_after(self, node: fx.Node, what: str, answers: dict[Vertex, Admission | str]) -> float:
        """What the operands may cost when several regions each compute the value; negative if they should not.

        They may where it follows from positions alone, or is one cheap step from one operand and read once.
        """
        price = cost(node, what)
        if what == "pointwise" and is_generated(node):
            return MASK - price
        large = [operand for operand in node.all_input_nodes if _is_large(operand)]
        once = all(isinstance(answer, Admission) and answer.allow == inf for answer in answers.values())
        return SHARED - price if what == "pointwise" and once and len(large) <= 1 and len(answers) <= COPIES else -inf

    def _as_result(self, node: fx.Node, what: str, answers: dict[Vertex, Admission | str]) -> bool:
        """Compute the value in the kernel of its first reader and store it there, for the others."""
        for region in sorted(answers, key=lambda region: region.order):
            answer = answers[region]
            if what not in ("pointwise", "assembled", "gather") and not _converts(region, node):
                continue
            if region.family != "loop" or not isinstance(answer, Admission) or answer.place != "element":
                continue
            if not same_shape(tensor_shape(node), region.shape) or len(region.results) + 2 > RESULTS:
                continue
            if any(use.path for use in uses_in(region, node, self.roles)):
                continue
            if not self.grouping.merge(self.grouping.of[node], region):
                self.refuse(node, f"would make a cycle with {region.root}")
                continue
            _enter(region, node, answer, reduces=what in ("reduction", "window"))
            region.results.add(node)
            return True
        return False

    def _start(self, node: fx.Node, items: Sequence[fx.Node] = ()) -> None:
        """Begin a loop region that ends in the node."""
        vertex = self.grouping.of[node]
        for item in items:
            self.grouping.merge(self.grouping.of[item], vertex)
        shape = tensor_shape(items[0] if items else node)
        vertex.family, vertex.root, vertex.shape = "loop", node, shape
        reduces = part(node, self.roles) in ("reduction", "window")
        for member in (node, *items):
            _enter(vertex, member, Admission(inf, "element", False), reduces=reduces and member is node)


def _reasons(answers: dict[Vertex, Admission | str]) -> str:
    return next((answer for answer in answers.values() if isinstance(answer, str)), "")


def _converts(region: Vertex, node: fx.Node) -> bool:
    """Whether a region is nothing but the conversion of a value to another type: its kernel stores both."""
    return region.nodes == [region.root] and region.root is not None and region.root.target is _TO


def _is_large(operand: fx.Node) -> bool:
    """Whether an operand is a tensor that some kernel has to load from memory."""
    value = operand.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and not is_generated(operand)


def _enter(vertex: Vertex, node: fx.Node, admission: Admission, *, reduces: bool = False) -> None:
    vertex.allow[node] = admission.allow
    vertex.place[node] = admission.place
    if admission.reduced:
        vertex.reduced.add(node)
    if reduces:
        vertex.reductions.append(node)

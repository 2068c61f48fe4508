"""What a region may take in: whether a value can be computed inside the kernel that reads it.

Inside a kernel values are functions of an index: a value is computed wherever it is read. That is free where each
element is read once, and where a row kernel keeps what several passes over a row read; everything else must be cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from torch import fx

from ..graph.edit import same_shape, tensor_shape
from ..graph.layouts import BLOCKED, reads_image
from ..graph.ops import ROTARY_EMBEDDING
from ..graph.query import arguments, aten
from ..graph.roles import Roles
from .grouping import Vertex
from .operators import MANY, cost, is_row_of, operator_name, part, reads_once, reduction_kind

LONGEST = 48  # operators in one kernel
MASK = 4  # what an element of an attention mask may cost


@dataclass(frozen=True)
class Use:
    """One way in which a member of a region reads a value: the views on the way, the reader, what it is given."""

    path: tuple[fx.Node, ...]
    user: fx.Node
    operand: fx.Node


@dataclass(frozen=True)
class Admission:
    """How a value would be read inside a region (see ``Vertex`` for the fields)."""

    allow: float
    place: str
    reduced: bool


def uses_in(vertex: Vertex, node: fx.Node, roles: Roles) -> Iterator[Use]:
    """Every use of a node by members of a region, through the views between them."""
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, ())]
    while pending:
        current, path = pending.pop()
        for user in current.users:
            if user not in vertex.allow:
                continue
            if part(user, roles) in ("view", "item") and user is not vertex.root and user not in vertex.results:
                pending.append((user, (*path, user)))
            else:
                yield Use(path, user, current)


def takes_view(vertex: Vertex, node: fx.Node, constant: bool, roles: Roles) -> str | None:
    """Why a region cannot have a view of its own operand; None if it can."""
    for use in uses_in(vertex, node, roles):
        anchor = roles.anchors.get(use.user.target)
        if anchor is None:
            continue
        positions = _positions(use.user, use.operand)
        mask = anchor.family == "attention" and _is_mask(use.user, use.operand)
        if not mask and not set(positions) <= set(anchor.data):
            return f"{use.user} reads it as it lies in memory"
        if constant and anchor.family != "attention":
            return f"{use.user} packs the constant when the artifact is written"
        if anchor.family == "convolution" and reads_image(use.user, roles):
            return f"{use.user} reads {roles.image_layout}"
    return None


def admit(vertex: Vertex, node: fx.Node, roles: Roles) -> Admission | str:
    """Whether a value that only costs time can be computed where a region reads it; the reason if it cannot."""
    what = part(node, roles)
    uses = list(uses_in(vertex, node, roles))
    if len(vertex.nodes) >= LONGEST:
        return f"the kernel of {vertex.root} is long enough"
    before = next((use.user for use in uses if part(use.user, roles) == "anchor"), None)
    if before is not None and not (what in ("pointwise", "assembled") and _is_mask(before, uses[0].operand)):
        if not all(_converts_gathered(use, node, roles) or _inlines(use, node, what, roles) for use in uses):
            return f"{before} takes in nothing but views of its operands"
        if roles.anchors[before.target].again and _whole_cost(node, roles) > MANY:
            return f"every thread would compute it anew for its part of {before}"
        return Admission(inf, "other", False)
    if vertex.family != "loop" and what not in ("pointwise", "assembled"):
        return f"the kernel of {vertex.root} only takes in pointwise operators"
    price = cost(node, what)
    several = len({_signature(use.path) for use in uses}) > 1
    places, limits, reduced = set(), [inf], False
    for use in uses:
        place, limit = _read(vertex, use, several, roles)
        if price > limit:
            return _too_dear(vertex, use, roles)
        places.add(place)
        limits.append(limit - price)
        reduced |= use.user in vertex.reduced or part(use.user, roles) == "reduction"
    place = places.pop() if len(places) == 1 else "other"
    admission = Admission(min(limits), place, reduced)
    if what in ("reduction", "window"):
        return _refuse_reduction(vertex, node, uses, admission, roles) or admission
    return admission


def _read(vertex: Vertex, use: Use, several: bool, roles: Roles) -> tuple[str, float]:
    """(place of the operand's elements, what an element may cost) for one use."""
    user, operand = use.user, use.operand
    what = part(user, roles)
    place = vertex.place[user]
    limit = vertex.allow[user]
    many = min(limit, MANY)
    if several or any(operator_name(view).startswith(("expand", "broadcast_to")) for view in use.path):
        limit, where = many, "other"
    else:
        where = _through(use, place)
    if what == "anchor":
        return "other", MASK if _is_mask(user, operand) else -inf
    if what == "pointwise":
        shape = tensor_shape(user)
        if same_shape(tensor_shape(operand), shape):
            return where, limit
        if place == "element" and vertex.family == "loop" and is_row_of(tensor_shape(operand), shape):
            return ("row" if not use.path or _adds_axis(use) else "other"), limit
        return "other", many
    if what == "reduction" and user.args[0] is operand:
        kind = reduction_kind(user)
        aligned = same_shape(tensor_shape(operand), vertex.shape) and not use.path and not several
        if kind == "row":
            return ("element", limit) if aligned and place == "element" else ("other", many)
        if kind == "statistic" and aligned and place == "row":
            return "element", limit
    return "other", limit if reads_once(user, what, operand) else many


def _through(use: Use, place: str) -> str:
    """The place of a value read through views."""
    return place if not use.path or (place == "row" and _adds_axis(use)) else "other"


def _adds_axis(use: Use) -> bool:
    """Whether the only view on the way gives the value a last axis of size one."""
    shape = tensor_shape(use.operand)
    before = use.path[0].args[0]
    assert isinstance(before, fx.Node)
    return len(use.path) == 1 and same_shape(shape, (*tensor_shape(before), 1))


def _refuse_reduction(vertex: Vertex, node: fx.Node, uses: list[Use], admission: Admission, roles: Roles) -> str | None:
    kind = "window" if part(node, roles) == "window" else reduction_kind(node)
    others = vertex.reductions
    rows = all(part(other, roles) == "reduction" and reduction_kind(other) in ("row", "statistic") for other in others)
    whole = same_shape(tensor_shape(node), vertex.shape) and not any(use.path for use in uses)
    if kind == "row" and rows and whole and admission.place == "element" and not admission.reduced:
        return None
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    if kind == "statistic" and rows and admission.place == "row":
        return None if same_shape(tensor_shape(operand), vertex.shape) else f"{vertex.root} walks other rows"
    if others:
        return f"{others[0]} in the same kernel reduces as well"
    if admission.reduced or any(not _keeps_elements(use) for use in uses):
        return f"would be recomputed for every element of {uses[0].user}"
    value = node.meta["val"]
    if isinstance(value, tuple | list):
        return "it has several results"
    return None if admission.allow == inf else f"would be recomputed for every element of {uses[0].user}"


def _keeps_elements(use: Use) -> bool:
    """Whether a reader has exactly the elements that the value has: the same shape, or regrouped and reordered."""
    regrouped = ("reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "flatten")
    return same_shape(tensor_shape(use.operand), tensor_shape(use.user)) or operator_name(use.user) in regrouped


def _too_dear(vertex: Vertex, use: Use, roles: Roles) -> str:
    if part(use.user, roles) == "window":
        return f"would be recomputed for every window of {use.user}"
    return f"would be recomputed for every element of {use.user}"


def _signature(path: tuple[fx.Node, ...]) -> tuple[str, ...]:
    return tuple(f"{view.target}{view.args[1:]}{view.kwargs}" for view in path)


def _positions(user: fx.Node, operand: fx.Node) -> list[int]:
    """Where an operand stands among the arguments; -1 for a keyword."""
    found = [position for position, argument in enumerate(user.args) if argument is operand]
    return found + [-1 for argument in user.kwargs.values() if argument is operand]


def _converts_gathered(use: Use, node: fx.Node, roles: Roles) -> bool:
    """Whether a value is the conversion of an image that a convolution on a CPU gathers element by element anyway."""
    anchor = roles.anchors.get(use.user.target)
    if node.target is not aten._to_copy.default or anchor is None or anchor.family != "convolution":
        return False
    gathers = roles.image_layout == BLOCKED and not reads_image(use.user, roles)
    return gathers and _positions(use.user, use.operand) == [0]


def _inlines(use: Use, node: fx.Node, what: str, roles: Roles) -> bool:
    """Whether an anchor reads each element of a value once and may compute it then."""
    anchor = roles.anchors.get(use.user.target)
    if anchor is None or (what != "pointwise" and node.target is not ROTARY_EMBEDDING):
        return False
    repeats = any(operator_name(view).startswith(("expand", "broadcast_to")) for view in use.path)
    return not repeats and set(_positions(use.user, use.operand)) <= set(anchor.inlines)


def _whole_cost(node: fx.Node, roles: Roles) -> int:
    """What an element costs with the pointwise operators that are computed for nothing else; counted up to MANY."""
    pending, seen, price = [node], set(), 0
    while pending and price <= MANY:
        current = pending.pop()
        what = part(current, roles)
        if current in seen or what not in ("pointwise", "view") or (current is not node and len(current.users) > 1):
            continue
        seen.add(current)
        price += cost(current, what)
        pending.extend(current.all_input_nodes)
    return price


def _is_mask(user: fx.Node, operand: fx.Node) -> bool:
    given = arguments(user)
    others = (given.get("query"), given.get("key"), given.get("value"))
    return given.get("attn_mask") is operand and operand not in others

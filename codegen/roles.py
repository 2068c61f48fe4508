"""The table that fusion works from, derived from the lowerings and the kernel families."""

from __future__ import annotations

from ..passes.graph import ops as tilewright_ops  # noqa: F401 - registers our operators
from ..passes.graph.roles import Anchor, Roles
from .c import attention, convolution, matmul
from .registry import all_lowerings
from .values import LANES

_ANCHORS = {
    **dict.fromkeys(matmul.LINEAR | matmul.PRODUCTS, Anchor("matmul", (0, 1))),
    **dict.fromkeys(matmul.ADDED, Anchor("matmul", (1, 2))),
    **dict.fromkeys(convolution.TARGETS, Anchor("convolution", (0,))),
    **dict.fromkeys(attention.TARGETS, Anchor("attention", (0, 1, 2), epilogue=False, tail=True)),
}


def fusion_roles() -> Roles:
    """The operators that kernels can be made of."""
    groups: dict[str, set[object]] = {}
    for target, lowering in all_lowerings().items():
        groups.setdefault(lowering.role, set()).add(target)
    plain = {role: frozenset(groups.get(role, ())) for role in ("pointwise", "view", "gather", "reduction", "window")}
    return Roles(**plain, anchors=dict(_ANCHORS), lanes=LANES)

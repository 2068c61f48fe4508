"""The table that fusion works from, derived from the lowerings and the kernel families."""

from __future__ import annotations

from dataclasses import replace

from ..passes.graph import ops as tilewright_ops  # noqa: F401 - registers our operators
from ..passes.graph.roles import Anchor, Roles
from . import quantized
from .c import attention, cache_append, convolution, matmul, paged_attention
from .registry import all_lowerings
from .values import LANES

DEVICES = ("cpu", "cuda")
"""The kinds of device that code is generated for; passes and lowering run once per kind."""

_ANCHORS = {
    **dict.fromkeys(matmul.LINEAR | matmul.PRODUCTS | matmul.INTEGER, Anchor("matmul", (0, 1))),
    **dict.fromkeys(matmul.ADDED, Anchor("matmul", (1, 2))),
    **dict.fromkeys(convolution.TARGETS, Anchor("convolution", (0,))),
    **dict.fromkeys(attention.TARGETS, Anchor("attention", (0, 1, 2), epilogue=False, tail=True)),
    **dict.fromkeys(cache_append.TARGETS, Anchor("cache_append", (1,), epilogue=False, inlines=(1,), updates=0)),
    **dict.fromkeys(paged_attention.TARGETS, Anchor("paged_attention", (0,), epilogue=False, tail=True, inlines=(0,))),
    **dict.fromkeys(quantized.TARGETS, Anchor("quantized", (0,), inlines=(0,))),
}


def fusion_roles(device: str = "cpu") -> Roles:
    """The operators that kernels can be made of.

    Args:
        device: the kind of device, ``"cpu"`` or ``"cuda"``; what one has no kernel for is missing from its table.
    """
    if device not in DEVICES:
        raise ValueError(f"there is no kind of device {device!r}; expected one of {', '.join(DEVICES)}")
    groups: dict[str, set[object]] = {}
    for target, lowering in all_lowerings().items():
        groups.setdefault(lowering.role, set()).add(target)
    pointwise, view, gather, reduction, window = (
        frozenset(groups.get(role, ())) for role in ("pointwise", "view", "gather", "reduction", "window")
    )
    anchors, image_layout = dict(_ANCHORS), "channels_last"
    if device == "cpu":  # a unit is one panel of the weight: whoever takes some of them quantizes the rows first
        anchors |= {target: replace(anchors[target], again=True) for target in quantized.TARGETS}
        image_layout = "channels16"
    return Roles(pointwise, view, gather, reduction, window, anchors, image_layout, LANES)

"""How values lie in memory: the layouts by name, which region result has which, and which convolutions read blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .query import arguments, aten
from .regions import is_region

ROWS = "rows"  # the last axis is contiguous
BLOCKED = "channels16"  # [N][ceil(C/16)][H][W][16], the last block filled up


def layout_of(value: fx.Node) -> str:
    """The layout of a value; everything but the results of annotated regions lies in rows."""
    region, position = value, 0
    if value.op == "call_function" and value.args and isinstance(value.args[0], fx.Node) and is_region(value.args[0]):
        region, index = value.args[0], value.args[1]
        assert isinstance(index, int)
        position = index
    layouts = region.meta.get("layouts")
    return layouts[position] if layouts else ROWS


def has_channels(value: fx.Node) -> bool:
    """Whether a value is one that may lie in blocks: batch, channels, height, width."""
    meta = value.meta.get("val")
    return isinstance(meta, torch.Tensor) and meta.dim() == 4


def reads_blocks(convolution: fx.Node, lanes: int) -> bool:
    """Whether a convolution of a channels-blocked image has a kernel of its own.

    Dense ones and groups of whole blocks, with at least a block of channels, and one filter per channel; in two
    dimensions, not transposed. The others gather their input through its index function, however it lies.
    """
    image, weight = convolution.args[:2]
    assert isinstance(image, fx.Node) and isinstance(weight, fx.Node)
    given: dict[str, Any] = arguments(convolution)
    channels, outputs, groups = image.meta["val"].shape[1], weight.meta["val"].shape[0], given.get("groups", 1)
    if not has_channels(image) or not isinstance(channels, int) or channels < lanes:
        return False
    if given.get("transposed", False) or convolution.target is aten.conv_transpose2d.input:
        return False
    if groups == channels == outputs:
        return True
    return groups == 1 or (channels // groups % lanes == 0 and outputs // groups % (2 * lanes) == 0)

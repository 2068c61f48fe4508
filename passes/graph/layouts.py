"""How values lie in memory: the layouts by name, which region result has which, and what convolutions want to read.

Kernels for CPUs convolve blocks of 16 channels of float32 or bfloat16 ("channels16"), those for GPUs pixels with all
their channels ("channels_last"), of any dtype. ``Roles.image_layout`` says which of them counts.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .query import arguments, aten
from .regions import is_region
from .roles import Roles

ROWS = "rows"  # the last axis is contiguous
BLOCKED = "channels16"  # [N][ceil(C/16)][H][W][16], the last block filled up
CHANNELS_LAST = "channels_last"  # [N][H][W][C]
BLOCKED_DTYPES = (torch.float32, torch.bfloat16)


def layout_of(value: fx.Node) -> str:
    """The layout of a value; everything but the results of annotated regions lies in rows."""
    region, position = value, 0
    if value.target is operator.getitem and isinstance(value.args[0], fx.Node) and is_region(value.args[0]):
        region, index = value.args[0], value.args[1]
        assert isinstance(index, int)
        position = index
    layouts = region.meta.get("layouts")
    return layouts[position] if layouts else ROWS


def has_channels(value: fx.Node) -> bool:
    """Whether a value is one that may lie as an image: batch, channels, height, width."""
    meta = value.meta.get("val")
    return isinstance(meta, torch.Tensor) and meta.dim() == 4


def refuse_layout(value: fx.Node, roles: Roles) -> str | None:
    """Why a value cannot lie in the layout of images; None if it can."""
    meta = value.meta["val"]
    channels = meta.shape[1]
    if roles.image_layout != BLOCKED:
        return None
    if meta.dtype not in BLOCKED_DTYPES:
        return f"blocks of channels are float32 or bfloat16, this is {str(meta.dtype).removeprefix('torch.')}"
    if not isinstance(channels, int) or channels < roles.lanes:
        return f"{channels} channels do not fill a block of {roles.lanes}"
    return None


def reads_image(convolution: fx.Node, roles: Roles) -> bool:
    """Whether the kernel of a convolution reads its image in the layout of images only.

    Dense ones and groups of whole blocks, with at least a block of channels, and one filter per channel; in two
    dimensions, not transposed. The others gather their input through its index function, however it lies.
    """
    image, weight = convolution.args[:2]
    assert isinstance(image, fx.Node) and isinstance(weight, fx.Node)
    given: dict[str, Any] = arguments(convolution)
    channels, outputs, groups = image.meta["val"].shape[1], weight.meta["val"].shape[0], given.get("groups", 1)
    lanes = roles.lanes
    if not has_channels(image) or not isinstance(channels, int) or channels < lanes:
        return False
    if given.get("transposed", False) or convolution.target is aten.conv_transpose2d.input:
        return False
    if groups == channels == outputs:
        return True
    if roles.image_layout == CHANNELS_LAST:
        return channels // groups >= lanes
    return groups == 1 or (channels // groups % lanes == 0 and outputs // groups % (2 * lanes) == 0)


def prefers_image(convolution: fx.Node, roles: Roles) -> bool:
    """Whether a convolution is faster where its image lies so, but not by enough to pay for a copy."""
    image = convolution.args[0]
    assert isinstance(image, fx.Node)
    return roles.image_layout == CHANNELS_LAST and has_channels(image)

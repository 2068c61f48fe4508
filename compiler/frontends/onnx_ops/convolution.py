"""Convolutions of one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .registry import Node, operator
from .windows import Windows

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv")
def conv(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolution (cross-correlation) of x (N, C, spatial...) with weight (M, C / group, kernel...)."""
    windows = Windows.of(node, x, weight.shape[2:])
    function, group = _CONV[len(windows.kernel)], node.get("group", 1)
    if windows.symmetric:
        return function(x, weight, bias, windows.strides, windows.begins, windows.dilations, group)
    return function(windows.pad(x, 0), weight, bias, windows.strides, 0, windows.dilations, group)


@operator("ConvTranspose")
def conv_transpose(node: Node, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Transposed convolution of x (N, C, spatial...) with weight (C, M / group, kernel...)."""
    windows = _transposed_windows(node, x, weight)
    function, group, rank = _TRANSPOSED[len(windows.kernel)], node.get("group", 1), len(windows.kernel)
    extra = list(node.get("output_padding") or [0] * rank)
    if node.get("output_shape"):
        extra = [0] * rank
    plain = zip(extra, windows.strides, windows.dilations, strict=True)
    if windows.symmetric and all(n >= 0 for n in windows.begins) and all(n < max(s, d) for n, s, d in plain):
        return function(x, weight, bias, windows.strides, windows.begins, extra, group, windows.dilations)
    full = function(x, weight, None, windows.strides, 0, 0, group, windows.dilations)
    crop = [n for i in reversed(range(rank)) for n in (-windows.begins[i], extra[i] - windows.ends[i])]
    full = F.pad(full, crop)
    return full if bias is None else full + bias.reshape(-1, *[1] * rank)


def _transposed_windows(node: Node, x: torch.Tensor, weight: torch.Tensor) -> Windows:
    """Padding of a transposed convolution, which may be given by the output's shape."""
    plain = Windows.of(_Without(node, "auto_pad"), x, weight.shape[2:])
    mode, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(x.shape[2:], plain.strides, strict=True)]
    if wanted is None:
        return plain
    extra = node.get("output_padding") or [0] * len(plain.kernel)
    begins, ends = [], []
    for i, size in enumerate(wanted[-len(plain.kernel) :]):
        total: Any = plain.strides[i] * (x.shape[i + 2] - 1) + extra[i] + plain.reach[i] - size
        small = total // 2
        begins.append(small if mode == "SAME_UPPER" else total - small)
        ends.append(total - small - extra[i] if mode == "SAME_UPPER" else small - extra[i])
    return Windows(plain.kernel, plain.strides, plain.dilations, tuple(begins), tuple(ends))


class _Without:
    """A node without one of its attributes."""

    def __init__(self, node: Node, name: str) -> None:
        self._node, self._name = node, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def get(self, name: str, default: Any = None) -> Any:
        return default if name == self._name else self._node.get(name, default)


@operator("DeformConv", since=19)
def deform_conv(
    node: Node,
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolution whose taps are moved by learned offsets and read by bilinear interpolation (arXiv:1811.11168)."""
    windows = Windows.of(node, x, weight.shape[2:])
    if len(windows.kernel) != 2:
        raise ValueError("only two spatial dimensions are supported")
    n, channels, height, width = x.shape
    groups, parts = node.get("group", 1), node.get("offset_group", 1)
    rows, columns = offset.shape[2:]
    kh, kw = windows.kernel
    taps = kh * kw
    move = offset.reshape(n, parts, taps, 2, rows, columns)
    y = _base(rows, kh, windows, 0).reshape(kh, 1, rows, 1).expand(kh, kw, rows, 1).reshape(taps, rows, 1)
    z = _base(columns, kw, windows, 1).reshape(1, kw, 1, columns).expand(kh, kw, 1, columns).reshape(taps, 1, columns)
    sampled = _bilinear(
        x.reshape(n, parts, channels // parts, height * width),
        height,
        width,
        y + move[:, :, :, 0],
        z + move[:, :, :, 1],
    )
    if mask is not None:
        sampled = sampled * mask.reshape(n, parts, 1, taps, rows, columns)
    sampled = sampled.reshape(n, groups, channels // groups, taps, rows, columns)
    kernel = weight.reshape(groups, weight.shape[0] // groups, channels // groups, taps)
    result = torch.einsum("ngctyx,goct->ngoyx", sampled, kernel).reshape(n, -1, rows, columns)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


def _base(count: Any, kernel: int, windows: Windows, axis: int) -> torch.Tensor:
    """Where each tap of each window reads without offsets: (kernel, count)."""
    start = torch.arange(count) * windows.strides[axis] - windows.begins[axis]
    return (torch.arange(kernel)[:, None] * windows.dilations[axis] + start).to(torch.float32)


def _bilinear(x: torch.Tensor, height: Any, width: Any, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Values of x (N, G, C, H W) at fractional rows y and columns z (N, G, T, R, S); 0 outside."""
    n, parts, channels = x.shape[:3]
    top, left = torch.floor(y), torch.floor(z)
    total = torch.zeros((), dtype=x.dtype)
    for dy in (0, 1):
        for dz in (0, 1):
            row, column = top + dy, left + dz
            share = (1 - (y - row).abs()) * (1 - (z - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            flat = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).to(torch.int64)
            index = flat.reshape(n, parts, 1, -1).expand(n, parts, channels, -1)
            value = torch.gather(x, 3, index).reshape(n, parts, channels, *y.shape[2:])
            total = total + value * torch.where(inside, share, torch.zeros_like(share))[:, :, None]
    return total

"""Pools over sliding windows and over whole planes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .registry import Node, cast_to, operator
from .windows import Windows

_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _takes_padding(windows: Windows) -> bool:
    """Whether torch's pools accept this padding: alike on both ends and at most half the kernel."""
    return windows.symmetric and all(b <= k // 2 for b, k in zip(windows.begins, windows.kernel, strict=True))


@operator("MaxPool")
def max_pool(node: Node, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Largest element of each window; the second output holds its index in the whole flattened input."""
    windows = Windows.of(node, x, node.get("kernel_shape"))
    rank, sizes = len(windows.kernel), x.shape[2:]
    if node.get("ceil_mode", 0):
        windows = windows.rounded_up(sizes)
    values = x if x.is_floating_point() else cast_to(x, torch.float32 if x.dtype.itemsize < 4 else torch.float64)
    function, strides, dilations = _MAX[rank], windows.strides, windows.dilations
    wants_indices = len(node.outputs) > 1
    if _takes_padding(windows):
        result = function(values, windows.kernel, strides, windows.begins, dilations, return_indices=wants_indices)
        offsets, padded = [0] * rank, list(sizes)
    else:
        full = windows.pad(values, -math.inf)
        result = function(full, windows.kernel, strides, 0, dilations, return_indices=wants_indices)
        offsets, padded = list(windows.begins), list(full.shape[2:])
    if not wants_indices:
        return cast_to(result, x.dtype)
    best, plane = result
    return cast_to(best, x.dtype), _whole_index(x, plane, offsets, padded, bool(node.get("storage_order", 0)))


def _whole_index(
    x: torch.Tensor, plane: torch.Tensor, offsets: list, padded: list, columns_first: bool
) -> torch.Tensor:
    """Index within a padded plane, as index within the flattened tensor."""
    sizes, position = list(x.shape[2:]), []
    for n, offset in zip(reversed(padded), reversed(offsets), strict=True):
        position.append(plane % n - offset)
        plane = torch.div(plane, n, rounding_mode="floor")
    position.reverse()
    order = list(range(len(sizes)))
    order = order[::-1] if columns_first else order
    index = torch.zeros((), dtype=torch.int64)
    for axis in order:
        index = index * sizes[axis] + position[axis]
    first = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * len(sizes))
    return index + first * math.prod(sizes)


def _window_sum(x: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Sum of each window of an input whose padding is explicit already."""
    rank = len(windows.kernel)
    if all(d == 1 for d in windows.dilations):
        return _AVERAGE[rank](x, windows.kernel, windows.strides) * math.prod(windows.kernel)
    ones = torch.ones(1, 1, *windows.kernel, dtype=x.dtype)
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = _CONV[rank](planes, ones, None, windows.strides, 0, windows.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


@operator("AveragePool")
def average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Mean of each window, over the elements inside the input, or over padding too with count_include_pad."""
    windows = Windows.of(node, x, node.get("kernel_shape"))
    include, rank = bool(node.get("count_include_pad", 0)), len(windows.kernel)
    rounded = windows.rounded_up(x.shape[2:]) if node.get("ceil_mode", 0) else windows
    if _takes_padding(rounded) and all(d == 1 for d in rounded.dilations):
        padding = [int(n) for n in rounded.begins]
        return _AVERAGE[rank](x, rounded.kernel, rounded.strides, padding, False, include)
    counted = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    total = _window_sum(rounded.pad(x, 0), rounded)
    if include:  # declared padding counts, what ceil_mode adds beyond it does not
        counted = windows.pad(counted, 1)
        added = tuple(a - b for a, b in zip(rounded.ends, windows.ends, strict=True))
        nothing = (0,) * rank
        counted = Windows(rounded.kernel, rounded.strides, rounded.dilations, nothing, added).pad(counted, 0)
    else:
        counted = rounded.pad(counted, 0)
    return total / _window_sum(counted, rounded)


@operator("LpPool", since=2)
def lp_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """p-norm of each window."""
    windows, p = Windows.of(node, x, node.get("kernel_shape")), node.get("p", 2)
    if node.get("ceil_mode", 0):
        windows = windows.rounded_up(x.shape[2:])
    return _window_sum(windows.pad(x.abs() ** p, 0), windows) ** (1.0 / p)


def _planes(x: torch.Tensor) -> list[int]:
    return list(range(2, x.dim()))


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Mean of each plane."""
    return x.mean(_planes(x), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Largest element of each plane."""
    return x.amax(_planes(x), keepdim=True)


@operator("GlobalLpPool", since=2)
def global_lp_pool(node: Node, x: torch.Tensor) -> torch.Tensor:
    """p-norm of each plane."""
    p = node.get("p", 2)
    return (x.abs() ** p).sum(_planes(x), keepdim=True) ** (1.0 / p)


@operator("MaxUnpool", since=9, host=(2,))
def max_unpool(node: Node, x: torch.Tensor, indices: torch.Tensor, shape: Any = None) -> torch.Tensor:
    """Elements put back where a MaxPool took them from, in zeros."""
    windows = Windows.of(node, x, node.get("kernel_shape"))
    sizes = [
        (n - 1) * s + k - b - e
        for n, s, k, b, e in zip(
            x.shape[2:], windows.strides, windows.kernel, windows.begins, windows.ends, strict=True
        )
    ]
    own = [x.shape[0], x.shape[1], *sizes]
    full = own if shape is None else list(shape.values)
    flat = torch.zeros(math.prod(own), dtype=x.dtype).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(own)
    if shape is None:
        return flat
    return F.pad(flat, [n for a, b in zip(reversed(own), reversed(full), strict=True) for n in (0, b - a)])

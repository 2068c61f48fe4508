"""Resize and its relatives.

The cases that torch's own interpolation covers go to it; all others are separable products with a weight matrix per
axis, built from the operator's coordinate rule: https://onnx.ai/onnx/operators/onnx__Resize.html
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .host import Host
from .registry import Node, cast_to, normalize_axis, operator


@operator("Upsample", since=7, host=(1,))
def upsample(node: Node, x: torch.Tensor, scales: Host | None = None) -> torch.Tensor:
    """Deprecated form of Resize: asymmetric coordinates, rounded down."""
    factors = scales.values if scales is not None else list(node.get("scales"))
    sizes = [_scaled(n, factor) for n, factor in zip(x.shape, factors, strict=True)]
    return _resize(node, x, list(range(x.dim())), sizes, factors, None, "asymmetric", "floor")


@operator("Resize", since=10, host=(1,))
def resize_10(node: Node, x: torch.Tensor, scales: Host) -> torch.Tensor:
    """Before opset 11: asymmetric coordinates; nearest rounds down."""
    sizes = [_scaled(n, factor) for n, factor in zip(x.shape, scales.values, strict=True)]
    return _resize(node, x, list(range(x.dim())), sizes, scales.values, None, "asymmetric", "floor")


@operator("Resize", since=11, host=(1, 2, 3))
def resize(
    node: Node, x: torch.Tensor, roi: Host | None = None, scales: Host | None = None, sizes: Host | None = None
) -> torch.Tensor:
    """Interpolated to sizes, or by scales, along some axes."""
    rank = x.dim()
    axes = [normalize_axis(axis, rank) for axis in node.get("axes", list(range(rank)))]
    if sizes is not None and sizes.size:
        factors, targets = _kept_aspect(node, [x.shape[axis] for axis in axes], sizes.values)
    elif scales is not None and scales.size:
        factors = list(scales.values)
        targets = [_scaled(x.shape[axis], factor) for axis, factor in zip(axes, factors, strict=True)]
    else:
        raise ValueError("neither scales nor sizes are given")
    mode = node.get("coordinate_transformation_mode", "half_pixel")
    region = roi.values if roi is not None and roi.size else None
    nearest = node.get("nearest_mode", "round_prefer_floor")
    return _resize(node, x, axes, targets, factors, region, mode, nearest)


def _scaled(size: Any, factor: float) -> Any:
    """floor(size * factor), in integers when the size is symbolic."""
    if isinstance(size, int):
        return math.floor(size * factor)
    exact = Fraction(factor).limit_denominator(4096)
    return size * exact.numerator // exact.denominator


def _kept_aspect(node: Node, own: list, wanted: list) -> tuple[list, list]:
    """Scales and sizes; with a keep_aspect_ratio_policy one scale, the largest that fits or smallest that covers."""
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [
            None if not (isinstance(a, int) and isinstance(b, int)) else b / a for a, b in zip(own, wanted, strict=True)
        ], wanted
    ratios = [b / a for a, b in zip(own, wanted, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [ratio] * len(own), [math.floor(n * ratio + 0.5) for n in own]


def _resize(
    node: Node, x: torch.Tensor, axes: list[int], sizes: list, factors: list, roi: list | None, mode: str, nearest: str
) -> torch.Tensor:
    kind = node.get("mode", "nearest")
    changed = [
        i
        for i, axis in enumerate(axes)
        if mode == "tf_crop_and_resize"
        or not _same(x.shape[axis], sizes[i])
        or (factors[i] is not None and factors[i] != 1)
    ]
    if not changed:
        return x
    native = _native(
        node, x, [axes[i] for i in changed], [sizes[i] for i in changed], [factors[i] for i in changed], mode, nearest
    )
    if native is not None:
        return native
    dtype = x.dtype
    if not x.is_floating_point() and kind != "nearest":
        x = cast_to(x, torch.float32)
    for i in changed:
        axis, own = axes[i], x.shape[axes[i]]
        factor = factors[i] if factors[i] is not None else torch.sym_float(sizes[i]) / own
        ends = (0.0, 1.0) if roi is None else (roi[i], roi[i + len(axes)])
        where = _coordinates(sizes[i], own, factor, mode, ends)
        if kind == "nearest":
            picked = x.index_select(axis, _nearest(where, nearest).clamp(0, own - 1))
        else:
            matrix = cast_to(_weights(node, where, own, factor, kind), x.dtype)
            picked = torch.matmul(x.movedim(axis, -1), matrix.t()).movedim(-1, axis)
        if mode == "tf_crop_and_resize":
            outside = ((where < 0) | (where > own - 1)).reshape(-1, *[1] * (x.dim() - 1 - axis))
            picked = torch.where(outside, torch.full((), node.get("extrapolation_value", 0.0), dtype=x.dtype), picked)
        x = picked
    return x if x.dtype == dtype else torch.round(x).to(dtype)


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _native(
    node: Node, x: torch.Tensor, axes: list, sizes: list, factors: list, mode: str, nearest: str
) -> torch.Tensor | None:
    """Torch's interpolation, where it computes the same thing: spatial axes of a batch of planes, sizes given."""
    kind, rank = node.get("mode", "nearest"), x.dim()
    if rank not in (3, 4, 5) or any(axis < 2 for axis in axes) or not x.is_floating_point() or node.get("antialias", 0):
        return None
    target = list(x.shape[2:])
    for axis, size in zip(axes, sizes, strict=True):
        target[axis - 2] = size
    whole = True  # every scale is a whole number and the size is exactly that many times the input's
    for axis, size, factor in zip(axes, sizes, factors, strict=True):
        own = x.shape[axis]
        if factor is not None and isinstance(size, int) and isinstance(own, int) and size != own * factor:
            return None  # coordinates follow the scale, torch's would follow the size
        whole = whole and factor is not None and float(factor).is_integer()
        if factor is not None and not isinstance(size, int) and not float(factor).is_integer():
            return None
    if kind == "nearest":
        # upsampling by a whole number: the pixel's own block, whatever the half-pixel rule rounds
        centred = mode in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric") and nearest.startswith("round")
        if (mode == "asymmetric" and nearest == "floor") or (whole and centred):
            return F.interpolate(x, size=target, mode="nearest")
        return None
    half = mode in ("half_pixel", "half_pixel_symmetric") or (
        mode == "pytorch_half_pixel" and all(isinstance(size, int) and size > 1 for size in sizes)
    )
    if not half and mode != "align_corners":
        return None
    if kind == "cubic" and (node.get("cubic_coeff_a", -0.75) != -0.75 or node.get("exclude_outside", 0) or rank != 4):
        return None
    name = "bicubic" if kind == "cubic" else {3: "linear", 4: "bilinear", 5: "trilinear"}[rank]
    if kind == "cubic" and len(axes) != 2:
        return None
    return F.interpolate(x, size=target, mode=name, align_corners=mode == "align_corners")


def _coordinates(size: Any, own: Any, factor: Any, mode: str, roi: tuple[float, float]) -> torch.Tensor:
    """Where each output position lies on the input axis; in float32, as scales are, so that ties fall alike."""
    position = torch.arange(size, dtype=torch.float32)
    if mode == "align_corners":
        return position * (own - 1) / (size - 1) if size != 1 else position * 0
    if mode == "asymmetric":
        return position / factor
    if mode == "tf_crop_and_resize":
        start, end = roi
        if size == 1:
            return position * 0 + (start + end) * (own - 1) / 2
        return position * ((end - start) * (own - 1) / (size - 1)) + start * (own - 1)
    if mode == "pytorch_half_pixel" and size == 1:
        return position * 0
    centred = (position + 0.5) / factor - 0.5
    if mode == "half_pixel_symmetric":
        return centred + own / 2 * (1 - size / (own * factor))
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return centred
    raise ValueError(f"coordinate_transformation_mode {mode!r} is not supported")


def _nearest(where: torch.Tensor, mode: str) -> torch.Tensor:
    rounded = {
        "floor": lambda: torch.floor(where),
        "ceil": lambda: torch.ceil(where),
        "round_prefer_floor": lambda: torch.ceil(where - 0.5),
        "round_prefer_ceil": lambda: torch.floor(where + 0.5),
    }
    return rounded[mode]().to(torch.int64)


def _weights(node: Node, where: torch.Tensor, own: Any, factor: Any, kind: str) -> torch.Tensor:
    """How much each input position gives to each output position: (outputs, inputs)."""
    shrink = min(factor, 1.0) if node.get("antialias", 0) else 1.0
    radius = 2 if kind == "cubic" else 1
    reach = math.ceil(radius / shrink)
    base = torch.floor(where)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    taps = base[:, None] + offsets
    distance = (taps - where[:, None]).abs() * shrink
    share = _cubic(distance, node.get("cubic_coeff_a", -0.75)) if kind == "cubic" else (1 - distance).clamp(min=0)
    if node.get("exclude_outside", 0):
        share = torch.where((taps < 0) | (taps > own - 1), torch.zeros_like(share), share)
    share = share / share.sum(1, keepdim=True)
    column = taps.clamp(0, own - 1).to(torch.int64)
    return torch.zeros(where.shape[0], own, dtype=torch.float32).scatter_add(1, column, share)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel (IEEE ASSP 29(6), 1981, eq. 4, with a free)."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


@operator("GridSample", since=16)
def grid_sample(node: Node, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """X (N, C, spatial...) read at the positions of a grid in [-1, 1]."""
    mode = node.get("mode", "bilinear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid, mode, node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0)))


@operator("AffineGrid", since=20, host=(1,))
def affine_grid(node: Node, theta: torch.Tensor, size: Host) -> torch.Tensor:
    """Grid of an affine map, for GridSample."""
    return F.affine_grid(theta, size.values, bool(node.get("align_corners", 0)))


@operator("RoiAlign", since=10)
def roi_align(node: Node, x: torch.Tensor, rois: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Regions of x (N, C, H, W) averaged (or maximised) over bilinear samples on a fixed grid (arXiv:1703.06870)."""
    ratio = node.get("sampling_ratio", 0)
    if ratio <= 0:
        raise ValueError("sampling_ratio must be positive: an adaptive number of samples depends on the data")
    height, width = node.get("output_height", 1), node.get("output_width", 1)
    half = node.opset >= 16 and node.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    boxes = rois * node.get("spatial_scale", 1.0) - (0.5 if half else 0.0)
    extent = boxes[:, 2:] - boxes[:, :2]
    extent = extent if half else extent.clamp(min=1.0)

    def samples(start: torch.Tensor, length: torch.Tensor, bins: int) -> torch.Tensor:
        steps = (torch.arange(bins * ratio, dtype=rois.dtype) + 0.5) / ratio
        return start[:, None] + steps * (length / bins)[:, None]

    y = samples(boxes[:, 1], extent[:, 1], height)[:, :, None]
    z = samples(boxes[:, 0], extent[:, 0], width)[:, None, :]
    values = _at(x, cast_to(batch, torch.int64), y, z, node.get("mode", "avg"))
    values = values.reshape(*values.shape[:2], height, ratio, width, ratio)
    return values.mean((3, 5)) if node.get("mode", "avg") == "avg" else values.amax((3, 5))


def _at(x: torch.Tensor, batch: torch.Tensor, y: torch.Tensor, z: torch.Tensor, mode: str) -> torch.Tensor:
    """Bilinear samples (R, C, Y, Z) of the batch row of each region; 0 more than a pixel outside."""
    height, width = x.shape[2:]
    inside = (y >= -1) & (y <= height) & (z >= -1) & (z <= width)
    y, z = y.clamp(0, height - 1), z.clamp(0, width - 1)
    top, left = torch.floor(y), torch.floor(z)
    parts = []
    for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, share_z in ((left, 1 - (z - left)), (left + 1, z - left)):
            r, c = torch.broadcast_tensors(
                row.clamp(max=height - 1).to(torch.int64), column.clamp(max=width - 1).to(torch.int64)
            )
            value = x[batch[:, None, None], :, r, c]  # (R, Y, Z, C)
            parts.append(value * torch.where(inside, share_y * share_z, 0.0)[..., None])
    total = torch.stack(parts)
    return (total.sum(0) if mode == "avg" else total.amax(0)).permute(0, 3, 1, 2)

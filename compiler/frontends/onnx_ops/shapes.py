"""Operators that change a tensor's shape or element type, not its values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import host as h
from .host import DTYPES as HOST_DTYPES
from .host import Host, NotOnHost
from .host_ops import split_sizes
from .registry import Node, as_tensor, axes_of, cast_to, normalize_axis, operator
from .tensors import torch_dtype


@operator("Shape", raw=True)
def shape(node: Node, x: Any) -> Host:
    """The sizes, of all axes or of a range of them."""
    sizes = list(x.shape)
    rank = len(sizes)
    start, end = node.get("start", 0), node.get("end", rank)
    start, end = (min(max(value + rank if value < 0 else value, 0), rank) for value in (start, end))
    return Host.of(sizes[start:end], torch.int64)


@operator("Size", raw=True)
def size(node: Node, x: Any) -> Host:
    """Number of elements."""
    return Host.of([math.prod(x.shape)], torch.int64, ())


@operator("Reshape", since=1, host=(1,))
def reshape(node: Node, x: torch.Tensor, target: Host | None = None) -> torch.Tensor:
    """Another shape; 0 copies a size (unless allowzero), -1 is what remains."""
    sizes = target.values if target is not None else list(node.get("shape"))
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if isinstance(n, int) and n == 0 else n for axis, n in enumerate(sizes)]
    elif any(isinstance(n, int) and n == 0 for n in sizes) and -1 in [n for n in sizes if isinstance(n, int)]:
        raise ValueError(f"shape {sizes} has both 0 and -1 with allowzero")
    return x.reshape(_infer(x, sizes))


def _infer(x: torch.Tensor, sizes: list[Any]) -> list[Any]:
    """The shape with -1 replaced where the rest says what it is: torch refuses it for tensors without elements."""
    if not any(isinstance(n, int) and n == -1 for n in sizes) or not any(
        isinstance(n, int) and n == 0 for n in x.shape
    ):
        return sizes
    known = math.prod(n for n in sizes if not (isinstance(n, int) and n == -1))
    return [(math.prod(x.shape) // known if known else 0) if isinstance(n, int) and n == -1 else n for n in sizes]


@operator("Flatten")
def flatten(node: Node, x: torch.Tensor) -> torch.Tensor:
    """A matrix, split at an axis."""
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze", host=(1,))
def squeeze(node: Node, x: torch.Tensor, axes: Host | None = None) -> torch.Tensor:
    """Without axes of size 1."""
    dims = axes_of(node, axes, x.dim())
    if dims is None:
        dims = [dim for dim, n in enumerate(x.shape) if statically_known_true(n == 1)]
    for dim in dims:
        if isinstance(x.shape[dim], int) and x.shape[dim] != 1:
            raise ValueError(f"axis {dim} of shape {list(x.shape)} is not of size 1")
    return x.reshape([n for dim, n in enumerate(x.shape) if dim not in dims]) if len(dims) > 1 else _squeeze(x, dims)


def _squeeze(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    return x.squeeze(dims[0]) if dims else x


@operator("Unsqueeze", host=(1,))
def unsqueeze(node: Node, x: torch.Tensor, axes: Host | None = None) -> torch.Tensor:
    """With new axes of size 1."""
    count = axes.size if axes is not None else len(node.get("axes"))
    for dim in sorted(axes_of(node, axes, x.dim() + count) or ()):
        x = x.unsqueeze(dim)
    return x


@operator("Transpose")
def transpose(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Permuted axes, reversed unless a permutation is given."""
    return x.permute(node.get("perm", list(range(x.dim()))[::-1]))


@operator("Expand", since=8, host=(1,))
def expand(node: Node, x: torch.Tensor, target: Host) -> torch.Tensor:
    """Broadcast in both directions: sizes of 1 in the shape keep the tensor's own."""
    wanted = target.values
    rank = max(len(wanted), x.dim())
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    return x.expand([_broadcast(a, b) for a, b in zip(own, wanted, strict=True)])


def _broadcast(own: Any, wanted: Any) -> Any:
    if statically_known_true(wanted == 1) or statically_known_true(own == wanted):
        return own
    if isinstance(wanted, torch.SymInt) and isinstance(own, int) and own != 1:
        return own  # a symbolic size is 1 or this one
    return wanted


@operator("Tile", since=6, host=(1,))
def tile(node: Node, x: torch.Tensor, repeats: Host) -> torch.Tensor:
    """Repeated along each axis."""
    return x.repeat(repeats.values)


@operator("Concat", since=4)
def concat(node: Node, *values: torch.Tensor) -> torch.Tensor:
    """Joined along an axis."""
    return torch.cat(values, normalize_axis(node.get("axis"), values[0].dim()))


@operator("Split", since=2, host=(1,))
def split(node: Node, x: torch.Tensor, sizes: Host | None = None) -> tuple[torch.Tensor, ...]:
    """Parts along an axis."""
    dim = normalize_axis(node.get("axis", 0), x.dim())
    return torch.split(x, split_sizes(node, x.shape[dim], sizes), dim)


@operator("DepthToSpace")
def depth_to_space(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Channels into blocks of pixels, depth-column-row (DCR) or column-row-depth (CRD)."""
    b = node.get("blocksize")
    n, c, height, width = x.shape
    if node.get("mode", "DCR") == "CRD":
        return torch.pixel_shuffle(x, b)
    blocks = x.reshape(n, b, b, c // (b * b), height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // (b * b), height * b, width * b)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Blocks of pixels into channels, depth-column-row (DCR) or column-row-depth (CRD)."""
    b = node.get("blocksize")
    n, c, height, width = x.shape
    blocks = x.reshape(n, c, height // b, b, width // b, b)
    order = (0, 3, 5, 1, 2, 4) if node.get("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.permute(order).reshape(n, c * b * b, height // b, width // b)


def _unknown_type(node: Node) -> str | None:
    element = node.get("to")
    try:
        torch_dtype(element)
    except Exception as error:  # the error's text is the reason
        return str(error)
    return "rounding to float8 other than up to the nearest" if node.get("round_mode", "up") != "up" else None


@operator("Cast", since=6, raw=True, refuse=_unknown_type)
def cast(node: Node, x: Any) -> Any:
    """Another element type; floats become integers by cutting towards zero."""
    return convert(x, torch_dtype(node.get("to")), bool(node.get("saturate", 1)))


@operator("CastLike", since=15, raw=True)
def cast_like(node: Node, x: Any, like: Any) -> Any:
    """The element type of another tensor."""
    return convert(x, like.dtype, bool(node.get("saturate", 1)))


def convert(x: Any, dtype: torch.dtype, saturate: bool) -> Any:
    """A value as another type; float8 overflows give the largest number when saturating."""
    if isinstance(x, Host) and dtype in HOST_DTYPES:
        try:
            return h.elementwise(lambda v: v != 0 if dtype == torch.bool else v, x, dtype=dtype)
        except (NotOnHost, OverflowError, ValueError):
            pass  # a float that no integer holds: torch's own conversion decides
    tensor = as_tensor(x)
    if dtype.is_floating_point and dtype.itemsize == 1 and tensor.dtype != dtype:
        return _to_float8(tensor.to(torch.float32), dtype, saturate)
    return cast_to(tensor, dtype)


def _to_float8(x: torch.Tensor, dtype: torch.dtype, saturate: bool) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    if saturate:
        return torch.where(torch.isnan(x), x, x.clamp(-largest, largest)).to(dtype)
    if dtype == torch.float8_e4m3fn:  # what would round beyond the largest number is NaN, for want of an infinity
        x = torch.where(x.abs() > largest + 16, torch.full((), math.nan), x)
    return x.to(dtype)


@operator("BitCast", since=26)
def bit_cast(node: Node, x: torch.Tensor) -> torch.Tensor:
    """The same bits as another type."""
    return x.view(torch_dtype(node.get("to")))

"""Gather, scatter, slices, padding and masks by position."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .host import SYMBOLIC, Host
from .host_ops import slice_parameters
from .registry import Node, as_tensor, axes_of, cast_to, normalize_axis, operator


@operator("Gather", raw=True)
def gather(node: Node, data: Any, indices: Any) -> torch.Tensor:
    """Slices by index along an axis; negative indices count from the end."""
    data = as_tensor(data)
    dim = normalize_axis(node.get("axis", 0), data.dim())
    if isinstance(indices, Host) and indices.rank == 0:
        return data.select(dim, indices.item())
    if isinstance(indices, Host) and indices.size == 1 and indices.rank == 1:
        index = indices.item()
        index = index if isinstance(index, SYMBOLIC) or index >= 0 else index + data.shape[dim]
        return data.narrow(dim, index, 1)
    index = as_tensor(indices)
    index = cast_to(index, torch.int64)
    return data[(slice(None),) * dim + (index,)]


def _from_front(index: torch.Tensor, size: Any) -> torch.Tensor:
    """Indices without negative ones, as int64."""
    index = cast_to(index, torch.int64)
    return torch.where(index < 0, index + size, index)


@operator("GatherElements", since=11)
def gather_elements(node: Node, data: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """One element per index along an axis."""
    dim = normalize_axis(node.get("axis", 0), data.dim())
    return torch.gather(data, dim, _from_front(indices, data.shape[dim]))


@operator("GatherND", since=11)
def gather_nd(node: Node, data: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Elements or slices by index tuples (the last axis of indices), below leading batch axes."""
    batch = node.get("batch_dims", 0)
    index: list[torch.Tensor] = []
    for axis in range(batch):
        shape = [data.shape[axis] if a == axis else 1 for a in range(indices.dim() - 1)]
        index.append(torch.arange(data.shape[axis]).reshape(shape))
    index.extend(cast_to(indices, torch.int64).select(-1, i) for i in range(indices.shape[-1]))
    return data[tuple(index)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("Scatter", since=9)
@operator("ScatterElements", since=11)
def scatter_elements(node: Node, data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """A copy with one element replaced, or combined, per index along an axis."""
    dim = normalize_axis(node.get("axis", 0), data.dim())
    index, reduction = _from_front(indices, data.shape[dim]), node.get("reduction", "none")
    if reduction == "none":
        return torch.scatter(data, dim, index, updates)
    return torch.scatter_reduce(data, dim, index, updates, _REDUCE[reduction], include_self=True)


@operator("ScatterND", since=11)
def scatter_nd(node: Node, data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """A copy with elements or slices replaced, or combined, by index tuples (the last axis of indices)."""
    reduction = node.get("reduction", "none")
    index = tuple(cast_to(indices, torch.int64).select(-1, i) for i in range(indices.shape[-1]))
    if reduction in ("none", "add"):
        return torch.index_put(data, index, updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    inner = data.shape[depth:]
    flat = torch.zeros((), dtype=torch.int64)
    for axis, part in enumerate(index):
        flat = flat * data.shape[axis] + _from_front(part, data.shape[axis])
    rows = data.reshape(-1, math.prod(inner))
    changed = torch.scatter_reduce(
        rows,
        0,
        flat.reshape(-1, 1).expand(-1, rows.shape[1]),
        updates.reshape(-1, rows.shape[1]),
        _REDUCE[reduction],
        include_self=True,
    )
    return changed.reshape(data.shape)


@operator("TensorScatter", since=24)
def tensor_scatter(
    node: Node, cache: torch.Tensor, update: torch.Tensor, write: torch.Tensor | None = None
) -> torch.Tensor:
    """A cache with a run of entries along an axis replaced, per batch row, from a start index; circular mode wraps."""
    dim = normalize_axis(node.get("axis", -2), cache.dim())
    offsets = torch.arange(update.shape[dim])
    start = torch.zeros(1, dtype=torch.int64) if write is None else cast_to(write, torch.int64)
    positions = start[:, None] + offsets
    if node.get("mode", "linear") == "circular":
        positions = torch.remainder(positions, cache.shape[dim])
    shape = [positions.shape[0], *[update.shape[dim] if axis == dim else 1 for axis in range(1, cache.dim())]]
    return torch.scatter(cache, dim, positions.reshape(shape).expand(update.shape), update)


@operator("Slice", since=1, host=(1, 2, 3, 4))
def slice_(node: Node, x: torch.Tensor, *parameters: Host | None) -> torch.Tensor:
    """A strided part along some axes; a negative step runs backwards."""
    starts, ends, axes, steps = slice_parameters(node, x.dim(), parameters)
    for start, end, dim, step in zip(starts, ends, axes, steps, strict=True):
        if isinstance(step, SYMBOLIC):
            raise ValueError("a slice's step cannot be a symbolic size")
        if step > 0:
            x = x[(slice(None),) * dim + (slice(start, _end(end, x.shape[dim]), step),)]
            continue
        # element i of the part is element last - i*|step| of the axis: flip, then step forwards
        size = x.shape[dim]
        first = torch.sym_min(start + size if start < 0 else start, size - 1)
        beyond = isinstance(end, int) and end <= -((1 << 31) - 1)  # before every start: spares a symbolic comparison
        last = -1 if beyond else torch.sym_max(end + size if end < 0 else end, -1)
        x = torch.flip(x, (dim,))[(slice(None),) * dim + (slice(size - 1 - first, size - 1 - last, -step),)]
    return x


def _end(end: Any, size: Any) -> Any:
    """None for an end beyond every size, which spares a symbolic comparison."""
    return None if isinstance(end, int) and end >= (1 << 31) - 1 else end


def _pad_mode(node: Node) -> str | None:
    known = ("constant", "reflect", "edge", "wrap")
    return None if node.get("mode", "constant") in known else f"padding mode {node.get('mode')!r}"


@operator("Pad", since=2, host=(1, 2, 3), refuse=_pad_mode)
def pad(
    node: Node, x: torch.Tensor, pads: Host | None = None, value: Host | None = None, axes: Host | None = None
) -> torch.Tensor:
    """Sizes changed at both ends of axes, by a constant, the edge, a reflection or around; negative cuts off."""
    amounts = pads.values if pads is not None else list(node.get("pads"))
    chosen = axes_of(node, axes, x.dim())
    dims = list(range(x.dim())) if chosen is None else chosen
    begins, ends = amounts[: len(dims)], amounts[len(dims) :]
    mode = node.get("mode", "constant")
    if mode == "constant":
        number = value.item() if value is not None and value.size else node.get("value", 0)
        both = {dim: (b, e) for dim, b, e in zip(dims, begins, ends, strict=True)}
        flat = [amount for dim in reversed(range(x.dim())) for amount in both.get(dim, (0, 0))]
        while len(flat) > 2 and all(isinstance(n, int) and n == 0 for n in flat[-2:]):
            flat = flat[:-2]
        return F.pad(x, flat, value=number)
    for dim, begin, end in zip(dims, begins, ends, strict=True):
        if isinstance(begin, int) and isinstance(end, int) and begin == 0 == end:
            continue
        x = x[(slice(None),) * dim + (_source(x.shape[dim], begin, end, mode),)]
    return x


def _source(size: Any, begin: Any, end: Any, mode: str) -> torch.Tensor:
    """For each position of a padded axis, the position it is copied from."""
    position = torch.arange(-begin, size + end)
    if mode == "edge":
        return position.clamp(torch.zeros((), dtype=torch.int64), torch.full((), size - 1, dtype=torch.int64))
    if mode == "wrap":
        return torch.remainder(position, size)
    period = torch.sym_max(2 * (size - 1), 1)
    folded = torch.remainder(position, period)
    return torch.minimum(folded, period - folded) if not isinstance(size, int) or size > 1 else folded * 0


@operator("Trilu", since=14, host=(1,))
def trilu(node: Node, x: torch.Tensor, k: Host | None = None) -> torch.Tensor:
    """The upper or lower triangle of matrices."""
    diagonal: Any = 0 if k is None else k.item()
    if isinstance(diagonal, SYMBOLIC):  # torch takes a plain number only
        column, row = torch.arange(x.shape[-1]), torch.arange(x.shape[-2])[:, None]
        bound: Any = diagonal
        keep = column - row >= bound if node.get("upper", 1) else column - row <= bound
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype))
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)


@operator("OneHot", since=9, host=(1,))
def one_hot(node: Node, indices: torch.Tensor, depth: Host, values: torch.Tensor) -> torch.Tensor:
    """A new axis with the on value at the index and the off value elsewhere; negative indices count from the end."""
    count: Any = depth.item()
    count = count if isinstance(count, SYMBOLIC) else int(count)
    dim = normalize_axis(node.get("axis", -1), indices.dim() + 1)
    index = cast_to(indices, torch.int64).unsqueeze(dim)
    line = torch.arange(count).reshape(-1, *[1] * (indices.dim() - dim))
    hit = (index == line) | (index + count == line)
    return torch.where(hit, values[1], values[0])


@operator("ReverseSequence", since=10)
def reverse_sequence(node: Node, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The first entries along the time axis reversed, as many as each batch row says."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    rows = x.transpose(0, time) if batch == 1 else x.transpose(0, 1)  # time first, batch second
    position = torch.arange(rows.shape[0])[:, None]
    count = cast_to(lengths, torch.int64)[None, :]
    source = torch.where(position < count, count - 1 - position, position)
    picked = rows[source, torch.arange(rows.shape[1])[None, :]]
    return picked.transpose(0, time) if batch == 1 else picked.transpose(0, 1)


@operator("NonZero", "Compress", late=True, raw=True)
def late(node: Node, *values: Any) -> Any:
    """Reached with tensors only: the output's size is in the data."""
    raise ValueError("the size of its output depends on the data of the model's inputs")


@operator("Col2Im", since=18, host=(1, 2))
def col2im(node: Node, x: torch.Tensor, image: Host, block: Host) -> torch.Tensor:
    """Overlapping blocks summed back into an image, of one or more dimensions."""
    sizes, kernel = image.values, block.values
    rank = len(sizes)
    dilations, strides = node.get("dilations", [1] * rank), node.get("strides", [1] * rank)
    pads = node.get("pads", [0] * 2 * rank)
    padded = [n + pads[i] + pads[i + rank] for i, n in enumerate(sizes)]
    counts = [(padded[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(rank)]
    n, c = x.shape[0], x.shape[1] // math.prod(kernel)
    blocks = x.reshape(n * c, math.prod(kernel) * math.prod(counts))
    where = torch.zeros((), dtype=torch.int64)
    for i in range(rank):
        line = torch.arange(kernel[i])[:, None] * dilations[i] + torch.arange(counts[i]) * strides[i]
        shape = [1] * (2 * rank)
        shape[i], shape[i + rank] = kernel[i], counts[i]
        where = where * padded[i] + line.reshape(shape)
    flat = torch.zeros(n * c, math.prod(padded), dtype=x.dtype)
    flat = flat.index_add(1, where.reshape(-1), blocks).reshape(n, c, *padded)
    for i in range(rank):
        flat = flat.narrow(i + 2, pads[i], sizes[i])
    return flat

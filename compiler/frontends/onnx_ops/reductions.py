"""Reductions over axes, the index of an extremum, and top-k."""

from __future__ import annotations

import torch

from .host import Host
from .registry import Node, axes_of, normalize_axis, operator

_NAMES = (
    "ReduceSum",
    "ReduceMean",
    "ReduceProd",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
)


@operator(*_NAMES, host=(1,))
def reduce(node: Node, x: torch.Tensor, axes: Host | None = None) -> torch.Tensor:
    """Reduce the axes given by an attribute or an input; none given means all, or none with noop_with_empty_axes."""
    dims = axes_of(node, axes, x.dim())
    keep = bool(node.get("keepdims", 1))
    if not dims:
        if node.get("noop_with_empty_axes", 0):
            return _apply(node.op_type, x, [], keep)
        dims = list(range(x.dim()))
    return _apply(node.op_type, x, dims, keep)


def _apply(name: str, x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    if name in ("ReduceL1", "ReduceL2", "ReduceSumSquare"):
        x = x.abs() if name == "ReduceL1" else x * x
    if name == "ReduceLogSumExp":
        return torch.logsumexp(x, dims, keep) if dims else x
    if name == "ReduceMean":
        if x.is_floating_point():
            return x.mean(dims, keep) if dims else x
        return x.to(torch.float64).mean(dims, keep).to(x.dtype) if dims else x
    if name in ("ReduceMax", "ReduceMin"):
        return _extremum(name, x, dims, keep)
    if name == "ReduceProd":
        for dim in sorted(dims, reverse=True):
            x = x.prod(dim, keepdim=keep, dtype=x.dtype)
        return x
    total = x.sum(dims, keepdim=keep, dtype=x.dtype) if dims else x
    return {"ReduceL2": torch.sqrt, "ReduceLogSum": torch.log}.get(name, lambda value: value)(total)


def _extremum(name: str, x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    if not dims:
        return x
    if any(
        isinstance(x.shape[dim], int) and x.shape[dim] == 0 for dim in dims
    ):  # torch refuses; ONNX gives the neutral value
        shape = [1 if axis in dims else size for axis, size in enumerate(x.shape) if keep or axis not in dims]
        if x.is_floating_point():
            neutral = float("-inf") if name == "ReduceMax" else float("inf")
        elif x.dtype == torch.bool:
            neutral = name == "ReduceMin"
        else:
            neutral = torch.iinfo(x.dtype).min if name == "ReduceMax" else torch.iinfo(x.dtype).max
        return torch.full(shape, neutral, dtype=x.dtype)
    return x.amax(dims, keep) if name == "ReduceMax" else x.amin(dims, keep)


@operator("ArgMax", "ArgMin")
def arg_extremum(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Index of the largest or smallest element along an axis, the first or the last of equal ones."""
    dim, keep = normalize_axis(node.get("axis", 0), x.dim()), bool(node.get("keepdims", 1))
    function = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    if node.get("select_last_index", 0):
        return x.shape[dim] - 1 - function(torch.flip(x, (dim,)), dim, keep)
    return function(x, dim, keep)


@operator("TopK", host=(1,))
def top_k(node: Node, x: torch.Tensor, k: Host | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest or smallest elements along an axis with their indices; equal ones in order of their index."""
    dim = normalize_axis(node.get("axis", -1), x.dim())
    count = int(k.item()) if k is not None else node.get("k")
    values, indices = torch.sort(x, dim=dim, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(dim, 0, count), indices.narrow(dim, 0, count)

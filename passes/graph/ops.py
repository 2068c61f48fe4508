"""Operators of our own: real torch operators in the namespace ``tilewright``, registered when this module is imported.

They are pure; each has an eager reference, so that a graph with them runs in PyTorch, and a fake implementation, so
that its shapes propagate. ATen's operators are preferred wherever one says the same thing.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op(
    "tilewright::rotary_embedding",
    mutates_args=(),
    schema="(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
)
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., "RoFormer", arXiv:2104.09864, equation 34): rotate pairs of columns.

    A pair is (column i, column i + dim/2), or (column 2i, column 2i + 1) when ``interleaved``. With one angle per pair
    the result is ``(a*cos - b*sin, b*cos + a*sin)`` in the places of the pair (a, b).

    Args:
        x: ``[..., seq, dim]``, floating point, ``dim`` even.
        cos: broadcastable to ``[..., seq, dim]``, one value per column, or to ``[..., seq, dim/2]``, one per pair.
        sin: like ``cos``, with the same number of columns.
        interleaved: which columns make a pair.

    Returns:
        A contiguous tensor of ``x``'s shape in the promoted dtype of the three.

    Raises:
        ValueError: ``dim`` is odd, or ``cos`` and ``sin`` have other last dimensions than these.
    """
    if _check(x, cos, sin):
        repeat = cos.shape[-1] != x.shape[-1]
        if interleaved:
            rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            cos, sin = (t.repeat_interleave(2, -1) if repeat else t for t in (cos, sin))
        else:
            rotated = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)
            cos, sin = (torch.cat((t, t), -1) if repeat else t for t in (cos, sin))
        x = x * cos + rotated * sin
    return x.clone(memory_format=torch.contiguous_format).to(result_dtype(x, cos, sin))


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    _check(x, cos, sin)
    return torch.empty(x.shape, dtype=result_dtype(x, cos, sin), device=x.device)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that pointwise arithmetic gives tensors of these dtypes (dimensions of size zero count too)."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether there is anything to rotate."""
    dim, columns = x.shape[-1], cos.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary_embedding: x has an odd last dimension, {dim}; pairs of columns are rotated")
    if columns not in (dim, dim // 2) or sin.shape[-1] != columns:
        raise ValueError(
            f"rotary_embedding: cos and sin have {columns} and {sin.shape[-1]} columns; x has {dim}, "
            f"so both must have {dim} or {dim // 2}"
        )
    return bool(dim)


ROTARY_EMBEDDING = torch.ops.tilewright.rotary_embedding.default

from . import cache_ops, quantized_ops  # noqa: E402, F401 - registers their operators

"""Attention and rotary position embeddings (opsets 23 to 25)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .registry import Node, cast_to, operator
from .tensors import torch_dtype


def _heads(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """(batch, sequence, heads * size) as (batch, heads, sequence, size)."""
    if x.dim() == 4:
        return x
    if not count:
        raise ValueError("three-dimensional inputs need q_num_heads and kv_num_heads")
    return x.reshape(x.shape[0], x.shape[1], count, x.shape[2] // count).transpose(1, 2)


@operator("Attention", since=23)
def attention(
    node: Node,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Scaled dot product attention with an optional mask, cache, window and soft cap.

    Q is (batch, heads, queries, size) or (batch, queries, heads * size), K and V likewise with as many heads or a
    divisor of them; the outputs are Y in Q's form, the present key and value, and the scores or probabilities.
    """
    flat, queries = q.dim() == 3, q.shape[-2]
    q, k, v = (_heads(x, node.get(f"{name}_num_heads")) for x, name in ((q, "q"), (k, "kv"), (v, "kv")))
    offset: torch.Tensor | int = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    elif lengths is not None:
        offset = (cast_to(lengths, torch.int64) - queries).reshape(-1, 1, 1, 1)
    wants_scores = len(node.outputs) > 3 and node.outputs[3]
    precision = node.get("softmax_precision")
    plain = not node.get("softcap", 0.0) and not wants_scores
    plain = plain and (precision is None or torch_dtype(precision) == q.dtype or q.dtype == torch.float32)
    grouped = bool(q.shape[1] != k.shape[1])
    causal_only = (
        bool(node.get("is_causal", 0)) and mask is None and lengths is None and isinstance(offset, int) and offset == 0
    )
    windowed = node.get("left_window_size", -1) >= 0 or node.get("right_window_size", -1) >= 0
    scale = node.get("scale")
    scores = None
    if plain and causal_only and not windowed:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        bias = _bias(node, q, k.shape[2], mask, offset, lengths)
        if plain:
            y = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=grouped)
        else:
            y, scores = _spelled_out(node, q, k, v, bias)
    if flat:
        y = y.transpose(1, 2).reshape(y.shape[0], queries, -1)
    return (y, k, v, scores)[: len(node.outputs)]


def _bias(
    node: Node,
    q: torch.Tensor,
    keys: int,
    mask: torch.Tensor | None,
    offset: torch.Tensor | int,
    lengths: torch.Tensor | None,
) -> torch.Tensor | None:
    """Everything that forbids or weighs a key, as one boolean or additive mask, or None."""
    allowed = None
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(keys)
    conditions = []
    if node.get("is_causal", 0):
        conditions.append(column <= row + offset)
    if node.get("left_window_size", -1) >= 0:
        conditions.append(row + offset - column <= node.get("left_window_size"))
    if node.get("right_window_size", -1) >= 0:
        conditions.append(column - row - offset <= node.get("right_window_size"))
    if lengths is not None:
        conditions.append(column < cast_to(lengths, torch.int64).reshape(-1, 1, 1, 1))
    for condition in conditions:
        allowed = condition if allowed is None else allowed & condition
    if mask is None:
        return allowed
    if mask.shape[-1] != keys:  # a symbolic pair that is equal in the sample leaves a guard that it always is
        mask = F.pad(mask, (0, keys - mask.shape[-1]), value=False if mask.dtype == torch.bool else -math.inf)
    if allowed is None:
        return mask
    if mask.dtype == torch.bool:
        return mask & allowed
    return torch.where(allowed, mask, torch.full((), -math.inf, dtype=mask.dtype))


def _spelled_out(
    node: Node, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step, for soft caps and for models that output its scores."""
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scale = node.get("scale")
    root = math.sqrt(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = torch.matmul(q * root, (k * root).transpose(2, 3))
    stages = [scores]
    cap = node.get("softcap", 0.0)
    scores = torch.tanh(scores / cap) * cap if cap else scores
    stages.append(scores)
    if bias is not None and bias.dtype == torch.bool:
        scores = torch.where(bias, scores, torch.full((), -math.inf, dtype=scores.dtype))
    elif bias is not None:
        scores = scores + bias
    stages.append(scores)
    precision = node.get("softmax_precision")
    wide = scores if precision is None else cast_to(scores, torch_dtype(precision))
    hidden = (wide == -math.inf).all(-1, keepdim=True)  # a row without keys gives zeros, not NaN
    weights = torch.where(hidden, torch.zeros((), dtype=wide.dtype), torch.softmax(wide, -1))
    weights = cast_to(weights, v.dtype)
    stages.append(weights)
    return torch.matmul(weights, v), stages[node.get("qk_matmul_output_mode", 0)]


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    node: Node, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Pairs of channels turned by an angle per position (arXiv:2104.09864), halves or neighbours making the pairs.

    x is (batch, heads, sequence, size) or (batch, sequence, heads * size); the caches are (positions, size / 2) with
    position ids, else (batch, sequence, size / 2).
    """
    flat = x.dim() == 3
    heads = _heads(x, node.get("num_heads"))
    size = node.get("rotary_embedding_dim", 0) or heads.shape[3]
    whole = size == heads.shape[3]
    turned = heads if whole else heads[..., :size]
    if positions is not None:
        index = cast_to(positions, torch.int64)
        cos, sin = cos[index], sin[index]
    half = size // 2
    cos, sin = (c.unsqueeze(1) if c.shape[-1] == half else c[..., :half].unsqueeze(1) for c in (cos, sin))
    if node.get("interleaved", 0):
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    real, imaginary = first * cos - second * sin, first * sin + second * cos
    if node.get("interleaved", 0):
        turned = torch.stack((real, imaginary), -1).flatten(-2)
    else:
        turned = torch.cat((real, imaginary), -1)
    if not whole:
        turned = torch.cat((turned, heads[..., size:]), -1)
    return turned.transpose(1, 2).reshape(x.shape) if flat else turned

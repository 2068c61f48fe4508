"""Normalizations, in inference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .registry import Node, cast_to, normalize_axis, operator


def _training(node: Node) -> str | None:
    if node.get("training_mode", 0) or len(node.outputs) > 1:
        return "batch normalization in training mode; export the model with model.eval()"
    return "spatial=0" if node.get("spatial", 1) == 0 else None


@operator("BatchNormalization", since=7, refuse=_training)
def batch_norm(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
) -> torch.Tensor:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, per channel."""
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("InstanceNormalization", since=6)
def instance_norm(node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Each plane normalized by its own mean and variance."""
    return F.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5))


@operator("GroupNormalization", since=18)
def group_norm_by_group(node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Before opset 21 scale and bias are per group."""
    groups = node.get("num_groups")
    repeat = x.shape[1] // groups
    return F.group_norm(
        x, groups, scale.repeat_interleave(repeat), bias.repeat_interleave(repeat), node.get("epsilon", 1e-5)
    )


@operator("GroupNormalization", since=21)
def group_norm(node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Groups of channels normalized by their mean and variance; scale and bias are per channel."""
    return F.group_norm(x, node.get("num_groups"), scale, bias, node.get("epsilon", 1e-5))


@operator("LayerNormalization", since=17)
@operator("LayerNormalization", domain="com.microsoft")
def layer_norm(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The axes from ``axis`` on normalized; further outputs are mean and reciprocal standard deviation."""
    axis, epsilon = normalize_axis(node.get("axis", -1), x.dim()), node.get("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        result = F.layer_norm(x, shape, scale, bias, epsilon)
    else:  # scale and bias may broadcast
        result = F.layer_norm(x, shape, None, None, epsilon) * scale
        result = result if bias is None else result + bias
    if len(node.outputs) == 1:
        return result
    dims, wide = list(range(axis, x.dim())), cast_to(x, torch.float32)
    mean = wide.mean(dims, keepdim=True)
    variance = ((wide - mean) ** 2).mean(dims, keepdim=True)
    return (result, mean, torch.rsqrt(variance + epsilon))[: len(node.outputs)]


def _only_result(node: Node) -> str | None:
    used = [name for name in node.outputs[1:] if name]
    return "its second output" if used else None


@operator("RMSNormalization", since=23)
@operator("SimplifiedLayerNormalization", refuse=_only_result)
@operator("SimplifiedLayerNormalization", domain="com.microsoft", refuse=_only_result)
def rms_norm(node: Node, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """X / sqrt(mean(x^2) + epsilon) * scale over the axes from ``axis`` on (arXiv:1910.07467)."""
    axis, epsilon = normalize_axis(node.get("axis", -1), x.dim()), node.get("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    if x.dtype in (torch.float32, torch.float64) and list(scale.shape) == shape and scale.dtype == x.dtype:
        return F.rms_norm(x, shape, scale, epsilon)
    wide = cast_to(x, torch.float32) if node.get("stash_type", 1) == 1 and x.dtype != torch.float64 else x
    mean = (wide * wide).mean(list(range(axis, x.dim())), keepdim=True)
    return cast_to(wide * torch.rsqrt(mean + epsilon), scale.dtype) * scale


@operator("SkipSimplifiedLayerNormalization", "SkipLayerNormalization", domain="com.microsoft")
def skip_norm(node: Node, x: torch.Tensor, skip: torch.Tensor, scale: torch.Tensor, *rest: Any) -> Any:
    """A residual sum, normalized; the fourth output is the sum."""
    simple = node.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, *rest) if simple and rest else (*rest, None, None)[:2]
    total, epsilon = x + skip, node.get("epsilon", 1e-12)
    total = total if bias is None else total + bias
    shape = list(x.shape[-1:])
    result = F.rms_norm(total, shape, scale, epsilon) if simple else F.layer_norm(total, shape, scale, beta, epsilon)
    if any(name for name in node.outputs[1:3]):
        raise ValueError("the mean and deviation outputs are not supported")
    return (result, None, None, total)[: len(node.outputs)]


@operator("LpNormalization")
def lp_norm(node: Node, x: torch.Tensor) -> torch.Tensor:
    """X over its 1- or 2-norm along an axis; 0 where the norm is 0."""
    dim = normalize_axis(node.get("axis", -1), x.dim())
    norm = x.abs().sum(dim, keepdim=True) if node.get("p", 2) == 1 else torch.sqrt((x * x).sum(dim, keepdim=True))
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_norm(node: Node, x: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (standard deviation + 1e-9) over axes."""
    axes = node.get("axes", [0, 2, 3])
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt((centred * centred).mean(axes, keepdim=True)) + 1e-9)


@operator("LRN")
def local_response_norm(node: Node, x: torch.Tensor) -> torch.Tensor:
    """X / (bias + alpha / size * sum of squares over neighbouring channels)^beta."""
    size, before = node.get("size"), (node.get("size") - 1) // 2
    pads = [0, 0] * (x.dim() - 2) + [before, size - 1 - before]
    squares = F.pad(x * x, pads)
    total = squares.narrow(1, 0, x.shape[1])
    for offset in range(1, size):
        total = total + squares.narrow(1, offset, x.shape[1])
    base = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total
    return x / base ** node.get("beta", 0.75)

"""Activations, and softmax with its relatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .host import Host
from .registry import Node, cast_to, normalize_axis, operator

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
}


@operator(*_PLAIN)
def plain(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Activations without parameters."""
    return _PLAIN[node.op_type](x)


@operator("Softplus")
def softplus(node: Node, x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x)."""
    return F.softplus(x)


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: torch.Tensor) -> torch.Tensor:
    """min(1, max(0, alpha x + beta))."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-7) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("LeakyRelu", since=6)
def leaky_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """x, or alpha x below zero."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("PRelu", since=7)
def prelu(node: Node, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """x, or slope x below zero."""
    return torch.where(x < 0, x * slope, x)


@operator("Elu", since=6)
def elu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """x, or alpha (e^x - 1) below zero."""
    return F.elu(x, node.get("alpha", 1.0))


@operator("Celu", since=12)
def celu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1))."""
    return F.celu(x, node.get("alpha", 1.0))


@operator("Selu", since=6)
def selu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Gamma x, or gamma alpha (e^x - 1) below zero."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("ThresholdedRelu", since=10)
def thresholded_relu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """X above alpha, else 0."""
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("Shrink", since=9)
def shrink(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Pulled towards zero by bias outside of [-lambd, lambd], 0 inside."""
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)
    outside = torch.where(x > limit, x - bias, torch.zeros_like(x))
    return cast_to(torch.where(x < -limit, x + bias, outside), x.dtype)


@operator("Gelu", since=20)
@operator("Gelu", domain="com.microsoft")
def gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """X Phi(x), exact or by the tanh approximation."""
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("BiasGelu", domain="com.microsoft")
def bias_gelu(node: Node, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Gelu of a sum."""
    return F.gelu(x + bias)


@operator("FastGelu", domain="com.microsoft")
def fast_gelu(node: Node, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Tanh-approximated Gelu of a sum."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain="com.microsoft")
def quick_gelu(node: Node, x: torch.Tensor) -> torch.Tensor:
    """X sigmoid(alpha x)."""
    return x * torch.sigmoid(node.get("alpha", 1.702) * x)


@operator("Swish", since=24)
def swish(node: Node, x: torch.Tensor) -> torch.Tensor:
    """X sigmoid(alpha x)."""
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def _hardmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    first = torch.argmax(x, dim, keepdim=True)
    return (torch.arange(x.shape[dim]).reshape(-1, *[1] * (x.dim() - 1 - dim)) == first).to(x.dtype)


_OVER_AXIS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "Softmax": lambda x, dim: torch.softmax(x, dim),
    "LogSoftmax": lambda x, dim: torch.log_softmax(x, dim),
    "Hardmax": _hardmax,
}


@operator(*_OVER_AXIS, since=1)
def over_rows(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Before opset 13: over the columns of the matrix that the input becomes when it is split at an axis."""
    axis = normalize_axis(node.get("axis", 1), x.dim())
    function = _OVER_AXIS[node.op_type]
    if axis == x.dim() - 1:
        return function(x, axis)
    rest = x.flatten(axis) if axis < x.dim() - 1 else x
    return function(rest, axis).reshape(x.shape)


@operator(*_OVER_AXIS, since=13)
def over_axis(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Over one axis."""
    return _OVER_AXIS[node.op_type](x, normalize_axis(node.get("axis", -1), x.dim()))


def _training(node: Node) -> str | None:
    return "dropout in training mode; export the model with model.eval()" if node.get("is_test", 1) == 0 else None


@operator("Dropout", since=7, host=(1, 2), refuse=_training)
def dropout(
    node: Node, x: torch.Tensor, ratio: Host | None = None, training: Host | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Nothing, in inference; the mask is all true."""
    if training is not None and bool(training.item()) and not (ratio is not None and ratio.item() == 0):
        raise ValueError("dropout in training mode; export the model with model.eval()")
    if len(node.outputs) < 2:
        return x
    mask_type = torch.bool if node.opset >= 12 or node.opset >= 10 else x.dtype
    return x, torch.ones_like(x, dtype=mask_type)

"""Quantized tensors, spelled out in integers and floats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .host import INTEGERS
from .registry import Node, cast_to, normalize_axis, operator
from .shapes import convert
from .tensors import torch_dtype
from .windows import Windows


def _along(node: Node, parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A scale or zero point, shaped to broadcast against x: per tensor, per axis, or per block of an axis."""
    if parameter.dim() == 0 or (
        parameter.dim() == 1 and isinstance(parameter.shape[0], int) and parameter.shape[0] == 1
    ):
        return parameter.reshape(())
    axis = normalize_axis(node.get("axis", 1), x.dim())
    if parameter.dim() == 1:
        return parameter.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    block = node.get("block_size", 0)
    if not block:
        raise ValueError("a scale of more than one axis needs block_size")
    return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    bits, signed = INTEGERS[dtype]
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


@operator("QuantizeLinear", since=10)
def quantize_linear(node: Node, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """saturate(round(x / scale) + zero point), halves to even."""
    declared = node.get("output_dtype", 0)
    target = torch_dtype(declared) if declared else zero.dtype if zero is not None else torch.uint8
    precision = node.get("precision", 0)
    divided = torch_dtype(precision) if precision else scale.dtype
    if x.dtype == torch.int32:
        divided = torch.float32 if not divided.is_floating_point else divided
    quotient = cast_to(x, divided) / _along(node, scale, x).to(divided)
    if target.is_floating_point:
        shifted = quotient if zero is None else quotient + _along(node, cast_to(zero, quotient.dtype), x)
        return convert(shifted, target, bool(node.get("saturate", 1)))
    low, high = _limits(target)
    rounded = torch.round(cast_to(quotient, torch.float32))
    if zero is not None:
        rounded = rounded + _along(node, cast_to(zero, torch.float32), x)
    return rounded.clamp(low, high).to(target)


@operator("DequantizeLinear", since=10)
def dequantize_linear(
    node: Node, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - zero point) * scale."""
    declared = node.get("output_dtype", 0)
    target = torch_dtype(declared) if declared else scale.dtype
    value = cast_to(x, target)
    if zero is not None:
        value = value - _along(node, cast_to(zero, target), x)
    return value * _along(node, cast_to(scale, target), x)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(node: Node, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X as uint8 over its own range, which is widened to include 0; with scale and zero point."""
    none = torch.zeros((), dtype=x.dtype)
    low, high = torch.minimum(x.min(), none), torch.maximum(x.max(), none)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, cast_to(zero, torch.uint8)


def _rows(zero: torch.Tensor | None, rank: int) -> torch.Tensor | int:
    """A zero point per row of a matrix."""
    if zero is None:
        return 0
    return cast_to(zero, torch.int32).unsqueeze(-1) if zero.dim() == 1 and rank > 1 else cast_to(zero, torch.int32)


@operator("MatMulInteger", since=10)
def matmul_integer(
    node: Node, a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None = None, b_zero: torch.Tensor | None = None
) -> torch.Tensor:
    """(a - zero) (b - zero) in int32."""
    left = cast_to(a, torch.int32) - _rows(a_zero, a.dim())
    right = cast_to(b, torch.int32) - (0 if b_zero is None else cast_to(b_zero, torch.int32))
    return torch.matmul(left, right)


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    node: Node,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_zero: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
) -> torch.Tensor:
    """Matrix product of quantized matrices, quantized again."""
    total = torch.matmul(
        cast_to(a, torch.int32) - _rows(a_zero, a.dim()), cast_to(b, torch.int32) - cast_to(b_zero, torch.int32)
    )
    left = a_scale.unsqueeze(-1) if a_scale.dim() == 1 and a.dim() > 1 else a_scale
    out_scale = y_scale.unsqueeze(-1) if y_scale.dim() == 1 and a.dim() > 1 else y_scale
    wide = cast_to(total, torch.float32) * (
        cast_to(left, torch.float32) * cast_to(b_scale, torch.float32) / cast_to(out_scale, torch.float32)
    )
    low, high = _limits(y_zero.dtype)
    return (torch.round(wide) + _rows(y_zero, a.dim())).clamp(low, high).to(y_zero.dtype)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _integer_conv(
    node: Node, x: torch.Tensor, x_zero: torch.Tensor | None, w: torch.Tensor, w_zero: torch.Tensor | None
) -> torch.Tensor:
    """Convolution of integers, in float64, which holds every sum exactly."""
    windows = Windows.of(node, x, w.shape[2:])
    rank = len(windows.kernel)
    left = cast_to(x, torch.float64) - (0 if x_zero is None else cast_to(x_zero, torch.float64))
    right = cast_to(w, torch.float64)
    if w_zero is not None:
        per_output = w_zero.dim() == 1 and math.prod(w_zero.shape) > 1
        right = right - (
            cast_to(w_zero, torch.float64).reshape(-1, *[1] * (rank + 1))
            if per_output
            else cast_to(w_zero, torch.float64)
        )
    return _CONV[rank](windows.pad(left, 0), right, None, windows.strides, 0, windows.dilations, node.get("group", 1))


@operator("ConvInteger", since=10)
def conv_integer(
    node: Node, x: torch.Tensor, w: torch.Tensor, x_zero: torch.Tensor | None = None, w_zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolution of (x - zero) with (w - zero) in int32."""
    return _integer_conv(node, x, x_zero, w, w_zero).to(torch.int32)


@operator("QLinearConv", since=10)
def qlinear_conv(
    node: Node,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero: torch.Tensor,
    y_scale: torch.Tensor,
    y_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolution of quantized tensors, quantized again."""
    shape = (-1, *[1] * (x.dim() - 2))
    total = _integer_conv(node, x, x_zero, w, w_zero)
    if bias is not None:
        total = total + cast_to(bias, torch.float64).reshape(shape)
    factor = (x_scale * w_scale / y_scale).to(torch.float64)
    factor = factor.reshape(shape) if factor.dim() == 1 and math.prod(factor.shape) > 1 else factor.reshape(())
    low, high = _limits(y_zero.dtype)
    return (torch.round(total * factor) + cast_to(y_zero, torch.float64)).clamp(low, high).to(y_zero.dtype)

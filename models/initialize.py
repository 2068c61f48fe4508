"""Fill a module with seeded random weights that behave like trained ones.

Every kernel's weights are drawn with variance gain²/fan_in (He et al. 2015, eq. 10), so activations keep their size
through the depth and an error measured at the output means something. Norms get scales near one, shifts near zero and
running statistics that are not the identity: a pass that folds them wrongly moves the output.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

Kernel = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d)
M = TypeVar("M", bound=nn.Module)

RELU_GAIN = math.sqrt(2.0)


@torch.no_grad()
def initialize(module: M, seed: int, *, gain: float = 1.0) -> M:
    """Overwrite all weights and running statistics from one generator; returns the module in eval mode.

    Args:
        module: its parameters lie in linear, convolution, embedding or norm layers, or in layers that draw their own
            with a method ``fill(generator)``.
        seed: the same seed gives the same weights, whatever the global generator's state.
        gain: factor on the standard deviation of kernels; ``RELU_GAIN`` where a ReLU follows each of them.

    Raises:
        TypeError: a layer of another kind owns parameters and has no method ``fill(generator)``.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in module.named_modules():
        if isinstance(layer, Kernel):
            layer.weight.normal_(0.0, gain / math.sqrt(_fan_in(layer)), generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0.0, 0.1, generator=generator)
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_(0.0, 1.0 / math.sqrt(layer.embedding_dim), generator=generator)
        elif isinstance(layer, (*BatchNorm, nn.LayerNorm, nn.RMSNorm)):
            _fill_norm(layer, generator)
        elif hasattr(layer, "fill"):
            layer.fill(generator)
        elif list(layer.parameters(recurse=False)):
            kind = type(layer).__name__
            raise TypeError(f"{name or 'the root'} ({kind}) owns parameters: give it a method fill(generator)")
    return module.eval()


def _fan_in(layer: nn.Module) -> float:
    """Number of products that are summed into one output element."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, nn.ConvTranspose2d):  # weight is (in, out/groups, kh, kw); a stride spreads the taps
        return weight.shape[0] // layer.groups * weight[0, 0].numel() / math.prod(layer.stride)
    return weight[0].numel()


def _fill_norm(layer: nn.Module, generator: torch.Generator) -> None:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if isinstance(weight, torch.Tensor):
        weight.normal_(1.0, 0.1, generator=generator)
    if isinstance(bias, torch.Tensor):
        bias.normal_(0.0, 0.1, generator=generator)
    if isinstance(layer, BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.normal_(0.0, 0.2, generator=generator)
        layer.running_var.uniform_(0.6, 1.6, generator=generator)

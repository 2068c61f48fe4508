"""ResNet-18 and ResNet-50 (He et al. 2015), in the common "v1.5" form: the stride is in the 3x3 convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .images import sample_images
from .initialize import RELU_GAIN, initialize

STAGE_WIDTHS = (64, 128, 256, 512)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size at stride 1, and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, branch: list[nn.Sequential], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.ModuleList(branch)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height/stride, width/stride]."""
        *first, last = self.branch
        y = x
        for layer in first:
            y = layer(y).relu()
        return (last(y) + self.shortcut(x)).relu()


def basic(inputs: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    return Residual([conv_norm(inputs, width, 3, stride), conv_norm(width, width, 3)], inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1 down, 3x3, 1x1 up to four times the width."""
    outputs = 4 * width
    branch = [conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride), conv_norm(width, outputs, 1)]
    return Residual(branch, inputs, outputs, stride)


# block, blocks per stage, ratio of a block's outputs to its width
VARIANTS = {"resnet18": (basic, (2, 2, 2, 2), 1), "resnet50": (bottleneck, (3, 4, 6, 3), 4)}


class ResNet(nn.Module):
    """Images [batch, 3, 224, 224] to logits [batch, classes]."""

    def __init__(self, variant: str, classes: int = 1000) -> None:
        super().__init__()
        block, depths, expansion = VARIANTS[variant]
        self.stem = conv_norm(3, STAGE_WIDTHS[0], 7, 2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[Residual] = []
        channels = STAGE_WIDTHS[0]
        for stage, (width, depth) in enumerate(zip(STAGE_WIDTHS, depths, strict=True)):
            for index in range(depth):
                blocks.append(block(channels, width, 2 if stage > 0 and index == 0 else 1))
                channels = width * expansion
        self.blocks = nn.Sequential(*blocks)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        x = self.blocks(self.pool(self.stem(image).relu()))
        return self.head(self.average(x).flatten(1))


def build(variant: str, seed: int = 0) -> nn.Module:
    """A seeded model in eval mode."""
    model = initialize(ResNet(variant), seed, gain=RELU_GAIN)
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, Residual)
            norm = block.branch[-1][1]  # type: ignore[index]
            # Untrained, every branch would add its input's variance again and double it; trained ones add little.
            norm.weight.mul_(0.4)
    return model


def example(variant: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images."""
    return (sample_images(224, 224, seed=seed),), {}

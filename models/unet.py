"""U-Net (Ronneberger et al. 2015) with padded convolutions and batch norm, for images of 128 by 128.

Channels and layers are those of the 7.8-million-parameter variant of Buda et al. 2019: 32 channels at full size,
doubled at each of four halvings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .images import sample_images
from .initialize import RELU_GAIN, initialize

IMAGE, CHANNELS, DEPTH = 128, 32, 4


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Twice: 3x3 convolution, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images [batch, 3, 128, 128] to a mask of probabilities [batch, 1, 128, 128]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [CHANNELS << level for level in range(DEPTH + 1)]
        self.down = nn.ModuleList(double_conv(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        steps = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in steps)
        self.merge = nn.ModuleList(double_conv(2 * o, o) for _, o in steps)
        self.head = nn.Conv2d(CHANNELS, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """The mask."""
        *levels, bottom = self.down
        skips: list[Tensor] = []
        x = image
        for level in levels:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x = bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat((up(x), skip), dim=1))
        return self.head(x).sigmoid()


def build(variant: str = "unet", seed: int = 0) -> nn.Module:
    """A seeded model in eval mode."""
    return initialize(UNet(), seed, gain=RELU_GAIN)


def example(variant: str = "unet", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images."""
    return (sample_images(IMAGE, IMAGE, seed=seed),), {}

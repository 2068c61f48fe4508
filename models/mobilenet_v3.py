"""MobileNetV3-Large (Howard et al. 2019, table 1): inverted residuals, squeeze-and-excite, hard swish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .images import sample_images
from .initialize import initialize


@dataclass(frozen=True)
class Row:
    """One row of the table: depthwise kernel, expanded and output channels, squeeze-and-excite, activation, stride."""

    kernel: int
    expanded: int
    outputs: int
    squeeze: bool
    activation: type[nn.Module]
    stride: int


LARGE = (
    Row(3, 16, 16, False, nn.ReLU, 1),
    Row(3, 64, 24, False, nn.ReLU, 2),
    Row(3, 72, 24, False, nn.ReLU, 1),
    Row(5, 72, 40, True, nn.ReLU, 2),
    Row(5, 120, 40, True, nn.ReLU, 1),
    Row(5, 120, 40, True, nn.ReLU, 1),
    Row(3, 240, 80, False, nn.Hardswish, 2),
    Row(3, 200, 80, False, nn.Hardswish, 1),
    Row(3, 184, 80, False, nn.Hardswish, 1),
    Row(3, 184, 80, False, nn.Hardswish, 1),
    Row(3, 480, 112, True, nn.Hardswish, 1),
    Row(3, 672, 112, True, nn.Hardswish, 1),
    Row(5, 672, 160, True, nn.Hardswish, 2),
    Row(5, 960, 160, True, nn.Hardswish, 1),
    Row(5, 960, 160, True, nn.Hardswish, 1),
)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution that keeps the size at stride 1, and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs, eps=1e-3)]


def nearest_multiple_of_8(channels: float) -> int:
    """Rounded to a multiple of 8, upwards if rounding would lose more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SqueezeExcite(nn.Module):
    """Scale each channel by a number between 0 and 1 computed from all channels' means (Hu et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = nearest_multiple_of_8(channels / 4)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Shape in is shape out."""
        return x * self.gate(self.expand(self.reduce(self.average(x)).relu()))


class InvertedResidual(nn.Module):
    """1x1 up, depthwise, squeeze-and-excite, 1x1 down; the input is added where the shape is kept."""

    def __init__(self, inputs: int, row: Row) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if row.expanded != inputs:
            layers += [*conv_norm(inputs, row.expanded, 1), row.activation()]
        layers += conv_norm(row.expanded, row.expanded, row.kernel, row.stride, groups=row.expanded)
        layers.append(row.activation())
        if row.squeeze:
            layers.append(SqueezeExcite(row.expanded))
        layers += conv_norm(row.expanded, row.outputs, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = row.stride == 1 and inputs == row.outputs

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height/stride, width/stride]."""
        y = self.layers(x)
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """Images [batch, 3, 224, 224] to logits [batch, classes]."""

    def __init__(self, rows: tuple[Row, ...] = LARGE, classes: int = 1000) -> None:
        super().__init__()
        channels = 16
        layers: list[nn.Module] = [*conv_norm(3, channels, 3, 2), nn.Hardswish()]
        for row in rows:
            layers.append(InvertedResidual(channels, row))
            channels = row.outputs
        layers += [*conv_norm(channels, 6 * channels, 1), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, classes)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.average(self.features(image)).flatten(1))


def build(variant: str = "mobilenet_v3_large", seed: int = 0) -> nn.Module:
    """A seeded model in eval mode."""
    return initialize(MobileNetV3(), seed, gain=1.3)  # keeps the rms of all layers between 0.3 and 4


def example(variant: str = "mobilenet_v3_large", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images."""
    return (sample_images(224, 224, seed=seed),), {}

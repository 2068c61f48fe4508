"""Rotary positions (Su et al. 2021, eq. 34): the frequencies, their scalings for longer contexts, and the rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies are divided by ``factor`` (Chen et al. 2023, eq. 4)."""

    factor: float

    def apply(self, frequencies: Tensor) -> Tensor:
        """Frequencies in radians per position, [pairs]."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by ``factor``, high ones kept, those between interpolated (Llama 3.1).

    A frequency is low or high by how many turns it makes in ``context`` positions, the context of the first training:
    fewer than ``low_turns``, more than ``high_turns``.
    """

    factor: float
    low_turns: float
    high_turns: float
    context: int

    def apply(self, frequencies: Tensor) -> Tensor:
        """Frequencies in radians per position, [pairs]."""
        turns = self.context * frequencies / (2 * math.pi)
        kept = ((turns - self.low_turns) / (self.high_turns - self.low_turns)).clamp(0.0, 1.0)
        return frequencies * kept + frequencies / self.factor * (1.0 - kept)


Scaling = LinearScaling | Llama3Scaling


class Rotary(nn.Module):
    """Tables of cosines and sines by position.

    The frequencies are computed once, in float32, and are no buffer: a module that is converted to half precision keeps
    them exact, as angles of large positions need.
    """

    def __init__(self, head_size: int, theta: float, scaling: Scaling | None = None) -> None:
        super().__init__()
        pairs = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
        frequencies = 1.0 / theta**pairs
        self.frequencies = frequencies if scaling is None else scaling.apply(frequencies)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles of integer ``positions`` [n]: two tables [n, head_size]."""
        angles = positions.to(torch.float32)[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) of the last axis by the angles whose cosines and sines are given."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin

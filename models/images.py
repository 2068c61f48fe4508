"""Stand-ins for photographs: seeded images with large shapes, so that different images give different features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_images(height: int, width: int, *, batch: int = 2, seed: int = 0) -> Tensor:
    """Smooth colour fields with noise on top, about normalised: float32 [batch, 3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randn(batch, 3, 5, 5, generator=generator)
    smooth = F.interpolate(fields, (height, width), mode="bilinear", align_corners=False)
    return smooth + 0.3 * torch.randn(batch, 3, height, width, generator=generator)

"""A small convolutional network in bfloat16 with one convolution of every kind, for every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.runtime import cpu

NEEDS = {
    "cpu:x86-64-v3": {"avx2"},
    "cpu:x86-64-v4": {"avx512bw"},
    "cpu:x86-64-v4+bf16": {"avx512bw", "avx512_bf16"},
}


class EveryKind(nn.Module):
    """Channels that fill no block, residuals on either side of a conversion, and an odd number of channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, 2, 2)
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.pointwise = nn.Conv2d(24, 33, 1)
        self.odd = nn.Conv2d(33, 24, 3, padding=1)
        self.strided = nn.Conv2d(24, 64, 3, 2, 1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=2)

    def forward(self, image):
        x = self.stem(image).relu()
        y = self.odd(nn.functional.hardswish(self.pointwise(self.depthwise(x).relu())))
        z = self.strided(x + y)
        return z + self.grouped(z).relu(), y


@pytest.mark.parametrize("target", NEEDS)
def test_every_kind(make, target):
    if not NEEDS[target] <= set(cpu.features()):
        pytest.skip(f"this processor cannot run {target}")
    module, image = EveryKind().eval(), torch.randn(2, 3, 30, 27)
    model = make(module, (image,), {"image": "batch:1..4,3,30,27"}, precision="bf16", target=target)
    assert [step.family for step in model.entry("main").plan.steps].count("convolution") == 6
    with torch.no_grad():
        expected = module(image)
    for got, want in zip(model(image.numpy()), expected, strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - want.numpy()).max() < 0.015 * want.abs().max().item()
    alone = model(image[1:].numpy())
    for got, want in zip(alone, model(image.numpy()), strict=True):
        np.testing.assert_array_equal(got[0], want[1])

"""A small CNN for scikit-learn's handwritten digits, trained by ``train_digits.py``, and its held-out images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint

CHECKPOINT = checkpoint.FOLDER / "digits.safetensors"
TEST_IMAGES = 360
SPLIT_SEED = 20


class DigitsCNN(nn.Module):
    """Images [batch, 1, 8, 8] with values from 0 to 1 to logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, pool in ((1, 16, False), (16, 32, True), (32, 64, True)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if pool:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64 * 2 * 2, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.features(image).flatten(1))


def build(variant: str = "digits") -> nn.Module:
    """The trained model in eval mode."""
    return checkpoint.load(DigitsCNN(), CHECKPOINT, trainer="tilewright.models.train_digits")


def example(variant: str = "digits", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images of noise (the data set needs scikit-learn, a model's example must not)."""
    return (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),), {}


def training_set() -> tuple[np.ndarray, np.ndarray]:
    """All images that are not held out: float32 [n, 1, 8, 8] from 0 to 1, and labels int64 [n]."""
    images, labels = _shuffled()
    return images[TEST_IMAGES:], labels[TEST_IMAGES:]


def test_set() -> tuple[np.ndarray, np.ndarray]:
    """The held-out images and labels, as :func:`training_set` gives them; always the same ones.

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the data, is not installed.
    """
    images, labels = _shuffled()
    return images[:TEST_IMAGES], labels[:TEST_IMAGES]


test_set.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions called test_*


def _shuffled() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    images = (data.images[order, None] / 16.0).astype(np.float32)
    return images, data.target[order].astype(np.int64)

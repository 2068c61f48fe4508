"""Train the digits CNN: ``python -m tilewright.models.train_digits`` (under a minute on one core)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint
from .digits import CHECKPOINT, DigitsCNN, test_set, training_set
from .initialize import RELU_GAIN, initialize


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel in both directions; empty pixels come in at the border."""
    padded = F.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(3, (len(images), 2), generator=generator)
    rows = (offsets[:, :1] + torch.arange(8))[:, :, None]
    columns = (offsets[:, 1:] + torch.arange(8))[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train(epochs: int, seed: int, batch: int = 64) -> nn.Module:
    """A trained model in eval mode."""
    images, labels = (torch.from_numpy(array) for array in training_set())
    generator = torch.Generator().manual_seed(seed)
    model = initialize(DigitsCNN(), seed, gain=RELU_GAIN).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(batch)[: len(images) // batch]:
            loss = F.cross_entropy(model(shifted(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}", flush=True)
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module) -> float:
    """Share of held-out images that are labelled correctly."""
    images, labels = (torch.from_numpy(array) for array in test_set())
    return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train, store, and report the accuracy of what was stored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint.save(train(options.epochs, options.seed), options.output)
    model = checkpoint.load(DigitsCNN(), options.output, trainer="tilewright.models.train_digits")
    print(f"accuracy on {len(test_set()[1])} held-out images: {accuracy(model):.4f}", flush=True)


if __name__ == "__main__":
    main()

"""A byte-level language model of Python source, trained by ``train_bytelm.py``; one token is one byte.

The architecture is the Llama-style decoder of ``decoder.py`` with a vocabulary of 256.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import checkpoint
from .decoder import Config, Decoder
from .stdlib_text import held_out_text, windows

CONTEXT = 256
CONFIG = Config(vocabulary=256, width=160, layers=4, heads=5, kv_heads=5, hidden=432, context=CONTEXT, tied=True)
LARGE = Config(vocabulary=256, width=256, layers=6, heads=4, kv_heads=4, hidden=688, context=CONTEXT, tied=True)
CHECKPOINT = checkpoint.FOLDER / "bytelm.safetensors"


def build(variant: str = "bytelm") -> nn.Module:
    """The trained model: bytes [batch, seq] (int64) to logits [batch, seq, 256]."""
    return load(CHECKPOINT)


def load(path: Path, config: Config = CONFIG) -> nn.Module:
    """A model that ``train_bytelm.py`` wrote: the shipped one, or one of the dimensions of ``LARGE``, which is not."""
    return checkpoint.load(Decoder(config), path, trainer="tilewright.models.train_bytelm")


def example(variant: str = "bytelm") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two lines of Python, as bytes."""
    lines = (b"def main(argv: list[str]) -> int:", b"for name, value in self.items():\n")
    return (torch.tensor([list(line) for line in lines]),), {}


def heldout(limit: int | None = None) -> np.ndarray:
    """Held-out text as rows of ``CONTEXT + 1`` bytes (int64); at most ``limit`` rows, spread evenly over the text."""
    rows = windows(held_out_text(), CONTEXT)
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(int)]


def perplexity(predict: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, batch: int = 8) -> float:
    """Exponential of the mean negative log-likelihood per byte, summed in float64.

    Args:
        predict: bytes [batch, seq] (int64) to logits [batch, seq, 256]; eager PyTorch or a compiled model.
        rows: [n, seq + 1], as :func:`heldout` gives them.
        batch: rows per call; the last call may have fewer.
    """
    total = 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        logits = np.asarray(predict(part[:, :-1]), dtype=np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, part[:, 1:, None], axis=-1)[..., 0]
        total += float((np.log(np.exp(logits).sum(axis=-1)) - chosen).sum())
    return float(np.exp(total / rows[:, 1:].size))

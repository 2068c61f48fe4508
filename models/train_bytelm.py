"""Train the byte-level language model on the standard library's text: ``python -m tilewright.models.train_bytelm``.

Takes about ten minutes on one core of a server and writes ``checkpoints/bytelm.safetensors`` (half precision). With
``--large --output FILE`` it trains a model of nearly four times the parameters on the same text in the same way, which
takes four times as long. Hidden matrices are optimised by Muon (Jordan et al. 2024), embedding and norms by AdamW.
Muon multiplies in bfloat16, twenty times slower than float32 on processors without instructions for it; ``--adamw``
then optimises everything by AdamW.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint
from .bytelm import CHECKPOINT, CONFIG, CONTEXT, LARGE, heldout, load, perplexity
from .decoder import Config, Decoder
from .initialize import initialize
from .stdlib_text import training_text


def bigram_perplexity(train: np.ndarray, rows: np.ndarray) -> float:
    """Perplexity of a table of byte pairs counted in ``train`` (uint8, [n]) with one added to each count."""
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + 1.0
    table = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(np.exp(-table[rows[:, :-1], rows[:, 1:]].mean()))


def eager_predict(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """The model as a function from bytes to logits, both NumPy arrays."""

    @torch.inference_mode()
    def predict(tokens: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(tokens)).numpy()

    return predict


def train(steps: int, batch: int, seed: int, config: Config = CONFIG, muon: bool = True) -> nn.Module:
    """A trained model in eval mode; prints the loss as it goes."""
    text = torch.from_numpy(training_text().copy())
    generator = torch.Generator().manual_seed(seed)
    model = initialize(Decoder(config), seed).train()
    hidden = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01, momentum=0.95)
        if muon
        else torch.optim.AdamW(hidden, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup = max(1, steps // 40)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / warmup, 1.0, (steps - step) / (0.6 * steps)))
        for o in optimizers
    ]
    print(f"{len(text):,} bytes of text, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    start, average = time.monotonic(), 0.0
    for step in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (batch, 1), generator=generator)
        rows = text[starts + torch.arange(CONTEXT + 1)].long()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 49 or step == steps - 1:
            print(
                f"step {step + 1}/{steps}  loss {average:.3f} nats/byte  {time.monotonic() - start:.0f} s", flush=True
            )
    return model.eval()


def main() -> None:
    """Train, store, and report the perplexity of what was stored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {CONTEXT} bytes per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help="train the larger model, which is not shipped")
    parser.add_argument("--adamw", action="store_true", help="where the processor has no instructions for bfloat16")
    parser.add_argument("--output", type=Path, help=f"default: {CHECKPOINT.name} among the shipped ones")
    options = parser.parse_args()
    if options.large and options.output is None:
        parser.error("--large needs --output FILE: the shipped checkpoint is of the smaller model")
    torch.set_num_threads(options.threads)
    config, output = LARGE if options.large else CONFIG, options.output or CHECKPOINT
    model = train(options.steps, options.batch, options.seed, config, muon=not options.adamw)
    checkpoint.save(model, output, torch.float16)
    model = load(output, config)
    rows = heldout()
    print(f"held-out perplexity {perplexity(eager_predict(model), rows):.4f} per byte", flush=True)
    print(f"bigram table: {bigram_perplexity(training_text(), rows):.4f}", flush=True)


if __name__ == "__main__":
    main()

"""What quantization costs in quality: ``python -m benchmarks.quality``.

The shipped byte-level model on held-out text, quantized by every recipe and not at all: perplexity per byte, the mean
Kullback-Leibler divergence from the unquantized model's distribution (nats per byte), and how often both hold the same
byte for the likeliest. The quantized programs run in eager PyTorch, as kernels are verified against them.

``--large FILE`` measures the larger model instead, which ``python -m tilewright.models.train_bytelm --large --output
FILE`` trains.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tilewright.compiler.copies import reference_of
from tilewright.compiler.sources import open_source
from tilewright.models import bytelm
from tilewright.passes.annotate_quantization import AnnotateQuantization
from tilewright.passes.base import Report
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.convert_quantized import ConvertQuantized
from tilewright.passes.graph.edit import insert_constant
from tilewright.passes.graph.program import Program
from tilewright.passes.graph.quantization import Recipe, read_recipe
from tilewright.passes.graph.quantized_ops import QUANTIZE_WEIGHT
from tilewright.passes.graph.query import remove_unused, tensor_of

NAMES = ("int8", "int4-g32", "int4-g64", "int4-g128", "int4-g32-z")


@dataclass(frozen=True)
class Quality:
    """How a quantized model compares with the unquantized one.

    Attributes:
        recipe: how weights are stored; ``"none"`` for the model itself.
        activations: ``"float"``, ``"int8"`` (a scale per group beside int4, per row beside int8) or ``"int8-rows"`` (a
            scale per row beside int4, which ``compile`` does not offer).
        perplexity: per byte.
        loss: perplexity relative to the unquantized model's, less 1.
        divergence: mean KL divergence in nats per byte.
        agreement: share of bytes after which both find the same one likeliest.
    """

    recipe: str
    activations: str
    perplexity: float
    loss: float
    divergence: float
    agreement: float


def recipe_of(name: str, activations: str) -> Recipe:
    """The recipe of a name, with activations as :class:`Quality` names them."""
    if activations != "int8-rows":
        return read_recipe(name, activations)
    recipe = read_recipe(name, "int8")
    patterns = tuple((pattern, spec and replace(spec, activations=0)) for pattern, spec in recipe.patterns)
    return replace(recipe, patterns=patterns)


def quantized(name: str | None, activations: str = "float", large: Path | None = None) -> Program:
    """A byte model with weights quantized by a recipe, once, for eager PyTorch; None leaves it as it is."""
    program = reference_of(_captured(large))
    if name is None:
        return program
    for one in (Canonicalize(), AnnotateQuantization(recipe_of(name, activations)), ConvertQuantized()):
        one.run(program, Report())
    for node in list(program.graph.nodes):
        if node.target is QUANTIZE_WEIGHT:
            rows = QUANTIZE_WEIGHT(tensor_of(node.args[0]), *node.args[1:])
            node.replace_all_uses_with(insert_constant(program.module, node, f"{node.name}_rows", rows))
            remove_unused(node)
    program.module.recompile()
    return program


@cache
def _captured(large: Path | None) -> Program:
    if large is None:
        (program,) = open_source("bytelm")
    else:
        args, _ = bytelm.example()
        (program,) = open_source(bytelm.load(large, bytelm.LARGE), args, shapes={"input_ids": "batch:1..64,seq:1..256"})
    return program


def log_probabilities(program: Program, rows: np.ndarray, batch: int = 8) -> torch.Tensor:
    """Of every next byte: float32 ``[n, seq, 256]``."""
    parts = [program.run((torch.from_numpy(part[:, :-1]),))[0] for part in np.array_split(rows, -(-len(rows) // batch))]
    return F.log_softmax(torch.cat(parts).float(), -1)


def compare(recipe: str, activations: str, found: torch.Tensor, reference: torch.Tensor, rows: np.ndarray) -> Quality:
    """Quality of log probabilities beside those of the unquantized model."""
    targets = torch.from_numpy(rows[:, 1:])[..., None]
    perplexity, original = (float((-one.gather(-1, targets)).double().mean().exp()) for one in (found, reference))
    divergence = float((reference.exp() * (reference - found)).sum(-1).double().mean())
    agreement = float((found.argmax(-1) == reference.argmax(-1)).double().mean())
    return Quality(recipe, activations, perplexity, perplexity / original - 1, divergence, agreement)


def measure(names: Sequence[str], rows: np.ndarray, large: Path | None = None) -> list[Quality]:
    """Every recipe with and without a search for scales, with activations in floating point and in int8."""
    reference = log_probabilities(quantized(None, large=large), rows)
    results = [compare("none", "float", reference, reference, rows)]
    for name in names:
        for recipe in (f"{name}-plain", name):
            for activations in ("float", "int8") if name == "int8" else ("float", "int8", "int8-rows"):
                found = log_probabilities(quantized(recipe, activations, large), rows)
                results.append(compare(recipe, activations, found, reference, rows))
    return results


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help="recipes without -plain")
    parser.add_argument("--rows", type=int, default=96, help="windows of 256 bytes of held-out text")
    parser.add_argument("--large", type=Path, help="checkpoint of the larger byte-level model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.large is not None and not options.large.exists():
        parser.error(f"{options.large} does not exist: python -m tilewright.models.train_bytelm --large --output FILE")
    results = measure(options.names, bytelm.heldout(options.rows), options.large)
    if options.json:
        model = "bytelm" if options.large is None else "bytelm-large"
        record = {"model": model, "rows": options.rows, "results": [asdict(one) for one in results]}
        print(json.dumps(record, indent=1))
        return
    print(f"{'weights':18}{'activations':13}{'perplexity':>11}{'loss':>9}{'KL, nats':>11}{'same top 1':>12}")
    for one in results:
        print(
            f"{one.recipe:18}{one.activations:13}{one.perplexity:11.4f}{one.loss:9.2%}{one.divergence:11.6f}"
            f"{one.agreement:12.2%}"
        )


if __name__ == "__main__":
    main()

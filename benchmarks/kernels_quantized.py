"""Products with quantized weights for ``benchmarks.kernels``: one row in bytes of weights, more rows in operations.

Kernels are those that an artifact gets: a layer goes through the passes and the lowering. Activations are quantized, as
on any CPU by default, in a step before, which is not measured. PyTorch multiplies the same weights in float32; its
bytes, too, are those of the quantized weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from tilewright.codegen.c.families import FAMILIES
from tilewright.codegen.kernel_table import KernelTable
from tilewright.codegen.lower import lower
from tilewright.codegen.roles import fusion_roles
from tilewright.codegen.storage import ConstantTable
from tilewright.compiler.capture import capture
from tilewright.passes.graph.quantization import parse_name
from tilewright.passes.graph.quantized_ops import dequantize, quantize_weight, quantized_linear
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime import sizes

RECIPES = ("int8", "int4-g32")
SHAPES = (  # name, rows, columns of the result, terms
    ("llama decode 4096 to 14336", 1, 14336, 4096),
    ("llama 16 of 2048 to 8192", 16, 8192, 2048),
    ("llama 128 of 2048 to 8192", 128, 8192, 2048),
)


class Launch(NamedTuple):
    """A kernel's source and arguments."""

    source: str
    arrays: list[np.ndarray]
    units: int


class Quantized:
    """One product: what ``benchmarks.kernels`` measures."""

    def __init__(self, name: str, m: int, n: int, k: int, recipe: str) -> None:
        self.name = name
        self.dtype = "int8"  # what products are computed in
        self.reads = m == 1  # limited by memory, not by arithmetic
        self.flops = 2 * m * n * k
        layer, x = Layer(n, k, recipe), torch.randn(m, k, generator=torch.Generator().manual_seed(0))
        program = capture("main", layer.eval(), (x,), {}, None)
        PassManager(pipeline(fusion_roles("cpu"), "cpu")).run(program)
        kernels, constants = KernelTable(), ConstantTable()
        lowered = lower(program, kernels, constants, FAMILIES)
        packed = [constant.load() for constant in constants.constants]
        self.bytes = sum(array.nbytes for array in packed)
        (buffer,) = lowered.draft.buffers
        given = {"input": [x.numpy()], "constant": packed, "output": [np.empty((m, n), np.float32)]}
        given["buffer"] = [np.empty(sizes.evaluate(buffer.bytes, {}), np.uint8)]
        before, product = (
            Launch(
                kernel.text.replace(kernel.name, "kernel"),
                [given[ref.kind][ref.index] for ref in step.variants[0].operands],
                sizes.evaluate(step.variants[0].units, {}),
            )
            for kernel, step in zip(kernels.kernels, lowered.draft.steps, strict=True)
        )
        self.before = before
        self.source, self.arrays, self.units = product
        weight = dequantize(layer.rows, *layer.form)
        self.torch_call: Callable[[], object] = lambda: nn.functional.linear(x, weight)


class Layer(nn.Module):
    """A linear layer with a weight of random numbers, quantized."""

    def __init__(self, n: int, k: int, recipe: str) -> None:
        super().__init__()
        spec = parse_name(recipe, "auto")
        self.form, self.activations = (k, spec.bits, spec.group, spec.symmetric), spec.activations
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
        self.register_buffer("rows", quantize_weight(weight, *self.form[1:], False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T``."""
        return quantized_linear(x, self.rows, None, *self.form, self.activations)


def quantized(wanted: Callable[[str], object]) -> Iterator[Quantized]:
    """Every shape in every recipe whose name is wanted: making one takes seconds."""
    for recipe in RECIPES:
        for name, m, n, k in SHAPES:
            if wanted(f"{recipe} {name}"):
                yield Quantized(f"{recipe} {name}", m, n, k, recipe)

"""The attention family of the Triton dialect, interpreted, against PyTorch in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tilewright.codegen.lower import KernelTable, lower
from tilewright.codegen.storage import ConstantTable
from tilewright.codegen.triton.attention import attention_family
from tilewright.compiler.capture import capture
from tilewright.passes.graph.regions import Region, outline
from tilewright.passes.verify import TOLERANCES, error_of
from tilewright.runtime import sizes
from tilewright.runtime.plan import COUNTERS

NUMPY = {torch.bfloat16: ml_dtypes.bfloat16}
LIMIT = {torch.float32: 1e-5, torch.float16: TOLERANCES[torch.float16], torch.bfloat16: TOLERANCES[torch.bfloat16]}
HALVES = (torch.float16, torch.bfloat16)


class Attend(nn.Module):
    """Attention alone; a mask is the fourth input."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


@dataclass
class Lowered:
    """One attention kernel, its plan, and the interpreter to run it in."""

    interpret: Callable
    step: object
    sources: dict[str, str]
    lowered: object
    used: list[str] = field(default_factory=list)

    def __call__(self, *inputs: torch.Tensor, tile: int = 0, variant: int | None = None) -> torch.Tensor:
        """The result, of the variant that the guards choose or of a given one."""
        symbols = {
            symbol.name: inputs[symbol.input].shape[symbol.axis] // symbol.factor for symbol in self.lowered.symbols
        }
        number = next(n for n, item in enumerate(self.step.variants) if sizes.evaluate(item.guard, symbols))
        chosen = self.step.variants[number if variant is None else variant]
        binary = chosen.tiles[tile % len(chosen.tiles)]
        arrays = [self._array(ref, inputs, symbols) for ref in chosen.operands]
        values = [sizes.evaluate(size, symbols) for size in chosen.sizes]
        grid = sizes.evaluate(chosen.units, {**symbols, **binary.values()})
        after = self.interpret(self.sources[chosen.kernel], chosen.kernel, arrays, values, binary.values(), grid)
        for ref, array in zip(chosen.operands, after, strict=True):
            assert ref.kind != "counters" or not array.any(), "counters are left as they were found"
        self.used.append(chosen.kernel)
        return to_torch(after[-1])

    def _array(self, ref, inputs: Sequence[torch.Tensor], symbols) -> np.ndarray:
        if ref.kind == "input":
            return to_numpy(inputs[ref.index])
        if ref.kind == "counters":
            return np.zeros(COUNTERS, np.int32)
        port = (self.lowered.outputs if ref.kind == "output" else self.lowered.buffers)[ref.index]
        shape = [sizes.evaluate(extent, symbols) for extent in port.shape]
        dtype = ml_dtypes.bfloat16 if port.dtype == "bfloat16" else port.dtype
        return np.full(shape, np.nan, dtype)  # what is not written shows


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture
def attention(interpret):
    """``attention(module, *inputs, shapes=None)``: the module as one region, lowered."""

    def make(module: nn.Module, *inputs: torch.Tensor, shapes=None) -> Lowered:
        program = capture("main", module.eval(), inputs, shapes=shapes)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        outline(program.module, calls, Region("kernel", "attention"), "region")
        program.module.recompile()
        kernels = KernelTable()
        lowered = lower(program, kernels, ConstantTable(), {"attention": attention_family})
        sources = {kernel.name: kernel.text for kernel in kernels.kernels}
        return Lowered(interpret, lowered.steps[0], sources, lowered)

    return make


def inputs(b, h, hk, sq, sk, d, dv, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check(got: torch.Tensor, module: nn.Module, *given: torch.Tensor) -> None:
    """Compare with the module in double precision."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    want = module(*wide)
    assert got.shape == want.shape
    error = error_of(want, got.double())
    assert error <= LIMIT[given[0].dtype], f"error {error:.3g}"


SHAPES = [
    # b, heads, key heads, sq, sk, d, dv
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 16, 16),
    (1, 2, 2, 129, 17, 40, 40),
    (1, 4, 2, 97, 129, 64, 64),
    (2, 2, 1, 17, 150, 80, 96),
    (1, 2, 2, 33, 128, 128, 70),
    (1, 1, 1, 20, 65, 256, 256),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(attention, shape, causal):
    given = inputs(*shape)
    module = Attend(is_causal=causal, enable_gqa=shape[1] != shape[2])
    lowered = attention(module, *given)
    for tile in range(2):
        check(lowered(*given, tile=tile), module, *given)

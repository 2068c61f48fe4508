"""The matmul family of the Triton dialect, interpreted, against PyTorch in double precision."""

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
from tilewright.codegen.triton.matmul import matmul_family
from tilewright.compiler.capture import capture
from tilewright.passes.graph.regions import Region, outline
from tilewright.passes.verify import TOLERANCES, error_of
from tilewright.runtime import sizes
from tilewright.runtime.plan import COUNTERS

LIMIT = {torch.float32: 1e-5, torch.float16: TOLERANCES[torch.float16], torch.bfloat16: TOLERANCES[torch.bfloat16]}
HALVES = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=str)


@dataclass
class Lowered:
    """One region with a product, its plan, and the interpreter to run it in."""

    interpret: Callable
    step: object
    kernels: dict[str, object]
    lowered: object
    constants: ConstantTable
    ran: list[str] = field(default_factory=list)

    def __call__(self, *inputs: torch.Tensor, variant: int | None = None, tile: str = "", reverse: bool = False):
        """The results of the variant that the guards choose (or a given one), in its default tile or a named one."""
        symbols = {item.name: inputs[item.input].shape[item.axis] // item.factor for item in self.lowered.symbols}
        number = next(n for n, item in enumerate(self.step.variants) if sizes.evaluate(item.guard, symbols))
        chosen = self.step.variants[number if variant is None else variant]
        binary = next(item for item in chosen.tiles if item.name == tile) if tile else chosen.tiles[0]
        assert sizes.evaluate(binary.guard, symbols), f"{tile} is not for these sizes"
        arrays = [self._array(ref, inputs, symbols) for ref in chosen.operands]
        values = [sizes.evaluate(size, symbols) for size in chosen.sizes]
        grid = sizes.evaluate(chosen.units, {**symbols, **binary.values()})
        source = self.kernels[chosen.kernel].text
        if reverse:
            source = source.replace("tl.program_id(0)", f"({grid - 1} - tl.program_id(0))")
        after = self.interpret(source, chosen.kernel, arrays, values, binary.values(), grid)
        for ref, array in zip(chosen.operands, after, strict=True):
            assert ref.kind != "counters" or not array.any(), "counters are left as they were found"
        self.ran.append(f"{number}:{binary.name}")
        results = [to_torch(after[place]) for place in self.step.writes]
        return results[0] if len(results) == 1 else tuple(results)

    def tiles(self, variant: int = -1) -> list[str]:
        """The names of a variant's binaries."""
        return [tile.name for tile in self.step.variants[variant].tiles]

    def _array(self, ref, inputs: Sequence[torch.Tensor], symbols) -> np.ndarray:
        if ref.kind == "input":
            return to_numpy(inputs[ref.index])
        if ref.kind == "counters":
            return np.zeros(COUNTERS, np.int32)
        if ref.kind == "constant":
            item = self.constants.constants[ref.index]
            array = item.load()
            return array.view(ml_dtypes.bfloat16) if item.dtype == "bfloat16" else array
        port = (self.lowered.outputs if ref.kind == "output" else self.lowered.buffers)[ref.index]
        shape = [sizes.evaluate(extent, symbols) for extent in port.shape]
        return np.full(shape, np.nan, ml_dtypes.bfloat16 if port.dtype == "bfloat16" else port.dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture
def product(interpret):
    """``product(module, *inputs, shapes=None, precision="ieee")``: the module as one region, lowered."""

    def make(module: nn.Module, *inputs: torch.Tensor, shapes=None, precision: str = "ieee") -> Lowered:
        program = capture("main", module.eval(), inputs, shapes=shapes)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        outline(program.module, calls, Region("kernel", "matmul"), "region")
        program.module.recompile()
        kernels, constants = KernelTable(), ConstantTable()
        lowered = lower(program, kernels, constants, {"matmul": matmul_family}, precision)
        (step,) = lowered.steps
        return Lowered(interpret, step, {kernel.name: kernel for kernel in kernels.kernels}, lowered, constants)

    return make


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers; the seed is the test's own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got, module: nn.Module, *given: torch.Tensor) -> None:
    """Compare with the module in double precision."""
    import copy

    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(*wide)
    wanted, got = ((item if isinstance(item, tuple) else (item,)) for item in (wanted, got))
    for want, have in zip(wanted, got, strict=True):
        assert have.shape == want.shape
        error = error_of(want, have.double())
        assert error <= LIMIT[have.dtype], f"error {error:.3g}"


class Linear(nn.Module):
    """A linear layer, with GELU and a residual where asked."""

    def __init__(self, k: int, n: int, dtype: torch.dtype = torch.float32, then: str = ""):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(k, n).to(dtype)
        self.then = then

    def forward(self, x, residual=None):
        y = self.linear(x)
        if self.then == "gelu":
            y = functional.gelu(y)
        return y if residual is None else y + residual


@DTYPES
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 63, 129), (33, 129, 63), (129, 33, 40), (70, 64, 128)])
def test_linear(product, dtype, m, n, k):
    module, x = Linear(k, n, dtype), random(m, k, dtype=dtype)
    kernel = product(module, x)
    for tile in kernel.tiles():
        check(kernel(x, tile=tile), module, x)

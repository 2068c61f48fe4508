"""Quantized layers through the whole compiler: what fuses around them, views before them, tied tables, refusals."""

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.passes.graph.quantized_ops import quantize_weight
from tilewright.runtime.errors import CompileError, InputError

TOKENS = torch.export.Dim("tokens", max=64)
linear = torch.ops.tilewright.quantized_linear.default
embedding = torch.ops.tilewright.quantized_embedding.default


class Quantized(nn.Module):
    """A weight in rows of bytes."""

    def __init__(self, n, k, bits, group, symmetric=True, activations=0, bias=False):
        super().__init__()
        self.form = (k, bits, group, symmetric)
        self.activations = activations
        weight = torch.randn(n, k) * k**-0.5
        self.register_buffer("weight", quantize_weight(weight, bits, group, symmetric, False))
        self.bias = nn.Parameter(torch.randn(n)) if bias else None

    def forward(self, x):
        return linear(x, self.weight, self.bias, *self.form, self.activations)

    def rows(self, indices):
        return embedding(indices, self.weight, *self.form)


class Block(nn.Module):
    """A feed-forward block of a decoder between a table of tokens and the output layer, tied to it."""

    def __init__(self, bits, group, symmetric, activations):
        super().__init__()
        torch.manual_seed(0)
        spec = (bits, group, symmetric, activations)
        self.table = Quantized(50, 64, *spec)
        self.norm = nn.RMSNorm(64)
        self.wide = Quantized(2 * 96, 64, *spec, bias=True)
        self.narrow = Quantized(64, 96, *spec)

    def forward(self, tokens):
        x = self.table.rows(tokens)
        gate, up = self.wide(self.norm(x)).chunk(2, -1)
        x = x + self.narrow(nn.functional.silu(gate) * up)
        return self.table(x[:, 1:]), x


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "spec",
    [(4, 32, False, 32), (4, 64, True, 0), (8, 0, True, 0), (4, 32, True, -1)],
    ids=["z", "g64", "int8", "float"],
)
def test_block(compiled, spec):
    """Bias and residual follow inside, gate and up are read in place, the table's bytes are stored once."""
    module = Block(*spec)
    tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    model = compiled(module, (tokens,), ({1: TOKENS},))
    steps = model.artifact.plans["main"].steps
    assert sum(step.family == "quantized" for step in steps) == 4
    weights = [constant for constant in model.artifact.plans["main"].constants if constant.dtype == "uint8"]
    assert len(weights) == 3
    for count in (3, 6, 37):
        tokens = torch.randint(0, 50, (2, count), generator=torch.Generator().manual_seed(count))
        for got, expected in zip(model(tokens.numpy()), module(tokens), strict=True):
            error = np.abs(got - expected.detach().numpy()) / expected.abs().max().item()
            # An activation between two codes may be rounded either way, which moves a few rows a little.
            assert np.median(error) < 1e-5 and error.max() < (2e-5 if spec[3] < 0 else 2e-2)


def test_operand_that_is_also_added(compiled):
    """Rows are quantized in a step before; the product reads them, and the operand itself only where it adds it."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Quantized(64, 64, 8, 0), Quantized(64, 64, 4, 32, activations=32)

        def forward(self, x, y):
            return self.first(x * 2) + x, self.second(y * 2) + x

    torch.manual_seed(2)
    module, given = Residual(), (torch.randn(5, 64), torch.randn(5, 64))
    model = compiled(module, given)
    assert [step.family for step in model.artifact.plans["main"].steps] == ["quantize", "quantized"] * 2
    for got, expected in zip(model(*(x.numpy() for x in given)), module(*given), strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_index_outside_the_table(compiled):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Quantized(50, 64, 8, 32)

        def forward(self, tokens):
            return self.table.rows(tokens) * 2

    module, tokens = Rows(), torch.arange(6, dtype=torch.int32)
    model = compiled(module, (tokens,), ({0: TOKENS},))
    np.testing.assert_array_equal(model(tokens.numpy()), module(tokens).numpy())
    with pytest.raises(InputError):
        model(np.array([3, 50], np.int32))
    with pytest.raises(InputError):
        model(np.array([-1, 2], np.int32))


@pytest.mark.parametrize("spec", [(8, 48, True, 0), (4, 64, True, 16)], ids=["weights", "activations"])
def test_groups_without_a_kernel(compiled, spec):
    module, x = Quantized(40, 96, *spec), torch.randn(3, 96)
    with pytest.raises(CompileError, match="have no kernel on CPUs; choose groups"):
        compiled(module, (x,))

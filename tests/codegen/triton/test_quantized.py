"""Products with quantized weights and rows of quantized tables in Triton, interpreted, against their references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.codegen.triton.families import FAMILIES
from tilewright.runtime.errors import CompileError

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPS = torch.ops.tilewright


class Linear(nn.Module):
    """A layer with a quantized weight, then something in its epilogue."""

    def __init__(self, columns, rows, bits, group, symmetric, bias=True, activations=-1):
        super().__init__()
        self.form = (columns, bits, group, symmetric)
        weight = torch.randn(rows, columns) + (0 if symmetric else 0.7)
        self.register_buffer("weight", OPS.quantize_weight(weight, bits, group, symmetric, False))
        self.bias = nn.Parameter(torch.randn(rows)) if bias else None
        self.activations = activations

    def forward(self, x):
        return OPS.quantized_linear(x, self.weight, self.bias, *self.form, self.activations).relu()

    def exact(self, x):
        weight = OPS.dequantize(self.weight, *self.form).double()
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(x.double(), weight, bias).relu()


class Table(nn.Module):
    def __init__(self, columns, rows, bits, group, symmetric):
        super().__init__()
        self.form = (columns, bits, group, symmetric)
        self.register_buffer("weight", OPS.quantize_weight(torch.randn(rows, columns), bits, group, symmetric, False))

    def forward(self, indices):
        return OPS.quantized_embedding(indices, self.weight, *self.form) * 2


FORMS = [(4, 32, True), (4, 64, False), (4, 0, True), (8, 0, True), (8, 32, False)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMS, ids=str)
def test_multiplies(lowered, bits, group, symmetric):
    """Few and many rows, columns that fill no chunk or tile, float32 and halves."""
    for columns, rows, dtype in ((161, 70, F32), (256, 33, BF16)):
        module = Linear(columns, rows, bits, group, symmetric, bias=dtype == F32)
        x = torch.randn(2, 20, columns).to(dtype)
        model = lowered(module, (x,), ({1: torch.export.Dim("seq", min=1, max=64)},), passes=True, families=FAMILIES)
        (step,) = model.plan.steps
        assert len(step.variants) == 2
        for seq in (3, 20):
            (got,) = model(x[:, :seq], tile=seq % 2)
            want = module.exact(x[:, :seq]).detach()
            error = float((got.double() - want).abs().max() / want.abs().max())
            assert error <= (1e-5 if dtype == F32 else 1e-2), (columns, seq, error)


@pytest.mark.parametrize(("bits", "group", "symmetric"), FORMS[:2] + FORMS[3:], ids=str)
def test_reads_rows(lowered, bits, group, symmetric):
    module = Table(161, 50, bits, group, symmetric)
    indices = torch.tensor([[0, 49, 7], [7, 3, 20]], dtype=torch.int32)
    model = lowered(module, (indices,), passes=True, families=FAMILIES)
    (got,) = model(indices)
    torch.testing.assert_close(got, module(indices), rtol=1e-6, atol=1e-6)
    assert not model.faults
    model(indices + 1)
    assert model.faults == 1


def test_refuses_what_has_no_kernel(lowered):
    x = torch.randn(3, 64)
    with pytest.raises(CompileError, match="--activations float"):
        lowered(Linear(64, 8, 8, 0, True, activations=0), (x,), passes=True, families=FAMILIES)
    with pytest.raises(CompileError, match="groups of 16"):
        lowered(Linear(64, 8, 4, 16, True), (x,), passes=True, families=FAMILIES)


def test_shares_long_rows(lowered):
    """Programs that make a part of a sum each, with columns that fill no step; the counters are zero again."""
    module = Linear(1100, 20, 4, 32, False)
    x = torch.randn(3, 1100)
    model = lowered(module, (x,), passes=True, families=FAMILIES)
    (step,) = model.plan.steps
    parts = [tile.values()["SPLIT_K"] for tile in step.variants[0].tiles]
    assert parts[0] > 1 and 1 in parts
    for tile in range(len(parts)):
        (got,) = model(x, tile=tile)
        want = module.exact(x).detach()
        assert float((got.double() - want).abs().max() / want.abs().max()) <= 1e-5


@pytest.mark.parametrize(("dtype", "symmetric"), [(F32, True), (BF16, False)], ids=str)
def test_compiles_for_gpus(lowered, compile_cubin, dtype, symmetric):
    """The default tiles for few and for many rows, in products of scalars and of tensor cores."""
    module = Linear(256, 64, 4, 32, symmetric)
    shapes = ({0: torch.export.Dim("rows", min=1, max=64)},)
    model = lowered(module, (torch.randn(20, 256).to(dtype),), shapes, passes=True, families=FAMILIES)
    (step,) = model.plan.steps
    archs = ("sm_80", "sm_90") if dtype == F32 else ("sm_90", "sm_80")
    for variant, arch in zip(step.variants, archs, strict=True):
        kernel = model.kernels[variant.kernel]
        compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0], arch)

"""Products of bfloat16 and int8 as models have them, through the passes and the matmul family."""

import pytest
import torch
from torch import nn

from tilewright.codegen.generate import generate
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.capture import capture
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline

ROWS = torch.export.Dim("rows", min=1, max=300)
TARGETS = pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:x86-64-v4", "cpu"])


def values(*shape, seed):
    """Numbers that bfloat16 has, so that only the arithmetic rounds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


class Layers(nn.Module):
    """Constant weights: an even and an odd depth, a matrix on the right, a prologue, permuted rows, epilogues."""

    def __init__(self):
        super().__init__()
        for name, shape in (("even", (35, 22)), ("odd", (40, 35)), ("right", (40, 9)), ("bias", (40,))):
            self.register_parameter(name, nn.Parameter(values(*shape, seed=len(name)) / 4, requires_grad=False))

    def forward(self, x):
        first = nn.functional.linear(x, self.even)
        second = nn.functional.gelu(nn.functional.linear(first, self.odd, self.bias))
        third = torch.addmm(self.bias[:9], second[0], self.right, beta=0.5, alpha=2)
        turned = nn.functional.linear(torch.relu(x).transpose(0, 1), self.even)
        return first, second, third, turned + 1


class Both(nn.Module):
    """No constant operand: batched, broadcast, transposed on either side, a vector, an addend."""

    def forward(self, x, y):
        scores = x @ y.transpose(-1, -2)  # [b, h, n, m]
        shared = x.transpose(-1, -2) @ y[:1]  # rows of x along the columns, y for all batch entries
        added = torch.baddbmm(y[0, 0, 0], x[0], y[0].transpose(1, 2).contiguous().transpose(1, 2).mT @ y[0])
        return scores, shared, added, x @ y[0, 0, 0]


@TARGETS
def test_layers_in_bfloat16(target, compiled, assert_same):
    module = Layers()
    model = compiled(module, (values(3, 17, 22, seed=0),), ({1: ROWS},), target=target, precision="bf16")
    for rows in (1, 17, 120):
        # Results and the values between two kernels are bfloat16.
        assert_same(model, module, (values(3, rows, 22, seed=rows),), 8e-3)


@TARGETS
def test_products_of_activations_in_bfloat16(target, compiled, assert_same):
    module, inputs = Both(), (values(2, 3, 11, 34, seed=1), values(2, 3, 11, 34, seed=2))
    assert_same(compiled(module, inputs, target=target, precision="bf16"), module, inputs, 8e-3)


class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("weight", torch.randint(-128, 128, (37, 41), dtype=torch.int8, generator=generator))

    def forward(self, x):
        product = torch._int_mm(x, self.weight.t())
        clipped = (torch._int_mm(x.neg(), self.weight.t()) * 3 + 1).to(torch.float32) * 0.5
        return product, clipped, torch._int_mm(x, x.t())


@TARGETS
def test_int8(target, compiled, assert_same):
    """With a constant packed with its offsets, of a prologue, and of two activations; exact."""
    module, generator = Integers(), torch.Generator().manual_seed(4)
    x = torch.randint(-128, 128, (19, 41), dtype=torch.int8, generator=generator)
    x[0], x[1] = -128, 127
    model = compiled(module, (x,), ({0: ROWS},), target=target)
    for rows in (2, 19, 110):
        assert_same(model, module, (x.repeat(7, 1)[:rows],), 0)


def sources(module, inputs, precision, shapes=None):
    program = capture("main", module.eval(), inputs, {}, shapes)
    PassManager(pipeline(fusion_roles(), "cpu", precision)).run(program)
    return "\n".join(kernel.text for kernel in generate({"cpu": [program]}).devices["cpu"].kernels)


def test_kinds_of_products():
    """What is multiplied in which dtype; rows that are whole words are read in place."""
    x, linear = values(4, 16, seed=0), nn.Linear(16, 7)
    assert "tw_words.h" not in sources(linear, (x,), "auto")
    assert "tw_product_rows_int8" in sources(Integers(), (torch.zeros(3, 41, dtype=torch.int8),), "auto")
    even = sources(linear, (x,), "bf16")
    assert "tw_product_rows_bf16" in even and "tw_copy_bf16" not in even
    assert "tw_copy_bf16" in sources(nn.Sequential(linear, nn.Linear(7, 4)), (x,), "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_two_varying_axes_are_read_in_place(precision):
    shapes = ({0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("seq", max=64)},)
    text = sources(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), (values(2, 3, 16, seed=0),), precision, shapes)
    assert "tw_product_rows" in text and "a_value" not in text


@pytest.mark.parametrize(
    ("target", "precision", "panel"),
    [
        ("cpu:x86-64-v3", "fp32", 32),
        ("cpu:x86-64-v3,cpu:x86-64-v4", "fp32", 32),
        ("cpu:x86-64-v3", "bf16", 16),
        ("cpu:x86-64-v3,cpu:x86-64-v4", "bf16", 32),
    ],
)
def test_panels_are_as_wide_as_the_widest_target_wants(compiled, assert_same, target, precision, panel):
    """Words of bfloat16 half as wide where all vectors are; one copy for all targets otherwise."""
    module, inputs = Layers(), (values(3, 17, 22, seed=0),)
    model = compiled(module, inputs, target=target, precision=precision)
    keys = [constant.key for constant in model.entry("main").plan.constants if ".panels" in constant.key]
    assert keys and all(key.rstrip("t").endswith(f".panels{panel}") for key in keys), keys
    assert_same(model, module, inputs, 2e-6 if precision == "fp32" else 8e-3)

"""Permutations cancel across pointwise operators; what it refuses and why."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fold_transposes import FoldTransposes

BATCH, SEQ = Dim("batch", min=1, max=16), Dim("seq", min=1, max=16)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("channels", torch.rand(5))
        self.register_buffer("plane", torch.rand(4, 1, 5))

    def forward(self, x, y):
        return self.function(x, y, self.channels, self.plane)


@pytest.fixture
def canonical(exported, run_pass):
    def make(function, dtype=torch.float32):
        torch.manual_seed(0)
        shapes = {"x": {0: BATCH, 2: SEQ}, "y": {0: BATCH, 2: SEQ}}
        program = exported(
            Function(function).to(dtype),
            torch.randn(2, 5, 3, 4).to(dtype),
            torch.randn(2, 5, 3, 4).to(dtype),
            dynamic_shapes=shapes,
        )
        run_pass(Canonicalize(), program)
        return program

    return make


def last(x):
    return x.permute(0, 2, 3, 1)


def first(x):
    return x.permute(0, 3, 1, 2)


def test_golden(canonical, run_pass, show, golden):
    def function(x, y, channels, plane):
        z = torch.nn.functional.gelu(last(x) * channels + plane.permute(1, 0, 2)) * 2
        return first(z + last(y).sigmoid())

    program = canonical(function)
    assert len(run_pass(FoldTransposes(), program, [torch.randn(1, 5, 7, 4), torch.randn(1, 5, 7, 4)]).changes) == 1
    run_pass(FoldConstants(), program)
    golden(show(program))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, channels, plane: first(torch.relu(last(x))),
        lambda x, y, channels, plane: first(last(x) + last(y)),
        lambda x, y, channels, plane: first(torch.where(last(x) > 0, last(x), last(y) * channels)),
        lambda x, y, channels, plane: x.mT.exp().mT * y,
        lambda x, y, channels, plane: first(last(x).float() * 2),
        lambda x, y, channels, plane: first(last(x) * 2) + first(last(y).exp()),
    ],
)
def test_cancels(canonical, run_pass, targets, function, dtype):
    program = canonical(function, dtype)
    assert run_pass(FoldTransposes(), program).changed
    run_pass(FoldConstants(), program)
    run_pass(Canonicalize(), program)
    assert "aten.permute" not in targets(program)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y, channels, plane: first(torch.softmax(last(x), -1) * 2), "%softmax is not permuted"),
        (lambda x, y, channels, plane: (first(z := last(x).exp()), z), "%exp has other users"),
        (lambda x, y, channels, plane: first(last(x) + last(y).cumsum(1)), "%cumsum is not permuted"),
        (lambda x, y, channels, plane: last(last(x).exp()), "%permute is not permuted"),
    ],
)
def test_refuses(canonical, run_pass, function, reason):
    report = run_pass(FoldTransposes(), canonical(function))
    assert not report.changed
    assert [note.text.split()[1:] for note in report.refusals] == [reason.split()[1:]]


def test_permutations_of_constants_alone_are_for_constant_folding(canonical, refusals):
    program = canonical(lambda x, y, channels, plane: x.mT + (plane.exp().permute(2, 0, 1) * 2))
    assert refusals(FoldTransposes(), program) == []

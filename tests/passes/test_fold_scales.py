"""Factors and terms go into weights and biases; what it refuses and why."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fold_scales import FoldScales

BATCH = Dim("batch", min=1, max=16)


class Around(nn.Module):
    """``f(product(g(x)))``."""

    def __init__(self, product, after=lambda y: y, before=lambda x: x):
        super().__init__()
        self.product, self.after, self.before = product, after, before
        self.register_buffer("row", torch.rand(6) + 0.5)
        self.register_buffer("plane", torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        return self.after(self.product(self.before(x)), self.row, self.plane)


@pytest.fixture
def canonical(exported, run_pass):
    def make(product, shape, after=lambda y, row, plane: y, before=lambda x: x, dtype=torch.float32, **kwargs):
        torch.manual_seed(0)
        program = exported(Around(product, after, before).to(dtype), torch.randn(shape).to(dtype), **kwargs)
        run_pass(Canonicalize(), program)
        return program

    return make


def products(program, targets):
    return [name for name in targets(program) if name.startswith("aten")]


def test_golden(canonical, run_pass, show, golden):
    after = lambda y, row, plane: (y.view(-1, 2, 3).transpose(0, 1) * 0.125) + 1  # noqa: E731
    program = canonical(nn.Linear(8, 6), (3, 8), after, before=lambda x: x * 2, dynamic_shapes={"x": {0: BATCH}})
    report = run_pass(FoldScales(), program, [torch.randn(5, 8)])
    assert len(report.changes) == 3
    run_pass(FoldConstants(), program)
    golden(show(program))


@pytest.mark.parametrize(
    ("bias", "after"),
    [
        (True, lambda y, row, plane: y * 3),
        (False, lambda y, row, plane: y / row),
        (True, lambda y, row, plane: y * row + row),
        (True, lambda y, row, plane: 2 * (y - row) * row),
        (False, lambda y, row, plane: y - 1.5),
        (True, lambda y, row, plane: y + row[:1] * 2),
        (False, lambda y, row, plane: (y + row) * row),
    ],
)
def test_folds_after_a_linear_map(canonical, run_pass, targets, after, bias):
    program = canonical(nn.Linear(8, 6, bias=bias), (2, 3, 8), after)
    run_pass(FoldScales(), program)
    run_pass(FoldConstants(), program)
    assert products(program, targets) == ["aten.linear"]


@pytest.mark.parametrize(
    "product",
    [
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
)
def test_folds_around_convolutions(canonical, run_pass, targets, product):
    program = canonical(
        product, (2, 4, 5, 5), lambda y, row, plane: y * plane + plane[None] - 1, before=lambda x: x / 4
    )
    assert len(run_pass(FoldScales(), program).changes) == 4
    run_pass(FoldConstants(), program)
    assert products(program, targets) == ["aten.convolution"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(canonical, run_pass, targets, dtype):
    program = canonical(nn.Linear(8, 6), (3, 8), lambda y, row, plane: y * row + 1, dtype=dtype)
    run_pass(FoldScales(), program)
    run_pass(FoldConstants(), program)
    assert products(program, targets) == ["aten.linear"]
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert node.args[1].meta["val"].dtype == dtype


@pytest.mark.parametrize(
    ("shape", "after", "reason"),
    [
        ((3, 8), lambda y, row, plane: (y * 2, y), "linear has other users"),
        ((3, 8), lambda y, row, plane: (y.view(18) * 2, y.view(18)[:1]), "linear has other users"),
        ((6, 8), lambda y, row, plane: y * plane[:, 0], "its constant is not one value per output of the linear"),
        ((3, 8), lambda y, row, plane: y * plane, "its constant is not one value per output of the linear"),
        ((2, 3, 8), lambda y, row, plane: y.transpose(1, 2) * row[:3], "its constant is not one value per output"),
        ((3, 8), lambda y, row, plane: y * row.double(), "it changes the dtype from torch.float32 to torch.float64"),
    ],
)
def test_refuses_after(canonical, refusals, shape, after, reason):
    (text,) = refusals(FoldScales(), canonical(nn.Linear(8, 6), shape, after))
    assert text.startswith(reason)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x, indices):
        embedded = nn.functional.embedding(indices, self.weight)
        return nn.functional.linear(x * 2, self.weight) * 3 + 1, embedded


def test_a_weight_with_other_users_is_not_held_twice(exported, run_pass):
    program = exported(Tied(), torch.randn(3, 8), torch.tensor([1, 2]))
    run_pass(Canonicalize(), program)
    report = run_pass(FoldScales(), program)
    assert [note.text for note in report.refusals] == [
        "the factor before it stays: its weight has other users",
        "its weight has other users",
    ]
    assert not report.changes, "the term comes after the factor that stays"


def test_a_term_goes_into_the_bias_of_a_shared_weight(exported, run_pass, targets):
    class Term(Tied):
        def forward(self, x, indices):
            return nn.functional.linear(x, self.weight) + 1, nn.functional.embedding(indices, self.weight)

    program = exported(Term(), torch.randn(3, 8), torch.tensor([1, 2]))
    assert len(run_pass(FoldScales(), program).changes) == 1
    assert "aten.add.Tensor" not in targets(program)


def test_a_scaled_value_with_other_users_stays(exported, run_pass, refusals):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = x * 0.5
            return self.q(y), self.k(y)

    program = exported(Two(), torch.randn(3, 8))
    assert refusals(FoldScales(), program) == ["the factor before it stays: the scaled value has other users"] * 2


def test_a_computed_weight_or_term_is_no_candidate(exported, run_pass, refusals):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, w, t):
            return torch.conv1d(x[None], w) * 2, self.linear(x) * t, self.linear(x) + x

    program = exported(Computed(), torch.randn(8, 8), torch.randn(4, 8, 1), torch.randn(8))
    run_pass(Canonicalize(), program)
    assert refusals(FoldScales(), program) == ["its weight is not a constant"]


@pytest.mark.parametrize("number", [0.0, float("inf"), float("nan")])
def test_numbers_that_a_weight_cannot_take(canonical, run_pass, number):
    """Zero is a factor like any other; infinity and NaN would make other numbers of zero weights."""
    program = canonical(nn.Linear(8, 6), (3, 8), lambda y, row, plane: y * number)
    assert run_pass(FoldScales(), program).changed == (number == 0.0)

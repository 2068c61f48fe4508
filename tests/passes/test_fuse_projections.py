import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tilewright.passes.base import Report
from tilewright.passes.fuse_projections import FuseProjections


class Attention(nn.Module):
    """Queries with a bias, keys without, fewer values; then a gate and an up projection of another value."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(8, 4)
        self.gate, self.up = nn.Linear(12, 6, bias=False), nn.Linear(12, 6, bias=False)
        self.to(dtype)

    def forward(self, x):
        q = self.q(x).view(*x.shape[:-1], 3, 4)
        k = self.k(x).view(x.shape[0], x.shape[1] * 12)
        mixed = q.flatten(2) + k.view(q.shape).flatten(2)
        return F.silu(self.gate(mixed)) * self.up(mixed), self.v(x).transpose(0, 1)


class Shared(nn.Module):
    """Calls a function with linear layers a, b, c on 8 columns."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.matrices = nn.ParameterList([torch.randn(8, 3), torch.randn(8, 5)])

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_that_share_their_input(dtype, exported, run_pass, targets):
    batch, seq = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("seq", min=1, max=16)
    program = exported(Attention(dtype), torch.randn(3, 5, 8).to(dtype), dynamic_shapes=({0: batch, 1: seq},))
    report = run_pass(FuseProjections(), program, inputs=(torch.randn(1, 7, 8).to(dtype),))
    assert len(report.changes) == 5 and targets(program).count("aten.linear") == 2
    first, second = (node for node in program.graph.nodes if "linear" in str(node.target))
    assert first.args[1].meta["val"].shape == (28, 8) and first.args[2].meta["val"].shape == (28,)
    assert second.args[1].meta["val"].shape == (12, 12) and len(second.args) == 2


def test_golden(exported, run_pass, show, golden):
    program = exported(Attention(), torch.randn(3, 5, 8))
    run_pass(FuseProjections(), program)
    golden(show(program))


@pytest.mark.parametrize("product", ["mm", "addmm", "matmul"])
def test_products_with_matrices(product, exported, run_pass, targets):
    def function(m, x):
        if product == "addmm":
            return [torch.addmm(w[0], x, w) for w in m.matrices]
        return [getattr(torch, product)(x, w) for w in m.matrices]

    program = exported(Shared(function), torch.randn(3, 8))
    if product == "addmm":  # the bias here is a row of the weight: used twice
        assert not run_pass(FuseProjections(), program).changed
        return
    assert len(run_pass(FuseProjections(), program).changes) == 2
    assert sum(product in target for target in targets(program)) == 1


def test_addmm(exported, run_pass, targets):
    def function(m, x):
        return [torch.addmm(layer.bias, x, layer.weight) for layer in (m.a, m.b, m.c)]

    program = exported(Shared(function), torch.randn(3, 8))
    assert len(run_pass(FuseProjections(), program).changes) == 3
    assert targets(program).count("aten.addmm") == 1


def test_a_projection_between_the_others_and_their_use(exported, run_pass):
    """The joined product must stand before the first, though later weights are computed after it."""

    def function(m, x):
        y = m.a(x).relu()
        return m.b(y), F.linear(x, m.c.weight * 2, m.c.bias + 1)

    program = exported(Shared(function), torch.randn(3, 8))
    assert len(run_pass(FuseProjections(), program).changes) == 2
    program.graph.lint()


REFUSED = {
    "tied": (lambda m, x: (F.linear(x, m.a.weight), m.b(x), m.a.weight.sum()), "is also used by"),
    "one_weight": (lambda m, x: (F.linear(x, m.a.weight), F.linear(x, m.a.weight, m.b.bias)), "is also used by"),
    "computed": (lambda m, x: (F.linear(x, x @ x.mT @ x), F.linear(x, x)), "is not constant"),
    "bias": (lambda m, x: (F.linear(x, m.a.weight, x[0]), m.b(x)), "is not constant"),
    "inputs": (lambda m, x: (m.a(x), m.b(x + 1), m.c(x * 2)), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_why(name, exported, refusals):
    function, reason = REFUSED[name]
    reasons = refusals(FuseProjections(), exported(Shared(function), torch.randn(8, 8)))
    assert [reason in text for text in reasons[:1]] == ([True] if reason else []), reasons


def test_refuses_a_bias_of_another_dtype(exported):
    program = exported(Shared(lambda m, x: (m.a(x), m.b(x))), torch.randn(3, 8))
    weight = next(node for node in program.graph.nodes if node.name == "b_weight")
    weight.meta["val"] = weight.meta["val"].to(torch.float64)
    report = Report()
    FuseProjections().run(program, report)
    assert not report.changed and "no vector of the weight's width and dtype" in report.refusals[0].text

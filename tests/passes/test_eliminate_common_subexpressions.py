"""Common subexpressions: equal calls, tied weights and sizes are one; random numbers and number types stay apart."""

import torch
from torch import nn
from torch.export import Dim

from tilewright.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.graph.regions import is_region


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("alias", self.first.weight.detach().view(8, 8))
        self.register_buffer("part", self.first.weight.detach()[:4])

    def forward(self, x, y):
        a = torch.softmax(self.first(x).view(x.shape[0], -1), dim=-1)
        b = torch.softmax(self.second(x).view(y.shape[0], -1), dim=-1)
        c = torch.softmax((x @ self.alias.t()).view(x.shape[0], -1), dim=-1)
        return a + b, c, y @ self.part.t(), y @ self.alias.t()


def test_golden(exported, run_pass, show, golden):
    torch.manual_seed(0)
    batch = Dim("batch", min=1, max=16)
    program = exported(
        Repeats(), torch.randn(3, 2, 8), torch.randn(3, 8), dynamic_shapes={"x": {0: batch}, "y": {0: batch}}
    )
    report = run_pass(EliminateCommonSubexpressions(), program)
    assert report.changed
    golden(show(program))


def test_arguments_that_differ_in_type_are_different(exported, run_pass, targets):
    class Numbers(nn.Module):
        def forward(self, x):
            return x + 1, x + 1.0, x + True, x * 0.0, x * -0.0

    program = exported(Numbers(), torch.arange(4))
    report = run_pass(EliminateCommonSubexpressions(), program)
    assert not report.changed and len(targets(program)) == 5


def test_keywords_count(exported, run_pass, targets):
    class Keywords(nn.Module):
        def forward(self, x):
            gelu = nn.functional.gelu
            return gelu(x), gelu(x, approximate="tanh"), gelu(x), torch.add(x, x, alpha=2), torch.add(x, x)

    program = exported(Keywords(), torch.randn(4))
    run_pass(EliminateCommonSubexpressions(), program)
    assert len(targets(program)) == 4


def test_random_numbers_are_drawn_as_often_as_before(exported, refusals):
    class Noise(nn.Module):
        def forward(self, x):
            return torch.rand_like(x) + torch.rand_like(x), torch.empty_like(x).shape[0]

    assert refusals(EliminateCommonSubexpressions(), exported(Noise(), torch.randn(4))) == []


def test_equal_regions_are_one(exported, run_pass):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Parameter(torch.randn(256, 128))

        def forward(self, x):
            return x @ (self.large * 2), x @ (self.large * 2), x @ (self.large * 3)

    program = exported(Twice(), torch.randn(2, 256))
    run_pass(FoldConstants(), program)
    assert sum(is_region(node) for node in program.graph.nodes) == 3
    run_pass(EliminateCommonSubexpressions(), program)
    assert sum(is_region(node) and bool(node.users) for node in program.graph.nodes) == 2


def test_small_constants_that_folding_made_are_one_by_content(exported, run_pass):
    class Masks(nn.Module):
        def forward(self, x):
            return (
                x + torch.full((4, 4), -1.0).triu(1),
                x * torch.full((4, 4), -1.0).triu(1),
                x - torch.ones(4, 4).triu(),
            )

    program = exported(Masks(), torch.randn(4, 4))
    run_pass(FoldConstants(), program)
    run_pass(EliminateCommonSubexpressions(), program)
    assert sum(node.op == "get_attr" and bool(node.users) for node in program.graph.nodes) == 2


def test_weights_with_equal_content_stay_apart(exported, run_pass):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

        def forward(self, x):
            return self.norms[1](self.norms[0](x))

    assert not run_pass(EliminateCommonSubexpressions(), exported(Norms(), torch.randn(2, 8))).changed

"""Dead code: unused values and the tensors and bodies only they held go; inputs stay."""

import torch
from torch import nn

from tilewright.passes.base import Report
from tilewright.passes.eliminate_dead_code import EliminateDeadCode
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.graph.edit import insert

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Parameter(torch.randn(8))
        self.large = nn.Parameter(torch.randn(256, 256))

    def forward(self, x, unused):
        return x * self.used, x.unsqueeze(0) @ self.large[:8] * 2


def with_dead_code(exported):
    torch.manual_seed(0)
    program = exported(Model(), torch.randn(8), torch.randn(2))
    output = program.graph.output_node()
    (x, *_) = program.graph.find_nodes(op="placeholder")
    first = insert(program.graph, output, aten.exp.default, (x,))
    insert(program.graph, output, aten.mul.Tensor, (first, 2))
    insert(program.graph, output, aten.rand_like.default, (x,))
    return program


def test_golden(exported, run_pass, show, golden):
    program = with_dead_code(exported)
    report = run_pass(EliminateDeadCode(), program)
    assert len(report.changes) == 3
    golden(show(program))


def test_lets_go_of_weights_and_bodies(exported, run_pass):
    program = exported(Model(), torch.randn(8), torch.randn(2))
    run_pass(FoldConstants(), program)
    output = program.graph.output_node()
    output.args = ((output.args[0][0],),)
    report = Report()
    EliminateDeadCode().run(program, report)
    assert report.changed
    assert list(program.module._modules) == [] and list(program.module._buffers) == ["used"]
    assert len(program.graph.find_nodes(op="placeholder")) == 2


def test_keeps_nested_attributes_that_are_named(exported, run_pass, assert_same_outputs, cloned):
    program = exported(nn.Linear(4, 4), torch.randn(2, 4))
    before = cloned(program)
    assert not run_pass(EliminateDeadCode(), program).changed
    assert_same_outputs(before, program)

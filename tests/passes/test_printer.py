"""The printed graph: names of symbols and constants, regions with their bodies."""

import torch
from torch import nn

from tilewright.passes.graph.printer import show as show_module
from tilewright.passes.graph.regions import Region, outline


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.layer(x)).to(torch.bfloat16)
        return y.reshape(2 * x.shape[0], -1), y.max(dim=-1)


def small(exported):
    torch.manual_seed(0)
    return exported(Small(), torch.randn(3, 8), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}})


def test_shows_a_program(exported, show, golden):
    program = small(exported)
    assert show(program) == show(program)
    golden(show(program))


def test_shows_regions(exported, show, golden):
    program = small(exported)
    nodes = [node for node in program.graph.nodes if str(node.target) in ("aten.linear.default", "aten.relu.default")]
    outline(program.module, nodes, Region("kernel", "matmul"), "kernel_0")
    golden(show(program))


def test_shows_a_module_alone(exported):
    assert '%layer_weight : f32[4, 8] = constant "layer.weight"' in show_module(small(exported).module)

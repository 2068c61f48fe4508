"""Bringing a traced program into functional form gives what PyTorch's own function gives, operator by operator."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from tilewright.compiler import decompositions


class Composite(nn.Module):
    """Composite operators that are kept, ones that are taken apart, ones in graphs within, and mutations."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.batch = nn.BatchNorm1d(12)
        self.instance = nn.InstanceNorm1d(3)
        self.weight = nn.Parameter(torch.randn(6, 12))

    def forward(self, x):
        y = F.dropout(self.norm(self.linear(x)), 0.1, self.training)
        with torch.no_grad():
            scale = F.silu(torch.einsum("bi,ij->bj", y, y.mT @ y)).type_as(y)
        z = self.batch(y * scale).unflatten(1, (3, 4)).contiguous()
        z = self.instance(z).flatten(1).square_().chunk(2, dim=1)
        heads = torch.stack(z, 1).reshape(-1, 2, 2, 3)
        heads = F.scaled_dot_product_attention(heads, heads, heads).reshape(x.shape[0], -1)
        return torch.matmul(torch.hstack([heads, self.weight[:1].expand_as(heads)[:, :0]]), self.weight.T)


def exported():
    torch.manual_seed(0)
    return torch.export.export(Composite().eval(), (torch.randn(5, 8),), dynamic_shapes=({0: Dim("n", max=64)},))


def written(program):
    return str(program.graph), str(program.graph_signature), str(program.range_constraints)


@torch.no_grad()
def test_as_pytorch_does_it():
    assert decompositions._KNOWN, "this PyTorch keeps all composite operators ready, which is slow"
    program = exported()
    got, want = decompositions.functional(program), program.run_decompositions({})
    assert written(got) == written(want)
    names = {str(node.target) for node in got.graph.nodes}
    assert {"aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.matmul.default"} <= names
    x = torch.randn(9, 8)
    torch.testing.assert_close(got.module()(x), want.module()(x), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_with_a_pytorch_whose_parts_are_others(monkeypatch):
    program = exported()
    want = written(decompositions.functional(program))
    monkeypatch.setattr(decompositions, "_KNOWN", False)
    monkeypatch.delattr(decompositions, "_decompose_exported_program")
    assert written(decompositions.functional(program)) == want

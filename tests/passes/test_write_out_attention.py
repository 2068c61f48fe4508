"""Attention that no kernel takes becomes products and a softmax, and stays so."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tilewright.passes.recognise_attention import RecogniseAttention
from tilewright.passes.write_out_attention import WriteOutAttention


class Attention(nn.Module):
    def __init__(self, causal=False, grouped=False, scale=None):
        super().__init__()
        self.causal, self.grouped, self.scale = causal, grouped, scale

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, enable_gqa=self.grouped, scale=self.scale
        )


def operands(d, dv=None, heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (2, 4, 5, d), (2, heads, 7, d), (2, heads, 7, dv or d)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


CASES = {
    "long": (Attention(), operands(300, heads=4)),
    "causal": (Attention(causal=True, scale=0.3), operands(257, 8, heads=4)),
    "grouped": (Attention(grouped=True), operands(300)),
    "float64": (Attention(), operands(8, heads=4, dtype=torch.float64)),
    "added": (Attention(), [*operands(300, heads=4), torch.randn(5, 7)]),
    "hidden": (Attention(), [*operands(300, heads=4), torch.rand(2, 1, 5, 7) > 0.8]),
}


@pytest.mark.parametrize("name", CASES)
def test_writes_out(name, exported, run_pass, targets):
    module, args = CASES[name]
    program = exported(module, *args)
    report = run_pass(WriteOutAttention(), program)
    assert len(report.changes) == 1
    names = targets(program)
    assert names.count("aten.matmul") == 2 and "aten.scaled_dot_product_attention" not in names
    assert not run_pass(RecogniseAttention(), program).changed


def test_a_row_that_sees_nothing_is_zero(exported, run_pass):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    program = exported(Attention(), *operands(300, heads=4), mask)
    run_pass(WriteOutAttention(), program)
    assert program.run(program.sample)[0][:, :, 2].abs().max() == 0


def test_heads_whose_length_varies(exported, run_pass):
    program = exported(
        Attention(), *operands(6, heads=4), dynamic_shapes={"q": "2,4,5,d:1..9", "k": "2,4,7,d", "v": "2,4,7,d"}
    )
    run_pass(WriteOutAttention(), program)
    for d in (1, 9):
        inputs = tuple(operands(d, heads=4))
        torch.testing.assert_close(program.run(inputs)[0], F.scaled_dot_product_attention(*inputs))


def test_golden(exported, run_pass, show, golden):
    program = exported(Attention(causal=True, grouped=True), *operands(300))
    run_pass(WriteOutAttention(), program)
    golden(show(program))


def test_leaves_what_kernels_take(exported, run_pass):
    assert not run_pass(WriteOutAttention(), exported(Attention(causal=True), *operands(256, 1, heads=4))).changed

"""Upsampling convolutions without overlap become pointwise convolutions; what is refused and why."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.split_transposed_convolution import SplitTransposedConvolution

BATCH = Dim("batch", min=1, max=16)


@pytest.fixture
def canonical(exported, run_pass):
    def make(module):
        torch.manual_seed(0)
        program = exported(module, torch.randn(2, 6, 5, 7), dynamic_shapes={"input": {0: BATCH}})
        run_pass(Canonicalize(), program)
        return program

    return make


def test_golden(canonical, run_pass, show, golden):
    program = canonical(nn.ConvTranspose2d(6, 4, 2, 2))
    report = run_pass(SplitTransposedConvolution(), program, [torch.randn(1, 6, 5, 7)])
    assert len(report.changes) == 1
    golden(show(program))


@pytest.mark.parametrize(("factor", "bias"), [(2, False), (3, True), (1, True)])
def test_numbers(factor, bias, canonical, run_pass):
    report = run_pass(SplitTransposedConvolution(), canonical(nn.ConvTranspose2d(6, 5, factor, factor, bias=bias)))
    assert report.changed


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose2d(6, 4, 3, 2), "overlap or leave gaps"),
        (nn.ConvTranspose2d(6, 4, 2, 2, padding=1), "padding or dilation"),
        (nn.ConvTranspose2d(6, 4, 2, 2, groups=2), "2 groups"),
        (nn.ConvTranspose2d(6, 4, (2, 3), (2, 3)), "overlap or leave gaps"),
    ],
)
def test_refusals(module, reason, canonical, refusals):
    (found,) = refusals(SplitTransposedConvolution(), canonical(module))
    assert reason in found

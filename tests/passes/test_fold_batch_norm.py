"""Batch norm goes into the product before it, or becomes a factor and a term; what it refuses and why."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fold_batch_norm import FoldBatchNorm
from tilewright.passes.fold_constants import FoldConstants

BATCH = Dim("batch", min=1, max=16)


@pytest.fixture
def canonical(exported, run_pass):
    def make(module, *args, **kwargs):
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.3, 0.5)
        program = exported(module, *args, **kwargs)
        run_pass(Canonicalize(), program)
        return program

    return make


def test_golden(canonical, run_pass, show, golden):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    program = canonical(net, torch.randn(2, 3, 8, 8), dynamic_shapes={"input": {0: BATCH}})
    report = run_pass(FoldBatchNorm(), program, [torch.randn(1, 3, 8, 8)])
    assert len(report.changes) == 2 and not report.refusals
    run_pass(FoldConstants(), program)
    golden(show(program))


@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("product", "norm", "shape"),
    [
        (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (2, 4, 9)),
        (lambda bias: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, bias=bias), nn.BatchNorm2d, (2, 4, 9, 9)),
        (lambda bias: nn.Conv2d(6, 6, 3, groups=6, bias=bias), nn.BatchNorm2d, (2, 6, 5, 5)),
        (lambda bias: nn.Conv3d(2, 6, 2, bias=bias), nn.BatchNorm3d, (1, 2, 3, 4, 4)),
        (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
        (lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 5)),
        (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (3, 4)),
    ],
)
def test_folds(canonical, run_pass, targets, product, norm, shape, bias, affine):
    program = canonical(nn.Sequential(product(bias), norm(6, affine=affine)), torch.randn(shape))
    report = run_pass(FoldBatchNorm(), program)
    assert len(report.changes) == 1 and "folded into" in report.changes[0].text
    run_pass(FoldConstants(), program)
    assert len([name for name in targets(program) if name.startswith("aten")]) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_folds_in_other_dtypes(canonical, run_pass, targets, dtype):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    program = canonical(net, torch.randn(2, 3, 8, 8).to(dtype))
    run_pass(FoldBatchNorm(), program)
    assert "aten.batch_norm" not in targets(program)
    widened = "aten._to_copy" in targets(program)
    assert widened == (dtype != torch.float64), "half precision weights change in float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_it_is_a_factor_and_a_term(canonical, run_pass, targets, dtype):
    program = canonical(nn.BatchNorm2d(4).to(dtype), torch.randn(2, 4, 5, 5).to(dtype))
    run_pass(FoldBatchNorm(), program)
    run_pass(FoldConstants(), program)
    pointwise = ["aten.mul.Tensor", "aten.add.Tensor"]
    assert targets(program) == (pointwise if dtype == torch.float32 else ["aten._to_copy", *pointwise, "aten._to_copy"])


class Shared(nn.Module):
    """The convolution's value is also an output."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.convolution(x)
        return self.norm(y), y


class OtherAxis(nn.Module):
    """A linear map of sequences: the norm is over axis 1, the outputs are on axis 2."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.linear(x))


class ComputedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x, w):
        return self.norm(torch.conv2d(x, w))


@pytest.mark.parametrize(
    ("module", "shapes", "reason"),
    [
        (Shared, [(2, 3, 8, 8)], "convolution has other users"),
        (OtherAxis, [(2, 5, 4)], "it normalises axis 1, the outputs of the linear are on axis 2"),
        (ComputedWeight, [(2, 3, 8, 8), (4, 3, 3, 3)], "its weight is not a constant"),
    ],
)
def test_refuses_to_fold_and_says_why(canonical, run_pass, targets, module, shapes, reason):
    program = canonical(module(), *(torch.randn(shape) for shape in shapes))
    report = run_pass(FoldBatchNorm(), program)
    assert [note.text.split(": ")[1] for note in report.refusals] == [reason]
    assert "aten.batch_norm" not in targets(program), "it is a factor and a term instead"


class BatchStatistics(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


class ComputedStatistics(nn.Module):
    def forward(self, x, mean, var):
        return nn.functional.batch_norm(x, mean, var)


def test_refuses_statistics_that_are_not_constants(canonical, refusals):
    program = canonical(BatchStatistics(), torch.randn(4, 3, 5))
    (reason,) = refusals(FoldBatchNorm(), program)
    assert "is no inference batch norm" in reason or reason == "it uses the statistics of the batch"
    program = canonical(ComputedStatistics(), torch.randn(4, 3, 5), torch.randn(3), torch.rand(3))
    assert refusals(FoldBatchNorm(), program) == ["its weights or statistics are not constants"]


def test_a_shared_weight_keeps_its_other_use(canonical, run_pass):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, y):
            return self.norm(self.convolution(x)), self.convolution(y)

    program = canonical(Twice(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    assert len(run_pass(FoldBatchNorm(), program).changes) == 1

"""Root-mean-square norm and layer norm, in the spellings of models and exporters."""

import pytest
import torch
from torch import nn

from tilewright.passes.recognise_layer_norm import RecogniseLayerNorm
from tilewright.passes.recognise_rms_norm import RecogniseRmsNorm


class Written(nn.Module):
    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight = nn.Parameter(torch.randn(8).to(dtype))
        self.bias = nn.Parameter(torch.randn(8).to(dtype))
        self.wide = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(4, 8).to(dtype))
        self.register_buffer("two", torch.tensor(2.0))
        self.register_buffer("eps", torch.tensor([1e-5]).to(dtype))

    def forward(self, x):
        return self.function(x, self)


def llama(x, m):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight * wide.to(x.dtype)


def t5(x, m):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return m.weight * x.to(m.weight.dtype)


def gemma(x, m):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + m.weight.float())).type_as(x)


RMS = {
    "llama": llama,
    "t5": t5,
    "gemma": gemma,
    "onnx": lambda x, m: x * (1 / torch.sqrt(torch.pow(x, m.two).mean(-1, keepdim=True) + m.eps)) * m.weight,
    "divided": lambda x, m: m.weight * (x / (torch.square(x).sum(-1, keepdim=True) / 8 + m.eps).sqrt()),
    "power": lambda x, m: (x * x).mean(-1).unsqueeze(-1).add(1e-6).pow(-0.5) * x * m.weight.view(1, 1, 8),
    "reciprocal": lambda x, m: x * torch.sqrt((x * x).mean(-1, keepdim=True)).reciprocal() * m.weight,
    "two_axes": lambda x, m: x * torch.rsqrt((x**2).mean((1, 2), keepdim=True) + 1e-5) * m.matrix,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(name, dtype, exported, run_pass, targets):
    batch = torch.export.Dim("batch", min=1, max=16)
    program = exported(Written(RMS[name], dtype), torch.randn(3, 4, 8).to(dtype), dynamic_shapes=({0: batch},))
    run_pass(RecogniseRmsNorm(), program)
    norms = [node for node in program.graph.nodes if str(node.target) == "aten.rms_norm.default"]
    assert len(norms) == 1 and norms[0].args[2] is not None
    assert not {"aten.rsqrt", "aten.mean.dim", "aten.sqrt", "aten.pow.Tensor_Scalar"} & set(targets(program))


def test_rms_norm_golden(exported, run_pass, show, golden):
    program = exported(Written(llama, torch.bfloat16), torch.randn(3, 4, 8).bfloat16())
    run_pass(RecogniseRmsNorm(), program)
    golden(show(program))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m: (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)) * m.matrix,
        lambda x, m: (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)) * m.two,
        lambda x, m: (n := x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)) * m.weight + n,
    ],
)
def test_rms_norm_leaves_other_factors(function, exported, run_pass, targets):
    program = exported(Written(function), torch.randn(3, 4, 8))
    run_pass(RecogniseRmsNorm(), program)
    norm = next(node for node in program.graph.nodes if str(node.target) == "aten.rms_norm.default")
    assert norm.args[2] is None and "aten.mul.Tensor" in targets(program)


def test_a_wide_weight_stays_outside_a_narrow_norm(exported, run_pass):
    def function(x, m):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * m.wide

    program = exported(Written(function, torch.bfloat16), torch.randn(3, 4, 8).bfloat16())
    run_pass(RecogniseRmsNorm(), program, tolerance=5e-3)
    norm = next(node for node in program.graph.nodes if str(node.target) == "aten.rms_norm.default")
    assert norm.args[2] is None and norm.meta["val"].dtype == torch.float32


NOT_RMS = {
    "another_value": lambda x, m: (x + 1) * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    "another_axis": lambda x, m: x * torch.rsqrt((x * x).mean(0, keepdim=True) + 1e-6),
    "sum": lambda x, m: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
    "cube": lambda x, m: x * torch.rsqrt((x * x.abs()).mean(-1, keepdim=True) + 1e-6),
    "root_not_reciprocal": lambda x, m: x * torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    "widened": lambda x, m: x[:, :1] * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6),
    "negative_eps": lambda x, m: x * torch.rsqrt((x * x).mean(-1, keepdim=True) - 1e-6),
}


def every(functions):
    """All of some functions at once: exporting is most of a test's time."""
    return Written(lambda x, m: tuple(function(x, m) for function in functions))


def test_rms_norm_refuses_what_is_something_else(exported, refusals):
    refusals(RecogniseRmsNorm(), exported(every(NOT_RMS.values()), torch.randn(8, 8, 8)))


def test_rms_norm_says_why(exported, refusals):
    wide = torch.export.Dim("wide", min=2, max=16)
    layer = exported(Written(LAYER["onnx"]), torch.randn(3, 4, 8))
    assert refusals(RecogniseRmsNorm(), layer) == ["the mean was subtracted before: a layer norm"]
    varying = exported(
        Written(lambda x, m: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
        torch.randn(3, 4),
        dynamic_shapes=({1: wide},),
    )
    (reason,) = refusals(RecogniseRmsNorm(), varying)
    assert reason.startswith("normalises over sizes that vary")


def onnx_layer_norm(x, m):
    centred = x - x.mean(-1, keepdim=True)
    variance = torch.pow(centred, m.two).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-12) * m.weight + m.bias


def two_subtractions(x, m):
    variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return m.bias + m.weight * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + m.eps))


def wide_layer_norm(x, m):
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * m.weight + m.bias


LAYER = {
    "onnx": onnx_layer_norm,
    "two_subtractions": two_subtractions,
    "wide": wide_layer_norm,
    "variance": lambda x, m: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias
    ),
    "correction": lambda x, m: (
        (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + 1e-5) ** -0.5 * m.weight + m.bias
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(name, dtype, exported, run_pass, targets):
    batch = torch.export.Dim("batch", min=1, max=16)
    program = exported(Written(LAYER[name], dtype), torch.randn(3, 4, 8).to(dtype) + 1, dynamic_shapes=({0: batch},))
    run_pass(RecogniseLayerNorm(), program, tolerance=1e-5 if dtype == torch.float32 else 1e-2)
    norms = [node for node in program.graph.nodes if str(node.target) == "aten.layer_norm.default"]
    assert len(norms) == 1 and None not in norms[0].args[2:4]
    assert targets(program)[-1] == "aten.layer_norm"


def test_layer_norm_golden(exported, run_pass, show, golden):
    program = exported(Written(LAYER["onnx"]), torch.randn(3, 4, 8))
    run_pass(RecogniseLayerNorm(), program)
    golden(show(program))


def test_layer_norm_without_weight_or_bias(exported, run_pass, targets):
    def plain(x, m):
        centred = x - x.mean((-2, -1), keepdim=True)
        return centred / torch.sqrt((centred**2).mean((-1, -2), keepdim=True) + 1e-5), x.sum()

    program = exported(Written(plain), torch.randn(3, 4, 8))
    run_pass(RecogniseLayerNorm(), program)
    assert targets(program) == ["aten.layer_norm", "aten.sum"]


NOT_LAYER = [
    lambda x, m: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    lambda x, m: (x - x.mean(-1, keepdim=True)) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5),
    lambda x, m: x / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    lambda x, m: (x - x.mean((0, -1), keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
]


def test_layer_norm_refuses_what_is_something_else(exported, refusals):
    refusals(RecogniseLayerNorm(), exported(every(NOT_LAYER), torch.randn(3, 4, 8)))

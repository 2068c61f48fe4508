"""Annotating and converting: structure, numbers, refusals, a second run; recipes and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tilewright.passes.annotate_quantization import AnnotateQuantization
from tilewright.passes.base import Report
from tilewright.passes.convert_quantized import ConvertQuantized
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fuse_projections import FuseProjections
from tilewright.passes.graph.quantization import Ledger, WeightSpec, read_recipe
from tilewright.passes.graph.quantized_ops import DEQUANTIZE, QUANTIZE_WEIGHT, QUANTIZED_LINEAR, rounded_rows
from tilewright.runtime.errors import CompileError, UsageError


class Model(nn.Module):
    """An embedding whose table is also the head, two projections of one value, and one after it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 32)
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

    def forward(self, tokens):
        x = self.table(tokens)
        return F.linear(self.c(F.silu(self.a(x)) * self.b(x)), self.table.weight)


@pytest.fixture
def model(exported):
    return exported(Model(), torch.tensor([[1, 2, 3], [4, 19, 0]]))


def convert(program, recipe, activations="auto"):
    """All passes in order, without checks of numbers: they are to change."""
    ledger = Ledger()
    for one in (
        AnnotateQuantization(read_recipe(recipe, activations), ledger),
        FuseProjections(),
        ConvertQuantized(ledger),
    ):
        report = Report()
        one.run(program, report)
        again = Report()
        one.run(program, again)
        assert not again.changed
    FoldConstants().run(program, Report())
    program.graph.lint()
    program.module.recompile()
    return ledger


def rounded(weight, *form):
    return DEQUANTIZE(QUANTIZE_WEIGHT(weight, *form, True), weight.shape[1], *form)


def test_golden(model, show, golden):
    convert(model, "int4-g32-z")
    golden(show(model))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_computes_with_rounded_weights(model, activations):
    (tokens,) = model.sample
    ledger = convert(model, "int4-g32", activations)
    net = Model()

    def product(x, weight, bias=None):
        if activations == "int8":
            x = rounded_rows(x, 32)
        return F.linear(x, rounded(weight, 4, 32, True), bias)

    with torch.no_grad():
        x = F.embedding(tokens, rounded(net.table.weight, 8, 0, True))
        y = product(F.silu(product(x, net.a.weight, net.a.bias)) * product(x, net.b.weight), net.c.weight, net.c.bias)
        expected = product(y, net.table.weight)
    torch.testing.assert_close(model.run((tokens,))[0], expected, rtol=1e-5, atol=1e-6)
    assert [(layer.name, str(layer.asked), layer.refusal) for layer in ledger.layers] == [
        ("table.weight", "int8", ""),
        ("a.weight", "int4-g32", ""),
        ("b.weight", "int4-g32", ""),
        ("c.weight", "int4-g32", ""),
        ("table.weight", "int4-g32", ""),
    ]
    joined = next(node for node in model.graph.nodes if node.target is QUANTIZED_LINEAR)
    assert joined.meta["val"].shape[-1] == 128


def test_patterns_in_order_keep_apart_what_differs(model, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"a.*": "int8", "table.*": "none", "*": "int4-g32-plain"}')
    ledger = convert(model, str(path))
    assert {layer.name: str(layer.asked) for layer in ledger.layers} == {
        "a.weight": "int8",
        "b.weight": "int4-g32-plain",
        "c.weight": "int4-g32-plain",
    }
    assert len(ledger.layers) == 3 == sum(node.target is QUANTIZED_LINEAR for node in model.graph.nodes)


@pytest.mark.parametrize("product", ["mm", "addmm", "matmul"])
def test_products_with_matrices(product, exported):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.bias = nn.Parameter(torch.randn(32, 12)), nn.Parameter(torch.randn(12))

        def forward(self, x):
            return (
                torch.addmm(self.bias, x, self.weight)
                if product == "addmm"
                else getattr(torch, product)(x, self.weight)
            )

    net, x = Product(), torch.randn(5, 32)
    program = exported(net, x)
    ledger = Ledger()
    AnnotateQuantization(read_recipe("int8", "float"), ledger).run(program, Report())
    ConvertQuantized(ledger).run(program, Report())
    program.module.recompile()
    expected = x @ rounded(net.weight.detach().t(), 8, 0, True).t() + (net.bias.detach() if product == "addmm" else 0)
    torch.testing.assert_close(program.run((x,))[0], expected)
    assert [(layer.name, layer.shape) for layer in ledger.layers] == [("weight", (12, 32))]


def test_refuses(exported, refusals):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.image = nn.Linear(16, 8), nn.Conv2d(1, 2, 3)

        def forward(self, x, image):
            y = self.narrow(x)
            return F.linear(y, x[:, :8]), self.image(image)

    program = exported(Small(), torch.randn(3, 16), torch.randn(1, 1, 5, 5))
    ledger = Ledger()
    reasons = refusals(AnnotateQuantization(read_recipe("int4-g32"), ledger), program)
    assert reasons[0] == "narrow.weight: it has 16 columns, fewer than a group of 32"
    assert "is not constant" in reasons[1]
    assert reasons[2] == "image.weight: the weights of convolutions are not quantized"
    assert {layer.name for layer in ledger.layers if layer.refusal} == {"narrow.weight", "image.weight"}


@pytest.mark.parametrize(
    "text,match",
    [
        ("int3", "there is no quantization 'int3': choose int8, int4-g32"),
        ("int4-g48", "int4-g48"),
        ("missing.json", "missing.json cannot be read"),
        ('["int8"', "int8"),
        ("{}", "must be one object"),
        ('{"*": 4}', "must be one object"),
        ('{"*": "int5"}', "'int5'.*'none' leaves a weight"),
    ],
)
def test_recipes_that_are_none(text, match):
    with pytest.raises(UsageError, match=match):
        read_recipe(text)


def test_names_a_weight_that_is_not_finite(exported):
    layers = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
    layers[0].weight.data[3, 5] = torch.inf
    with pytest.raises(CompileError, match=r"weight 0\.weight .* not finite.*none"):
        convert(exported(layers, torch.randn(2, 64)), "int8")
    layers[1].weight.data[0, 0] = torch.nan  # which is not asked for
    layers[0].weight.data[3, 5] = 1.0
    convert(exported(layers, torch.randn(2, 64)), '{"1.*": "none", "*": "int8"}')


def test_names_and_specs():
    for name in ("int8", "int8-z", "int4-g32", "int4-g64-z-plain", "int4-g128-plain"):
        assert str(read_recipe(name).of("x", "linear")) == name
    assert read_recipe("int4-g64").of("x", "linear").activations == 32
    assert read_recipe("int8").of("x", "linear").activations == 0
    assert read_recipe("int8", "float").of("x", "linear").activations == -1
    with pytest.raises(UsageError, match="unknown activations"):
        read_recipe("int8", "int4")
    with pytest.raises(UsageError, match="4 or 8 bits"):
        WeightSpec(3)
    with pytest.raises(UsageError, match="do not divide"):
        WeightSpec(4, 32, activations=24)

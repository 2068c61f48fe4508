import math

import pytest
import torch
from torch import nn

from tilewright.passes.graph.edit import insert
from tilewright.passes.graph.index_rules import value_at
from tilewright.passes.graph.index_values import ALWAYS, CAUSAL, Affine, Choice
from tilewright.passes.graph.index_values import Test as Truth
from tilewright.passes.graph.masks import always_finite, shows_each_row_something
from tilewright.passes.graph.match import (
    aten,
    polynomial,
    same_polynomial,
    same_value,
    scalar,
    scaled,
    substitute,
    without_copies,
)


class Returns(nn.Module):
    """Gives what a function makes of its input and some constants."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("two", torch.tensor(2.0))
        self.register_buffer("row", torch.tensor([[0.5]]))
        self.register_buffer("counted", torch.arange(3, 40)[None])
        self.register_buffer("upper", torch.full((32, 32), float("-inf")).triu(1))

    def forward(self, x):
        return self.function(self, x)


def results(exported, function, x=None, dynamic_shapes=None):
    program = exported(Returns(function), torch.randn(3, 4) if x is None else x, dynamic_shapes=dynamic_shapes)
    (output,) = program.graph.find_nodes(op="output")
    return program, list(output.args[0])


def test_scalars_however_they_are_written(exported):
    def function(m, x):
        constants = (
            m.two.sqrt(),
            (1 / m.two).sqrt(),
            m.row * 2,
            torch.full((), 7.0),
            x.shape[1] ** 0.5 * m.two,
            m.counted,
        )
        return tuple(x * constant if constant.numel() == 1 else constant for constant in constants)

    _, nodes = results(exported, function)
    factors = [scalar(node.args[1]) if len(node.args) > 1 else scalar(node) for node in nodes]
    assert factors[:4] == pytest.approx([math.sqrt(2), math.sqrt(0.5), 1.0, 7.0]) and factors[5] is None
    assert [scaled(node)[1] for node in nodes[:4]] == pytest.approx(factors[:4])


def test_factors_and_copies_are_taken_off(exported):
    def function(m, x):
        y = -(2 * x.clone()) / m.two * 3
        return y.view(3, 4).contiguous(), x.expand(2, 3, 4) * 2, x.double() * 2

    program, nodes = results(exported, function)
    x = next(iter(program.graph.nodes))
    base, factor = scaled(nodes[0])
    assert base.op == "placeholder" and factor == -3.0
    assert scaled(nodes[1])[0].op == scaled(nodes[2])[0].op == "call_function", "another shape, another dtype"
    assert without_copies(scaled(nodes[2])[0], casts=True).op == "placeholder", x


def test_polynomials(exported):
    def function(m, x):
        y = x.relu()
        return 2 * (x - y) ** 2 / 4 + y, (x + 1) * (x - 1) - x * x, torch.rsub(y, x, alpha=2), x / y, x**9

    program, nodes = results(exported, function)
    relu = next(node for node in program.graph.nodes if "relu" in node.name)
    x = relu.args[0]
    found = [polynomial(node, (x, relu)) for node in nodes]
    assert same_polynomial(found[0], {(2, 0): 0.5, (1, 1): -1.0, (0, 2): 0.5, (0, 1): 1.0})
    assert found[1:] == [{(0, 0): -1.0}, {(1, 0): 1.0, (0, 1): -2.0}, None, None]


def test_same_value(exported):
    def function(m, x):
        return x.relu().view(12), x.relu().clone().view(12), x.relu().view(6, 2), torch.rand_like(x), torch.rand_like(x)

    _, nodes = results(exported, function)
    assert same_value(nodes[0], nodes[1]) and not same_value(nodes[0], nodes[2])
    assert not same_value(nodes[3], nodes[4]), "random numbers"


def test_substitute_makes_views_legal(exported):
    program, _ = results(exported, lambda m, x: (x * 2).view(12).view(2, 6))
    product = next(node for node in program.graph.nodes if "mul" in node.name)
    turned = insert(program.graph, product, aten.t.default, product.args[:1])
    turned = insert(program.graph, product, aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
    doubled = insert(program.graph, product, aten.mul.Tensor, (turned, 2))
    back = insert(program.graph, product, aten.t.default, (doubled,))
    expected = program.run(program.sample)
    substitute(product, back)
    program.module.recompile()
    assert torch.equal(program.run(program.sample)[0], expected[0])
    assert [str(node.target) for node in program.graph.nodes].count("aten.reshape.default") == 1


def test_values_by_index(exported):
    def function(m, x):
        rows, columns = x.shape
        index = torch.arange(rows)
        position = m.counted[:, :rows].expand(2, -1)
        return (
            index * 2 + 1, index.flip(0), m.counted[0, 2 : 2 + rows], torch.arange(5, 5 + rows)[::2],
            index[:, None] - torch.arange(columns)[None], torch.ones(rows, dtype=torch.int64).cumsum(0),
            torch.diff(position, prepend=position[:, :1] - 1), index[index], index.float() * 0.5,
        )  # fmt: skip

    rows, columns = torch.export.Dim("rows", min=3, max=32), torch.export.Dim("columns", min=2, max=32)
    _, nodes = results(exported, function, torch.randn(6, 4), ({0: rows, 1: columns},))
    counted = [Affine(((-1, step),), start) for step, start in ((2, 1), (1, 5), (2, 5))]
    assert [value_at(node) for node in nodes] == [
        counted[0], None, counted[1], counted[2], Affine(((-2, 1), (-1, -1)), 0), Affine(((-1, 1),), 1),
        Affine((), 1), Affine(((-1, 1),), 0), None,
    ]  # fmt: skip


def test_masks_by_index(exported):
    def function(m, x):
        rows = torch.arange(x.shape[0])
        causal = rows[None] <= rows[:, None]
        return (
            causal, ~(rows[None] > rows[:, None]), causal & (rows >= 0), causal | (rows > 2), rows[:, None] >= rows,
            causal.T, m.upper[: x.shape[0], : x.shape[0]], 1.0 - causal.float(), causal & (x[:, :1] > 0), rows < 0.5,
        )  # fmt: skip

    size = torch.export.Dim("size", min=2, max=32)
    _, nodes = results(exported, function, torch.randn(6, 6), ({0: size, 1: size},))
    found = [value_at(node) for node in nodes]
    assert found[:3] == [CAUSAL] * 3 and found[4] == CAUSAL
    assert isinstance(found[3], Truth) and found[3].negated
    assert found[5] not in (CAUSAL, None) and found[8:] == [None, None]
    assert found[6] == Choice(CAUSAL.inverse(), float("-inf"), 0.0) or found[6] == Choice(CAUSAL, 0.0, float("-inf"))
    assert found[7] == Choice(CAUSAL, 0.0, 1.0)
    assert shows_each_row_something(CAUSAL, (3, 5)) and shows_each_row_something(ALWAYS, (1,))
    assert not shows_each_row_something(found[8], (6, 6)) and not shows_each_row_something(CAUSAL.inverse(), (6, 6))
    below = Truth(frozenset({Affine(((-2, 1), (-1, -1)), 0)}))  # the diagonal and what is right of it
    assert shows_each_row_something(below, (6, 6)) and not shows_each_row_something(below, (6, 5))


def test_masks_that_stay_finite(exported):
    lowest = torch.finfo(torch.float32).min

    def function(m, x):
        shown = x.long()
        once = (1.0 - shown.float()) * lowest
        return (
            once, torch.where(shown.bool(), 0.0, lowest), (1.0 - shown.float()).masked_fill(shown.bool(), lowest),
            once + once, torch.where(shown.bool(), 0.0, float("-inf")), x, (once * 0.5).half(), m.upper,
        )  # fmt: skip

    _, nodes = results(exported, function)
    assert [always_finite(node) for node in nodes] == [True, True, True, False, False, False, False, False]

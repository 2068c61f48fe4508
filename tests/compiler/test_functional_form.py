"""Taking apart only what needs it gives what tracing all of a program again gives."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from tilewright.compiler import decompositions
from tilewright.compiler.functional_form import NeedsTracing, rewritten


class Composite(nn.Module):
    """Composite operators that are kept, ones that are taken apart into one or several, and sizes of every kind."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.batch = nn.BatchNorm1d(12)
        self.convolution = nn.Conv1d(12, 6, 3, padding="same")

    def forward(self, input, other):
        y = F.dropout(self.linear(input), 0.1, self.training).flatten(0, 1)
        z = self.batch(y).unflatten(0, input.shape[:2]).contiguous().mT
        parts = self.convolution(z).half().to(torch.float32).chunk(2, dim=1)
        joined = torch.stack(parts, 1).reshape(input.shape[0], -1)
        wide = other.expand_as(input).movedim(0, 1).reshape(-1, 4)
        flat = joined.to(torch.float32).view_as(joined)
        return {"same": flat, "wide": wide.T, "size": joined.shape[1] // 2, "input": input}


def exported(module, *args, shapes=None):
    torch.manual_seed(0)
    return torch.export.export(module.eval(), args, dynamic_shapes=shapes)


def composite():
    shapes = {"input": {0: Dim("batch", max=64), 1: Dim("seq", max=64)}, "other": None}
    return exported(Composite(), torch.randn(5, 4, 8), torch.randn(1, 1, 8), shapes=shapes)


class InPlace(nn.Module):
    """Writes into what nothing else has the memory of, before it is used and after."""

    def forward(self, x):
        y = x * 2
        z = y.sin()
        y.add_(z).relu_()
        return y * torch.tensor([1.5, 2.5]), z.mul_(y), y


def calls(program):
    """The operators of a program in order and the shapes of their results, without sizes and assertions."""
    left_out = torch.ops.aten.sym_size.int, torch.ops.aten._assert_tensor_metadata.default
    return [
        (str(node.target), *(str(tuple(item.shape)) for item in torch.utils._pytree.tree_leaves(node.meta["val"])))
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target not in left_out
    ]


@torch.no_grad()
def test_as_by_tracing():
    program = composite()
    got, want = rewritten(program, decompositions._is_preservable_cia_op), program.run_decompositions({})
    assert calls(got) == calls(want)
    assert {"aten.linear.default", "aten.view.default", "aten._to_copy.default"} <= {name for name, *_ in calls(got)}
    assert str(got.graph_signature.input_specs) == str(want.graph_signature.input_specs)
    inputs = torch.randn(3, 9, 8), torch.randn(1, 1, 8)
    for key, tensor in got.module()(*inputs).items():
        torch.testing.assert_close(tensor, want.module()(*inputs)[key], rtol=0, atol=0)


@torch.no_grad()
def test_writes_that_nothing_else_sees_are_values():
    program = exported(InPlace(), torch.randn(3, 2))
    got, want = rewritten(program, decompositions._is_preservable_cia_op), program.run_decompositions({})
    assert calls(got) == calls(want)
    x = torch.randn(3, 2)
    torch.testing.assert_close(got.module()(x), InPlace()(x), rtol=0, atol=0)


def test_leaves_the_program_as_it_is():
    program = composite()
    before = str(program.graph), str(program.graph_signature)
    rewritten(program, decompositions._is_preservable_cia_op)
    assert (str(program.graph), str(program.graph_signature)) == before


class Writes(nn.Module):
    def forward(self, x):
        y = x * 2
        y[0].add_(1)
        return y


class Widens(nn.Module):
    def forward(self, x):
        y = x.half().clone()
        return y.add_(x), x.add(0).transpose(0, 1).mul_(2)


class Seen(nn.Module):
    def forward(self, x):
        y = x * 2
        z = F.dropout(y, 0.5, self.training)
        y.add_(1)
        return z


class Chained(nn.Module):
    """A view of what another write returned sees the second write."""

    def forward(self, x):
        y = x * 2
        row = y.add_(1)[0]
        y.mul_(3)
        return row.relu()


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count


class Within(nn.Module):
    def forward(self, x):
        with torch.enable_grad():
            return x.relu().flatten()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Writes(), "add_ writes into a tensor"),
        (Counts(), "add_ writes into a tensor"),
        (Widens(), "add_ converts"),
        (Seen(), "add_ writes"),
        (Chained(), "add_ writes"),
        (Within(), "holds a graph"),
    ],
)
@torch.no_grad()
def test_says_what_needs_tracing(module, reason):
    program = exported(module, torch.randn(3, 2))
    with pytest.raises(NeedsTracing, match=reason):
        rewritten(program, decompositions._is_preservable_cia_op)
    assert str(decompositions.functional(program).graph) == str(program.run_decompositions({}).graph)


@torch.no_grad()
def test_a_program_with_new_values_of_states_is_functional_by_tracing_only():
    program = exported(Counts(), torch.randn(3, 2)).run_decompositions({})
    with pytest.raises(NeedsTracing, match="changes a state"):
        rewritten(program, decompositions._is_preservable_cia_op)

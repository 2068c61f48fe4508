"""Programs that PyTorch exported: their structure, sizes and guards become ours, or they are refused."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.export import Dim

from tilewright.compiler.guards import holds
from tilewright.compiler.importer import from_exported
from tilewright.compiler.shapes import parse_shapes
from tilewright.runtime.errors import SourceError, UsageError


def exported(function, *args, shapes=None):
    """A module whose forward is ``function(self, ...)``, exported with PyTorch."""
    module = type("Made", (nn.Module,), {"forward": function})().eval()
    return torch.export.export(module, args, dynamic_shapes=shapes)


def test_exported_programs_keep_their_structure():
    Out = namedtuple("Out", "a b")
    program = from_exported(
        "main",
        exported(
            lambda self, x, tree, k: {"sum": x + tree["t"][0] * k, "pair": Out(x, 3)},
            torch.randn(4, 2),
            {"t": [torch.randn(2)]},
            5,
            shapes=({0: Dim("batch", max=8)}, {"t": [None]}, None),
        ),
    )
    assert [item.name for item in program.inputs] == ["x", "tree.t.0"]
    assert program.results == {"dict": {"sum": {"leaf": 0}, "pair": {"tuple": [{"leaf": 1}, {"constant": 3}]}}}
    assert [(bounds.name, bounds.minimum, bounds.maximum) for bounds in program.symbols.values()] == [("x_dim0", 0, 8)]
    assert [tuple(tensor.shape) for tensor in program.sample] == [(4, 2), (2,)]
    torch.testing.assert_close(program.run(program.sample)[0], program.sample[0] + program.sample[1] * 5)


def test_exported_programs_need_bounds_and_take_names():
    def auto():
        return exported(lambda self, x: x + 1, torch.randn(4, 2), shapes=({0: Dim.AUTO},))

    with pytest.raises(UsageError, match="axis 0 of input 'x' has no upper bound.*--shape x=batch:1..64,2"):
        from_exported("main", auto())
    program = from_exported("main", auto(), shapes=parse_shapes({"x": "rows:1..99,2"}))
    assert [(bounds.name, bounds.minimum, bounds.maximum) for bounds in program.symbols.values()] == [("rows", 1, 99)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": "n:1..99,2"}, "exported for 3..8"),
        ({"x": "n:4..8,m:1..4"}, "declared dynamic, but it is fixed at 2"),
        ({"x": "n:4..8,3"}, "declared as 3, but it is fixed at 2"),
        ({"x": "n:4..8"}, "has 2 axes, but 1 dimensions were given"),
        ({"x": "2*n:2..4,2"}, "of the form 1\\*n"),
    ],
)
def test_exported_ranges_are_respected(shapes, message):
    program = exported(lambda self, x: x + 1, torch.randn(4, 2), shapes=({0: Dim("b", min=3, max=8)},))
    with pytest.raises(UsageError, match=message):
        from_exported("main", program, shapes=parse_shapes(shapes))


def test_exported_guards_are_kept():
    program = exported(lambda self, x: x.view(-1, 24) + 1, torch.randn(8, 6), shapes=({0: Dim.AUTO(min=1, max=64)},))
    assert program._guards_code, "torch no longer reports its guards as text"
    imported = from_exported("main", program, shapes=parse_shapes({"x": "n:1..64,6"}))
    (symbol,) = imported.symbols
    assert [size for size in range(1, 65) if all(holds(guard, {symbol: size}) for guard in imported.guards)] == list(
        range(4, 65, 4)
    )


def test_exporting_with_gradients_enabled_leaves_no_wrappers():
    def forward(self, x):
        with torch.no_grad():
            y = x * 2
        return y + x

    program = from_exported("main", exported(forward, torch.randn(3)))
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.add.Tensor,
    ]


def test_exported_in_training_mode_is_refused():
    program = torch.export.export(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)).train(), (torch.randn(4, 8),))
    with pytest.raises(SourceError, match="training mode"):
        from_exported("main", program)

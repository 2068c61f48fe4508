"""The dimension language: what it means, and what its errors teach."""

import pytest
import torch
from torch.export import Dim

from tilewright.compiler.shapes import Fixed, ShapeSpec, Symbolic, from_torch, parse_options, parse_shapes
from tilewright.runtime.errors import UsageError


def test_parses_sizes_symbols_and_multiples():
    spec = parse_shapes({"x": "batch:1..64, 3 ,16*h:2..32, w:0..9", "mask": "batch,h"})
    assert spec.inputs["x"] == (Symbolic("batch"), Fixed(3), Symbolic("h", 16), Symbolic("w"))
    assert spec.inputs["mask"] == (Symbolic("batch"), Symbolic("h"))
    assert spec.ranges == {"batch": (1, 64), "h": (2, 32), "w": (0, 9)}
    assert spec.describe("x") == "batch:1..64,3,16*h:2..32,w:0..9"


def test_a_number_may_be_added():
    spec = parse_shapes({"starts": "sequences + 1:1..64, 3*n+2:4..4", "contexts": "sequences"})
    assert spec.inputs["starts"] == (Symbolic("sequences", 1, 1), Fixed(14))
    assert spec.describe("starts") == "sequences+1:1..64,14"
    samples = {"starts": torch.zeros(4, 14), "contexts": torch.zeros(3)}
    assert spec.sizes(samples) == {"sequences": 3}
    assert spec.resize(samples, {"sequences": 6})["starts"].shape == (7, 14)
    with pytest.raises(UsageError, match="declared as sequences\\+1, but the sample's size is 0"):
        spec.sizes({"starts": torch.zeros(0, 14), "contexts": torch.zeros(3)})
    dims = spec.torch_dims(("starts", "contexts"))
    assert from_torch(dict(zip(("starts", "contexts"), dims, strict=True)), samples) == spec


def test_a_scalar_input_has_no_entries():
    assert parse_shapes({"x": ""}).inputs["x"] == ()


def test_a_range_may_stand_on_a_later_input():
    assert parse_shapes({"a": "n,2", "b": "n:1..8"}).ranges == {"n": (1, 8)}


def test_a_symbol_with_one_value_is_a_size():
    spec = parse_shapes({"x": "n:4..4,8*m:2..2"})
    assert spec == ShapeSpec({"x": (Fixed(4), Fixed(16))}, {})


@pytest.mark.parametrize(
    ("text", "teaches"),
    [
        ("batch:1..", "no upper bound.*batch:1..MAX"),
        ("batch:1..inf", "no upper bound"),
        ("batch:8..2", "reversed.*batch:2..8"),
        ("batch:64", "no range LOW..HIGH: write batch:1..64"),
        ("batch", "'batch' of input 'x' has no range; write batch:1..64"),
        ("batch:-1..4", "non-negative"),
        ("batch:a..4", "'a'.*no size"),
        ("1..4", "cannot read '1..4'"),
        ("batch-1:1..4", "cannot read"),
        ("2,,3", "cannot read ''"),
        ("class:1..4", "no name for a dimension"),
        ("s77:1..4", "reserved"),
        ("0*h:1..4", "always 0"),
    ],
)
def test_errors_say_what_to_write(text, teaches):
    with pytest.raises(UsageError, match=teaches):
        parse_shapes({"x": text})


def test_one_symbol_has_one_range():
    with pytest.raises(UsageError, match=r"'n' has the range 1..4 in 'a', but 1..8 in 'b'"):
        parse_shapes({"a": "n:1..4", "b": "n:1..8"})


def test_options_of_the_command_line():
    assert parse_options(["a=n:1..4,3", "b = n"]) == {"a": "n:1..4,3", "b": "n"}
    with pytest.raises(UsageError, match="NAME=DIMS"):
        parse_options(["a:1..4"])
    with pytest.raises(UsageError, match="two shapes"):
        parse_options(["a=1", "a=2"])


def test_defaults_are_overridden_by_input_and_by_range():
    defaults = parse_shapes({"ids": "batch:1..64,seq:1..512", "mask": "batch,seq"})
    spec = parse_shapes({"ids": "batch:1..8,seq"}, defaults)
    assert spec.ranges == {"batch": (1, 8), "seq": (1, 512)}
    assert spec.describe("mask") == "batch:1..8,seq:1..512"
    assert parse_shapes({"ids": "4,16", "mask": "4,16"}, defaults).ranges == {}


def samples(**shapes):
    return {name: torch.arange(max(1, torch.Size(shape).numel())).float().view(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("dims", "shape", "teaches"),
    [
        ({"y": "n:1..4"}, (2,), "no input is called 'y'.*x"),
        ({"x": "n:1..4,3"}, (2,), "has 1 axes.*but 2 dimensions were given"),
        ({"x": "n:1..4,3"}, (2, 4), "axis 1 of input 'x' is declared as 3, but the sample's size there is 4"),
        ({"x": "n:1..4,3"}, (5, 3), "size 5 in the sample, outside 'n:1..4'"),
        ({"x": "16*n:1..4,3"}, (17, 3), "multiple of 16"),
        ({"x": "n:1..9,n"}, (5, 3), "'n' is 5 at axis 0 of input 'x', but 3 at axis 1"),
        ({"x": "n:0..9,3"}, (0, 3), "size 0 along 'n'"),
        ({"x": "n:0..1,3"}, (1, 3), "at least 2"),
    ],
)
def test_samples_that_do_not_fit(dims, shape, teaches):
    with pytest.raises(UsageError, match=teaches):
        parse_shapes(dims).widen({"x": torch.zeros(shape)})


def test_a_sample_of_one_row_is_widened_and_only_along_its_axis():
    spec = parse_shapes({"x": "n:1..4,3", "y": "16*h:1..3,n"})
    given = {"x": torch.randn(1, 3), "y": torch.randn(16, 1), "z": torch.randn(1)}
    wide = spec.widen(given)
    assert {name: tuple(tensor.shape) for name, tensor in wide.items()} == {"x": (2, 3), "y": (32, 2), "z": (1,)}
    assert torch.equal(wide["x"][0], given["x"][0]) and torch.equal(wide["x"][1], given["x"][0])
    assert wide["z"] is given["z"]


def test_a_sample_of_one_row_reaches_a_higher_minimum():
    assert parse_shapes({"x": "n:4..8"}).widen({"x": torch.zeros(1)})["x"].shape == (4,)


def test_made_up_samples_are_resized():
    spec = parse_shapes({"x": "n:1..4,6", "y": "n,2"})
    fitted = spec.fit({"x": torch.randn(8, 3), "y": torch.randn(8, 5)})
    assert {name: tuple(tensor.shape) for name, tensor in fitted.items()} == {"x": (4, 6), "y": (4, 2)}


def test_torch_dims_share_symbols():
    (x, y) = parse_shapes({"x": "n:1..4,3", "y": "2*n"}).torch_dims(["x", "y"])
    assert set(x) == {0} and x[0].__name__ == "n" and (x[0].min, x[0].max) == (1, 4)
    assert y[0].root is x[0]


def test_torch_dimensions_are_read():
    n, h = Dim("n", min=2, max=8), Dim("h", max=4)
    spec = from_torch({"x": {0: n, -1: 4 * h}, "y": (n, None), "z": None}, samples(x=(2, 3, 8), y=(2, 3), z=(1,)))
    assert spec.inputs == {
        "x": (Symbolic("n"), Fixed(3), Symbolic("h", 4)),
        "y": (Symbolic("n"), Fixed(3)),
    }
    assert spec.ranges == {"n": (2, 8), "h": (0, 4)}


@pytest.mark.parametrize("dim", [Dim("n"), Dim("n", min=3), Dim.AUTO, Dim.DYNAMIC, 2 * Dim("n")])
def test_torch_dimensions_need_an_upper_bound(dim):
    with pytest.raises(UsageError, match="no upper bound.*:1..64"):
        from_torch({"x": {0: dim}}, samples(x=(4,)))


def test_torch_dimensions_that_have_no_word():
    with pytest.raises(UsageError, match="no multiple"):
        from_torch({"x": {0: Dim("n", max=4) - 1}}, samples(x=(4,)))
    with pytest.raises(UsageError, match="axis 1"):
        from_torch({"x": {1: Dim("n", max=4)}}, samples(x=(4,)))
    with pytest.raises(UsageError, match="no input is called 'w'"):
        from_torch({"w": None}, samples(x=(4,)))


def test_hints_with_bounds_and_static_hints():
    spec = from_torch({"x": {0: Dim.AUTO(min=1, max=9), 1: Dim.STATIC}}, samples(x=(4, 3)))
    assert spec == ShapeSpec({"x": (Symbolic("x_dim0"), Fixed(3))}, {"x_dim0": (1, 9)})

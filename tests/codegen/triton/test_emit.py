"""What emission makes of expressions: shapes, masks, reductions along rows and in loops, indices loaded at run time."""

import math

import numpy as np
import pytest

from tilewright.codegen.triton.dialect import literal, size
from tilewright.codegen.triton.emit import Row, Scope, Var, merge_shapes
from tilewright.codegen.values import Kernel
from tilewright.runtime import sizes
from tilewright.runtime.plan import Tile, TileConstant

HEAD = "import triton\nimport triton.language as tl\nimport tw_math as tw\n\n\n@triton.jit\n"
ROWS, COLUMNS = 5, 11
X = Var("x", ("XBLOCK", "1"), "x_in")


def source(arguments, body, row=True):
    lines = [
        f"x = (tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)){'[:, None]' if row else ''}",
        f"x_in = x < {ROWS}",
    ]
    return f"{HEAD}def kernel({arguments}):\n" + "".join(f"    {line}\n" for line in (*lines, *body))


def row_scope(whole, dtypes):
    kernel = Kernel({})
    kernel.variable("i0", ROWS)
    kernel.variable("i1", COLUMNS)
    row = Row((("i1", COLUMNS),), str(COLUMNS), whole, {"i1": "@r"})
    variables = {"i0": X} | (row.bind("r", "r_in") if whole else {})
    return kernel, Scope(kernel, variables, dtypes, row=row)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "chunks"])
@pytest.mark.parametrize("op", ["sum", "prod", "max", "min", "argmax", "argmin"])
def test_reduces_a_row(interpret, whole, op):
    rng = np.random.default_rng(7)
    values = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values[1, [3, 8]] = np.nan
    values[2] = 0.5  # the first of equals
    index = op.startswith("arg")
    kernel, scope = row_scope(whole, {"x0": "float32", "y0": "int64" if index else "float32"})
    b = kernel.builder
    body = kernel.buffer("x0", (ROWS, COLUMNS), "float32").at(("i0", "i1"))
    total = b.reduce(op, (("i1", COLUMNS),), body, "int64" if index else "float32")
    scope.store("y0", "i0", total, over=["i0"])
    lines = [*(["r = tl.arange(0, RBLOCK)[None, :]", f"r_in = r < {COLUMNS}"] if whole else []), *scope.lines]
    text = source("x0, y0, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr", lines)
    result = np.zeros(ROWS, np.int64 if index else np.float32)
    constants = {"XBLOCK": 4, "RBLOCK": 16 if whole else 4}
    got = interpret(text, "kernel", [values, result], constants=constants, grid=2)[1]
    wide = values.astype(np.float64)
    expected = getattr(np, op)(wide, axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_reduction_of_a_reduction_and_a_store_over_the_row(interpret):
    values = np.random.default_rng(8).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    kernel, scope = row_scope(True, {"x0": "float32", "y0": "float32"})
    b, loops = kernel.builder, (("i1", COLUMNS),)
    body = kernel.buffer("x0", (ROWS, COLUMNS), "float32").at(("i0", "i1"))
    shifted = b.call("sub", "float32", body, b.reduce("max", loops, body, "float32"))
    power = b.call("exp", "float32", shifted)
    result = b.call("div", "float32", power, b.reduce("sum", loops, power, "float32"))
    scope.store("y0", kernel.offset((ROWS, COLUMNS), "rows", ("i0", "i1")), result)
    lines = ["r = tl.arange(0, RBLOCK)[None, :]", f"r_in = r < {COLUMNS}", *scope.lines]
    assert sum("tl.load" in line for line in lines) == 1
    text = source("x0, y0, XBLOCK: tl.constexpr, RBLOCK: tl.constexpr", lines)
    got = interpret(text, "kernel", [values, np.zeros_like(values)], constants={"XBLOCK": 8, "RBLOCK": 16}, grid=1)[1]
    exact = np.exp(values.astype(np.float64) - values.max(1, keepdims=True))
    np.testing.assert_allclose(got, exact / exact.sum(1, keepdims=True), rtol=1e-6)


def test_loops_whose_bounds_vary_by_element(interpret):
    """A cumulative sum: element i takes in i + 1 terms."""
    values = np.random.default_rng(9).standard_normal(ROWS).astype(np.float32)
    kernel = Kernel({})
    kernel.variable("i0", ROWS)
    kernel.variable("j", ROWS)
    b = kernel.builder
    body = kernel.buffer("x0", (ROWS,), "float32").at(("j",))
    total = b.reduce("sum", (("j", sizes.add("i0", 1)),), body, "float32")
    scope = Scope(kernel, {"i0": Var("x", ("XBLOCK",), "x_in")}, {"x0": "float32", "y0": "float32"})
    scope.store("y0", "i0", total)
    text = source("x0, y0, XBLOCK: tl.constexpr", scope.lines, row=False)
    got = interpret(text, "kernel", [values, np.zeros_like(values)], constants={"XBLOCK": 8}, grid=1)[1]
    np.testing.assert_allclose(got, np.cumsum(values.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_variables_of_loops_have_the_type_of_indices(interpret, compile_cubin, wide):
    """A stride times the variable of a loop may be 2^31 and more."""
    values = np.random.default_rng(2).standard_normal((50, ROWS)).astype(np.float32)
    kernel = Kernel({})
    kernel.variable("i0", ROWS)
    kernel.variable("j", 50)
    b = kernel.builder
    total = b.reduce("sum", (("j", 50),), kernel.buffer("x0", (50, ROWS), "float32").at(("j", "i0")), "float32")
    scope = Scope(kernel, {"i0": Var("x", ("XBLOCK",), "x_in")}, {"x0": "float32", "y0": "float32"}, wide=wide)
    scope.store("y0", "i0", total)
    text = source("x0, y0, XBLOCK: tl.constexpr", scope.lines, row=False)
    got = interpret(text, "kernel", [values, np.zeros(ROWS, np.float32)], constants={"XBLOCK": 8}, grid=1)[1]
    np.testing.assert_allclose(got, values.astype(np.float64).sum(0), rtol=1e-5)
    made = compile_cubin(text, "kernel", ["*fp32", "*fp32"], Tile("t", (TileConstant("XBLOCK", 8),), 1, 1), "sm_90")
    assert made.registers and ("range(0, tl.full((), 50, tl.int64))" in text) == wide


def test_masks_wider_than_the_offset_they_guard(interpret):
    """One element for all, read only where a block's mask says so, and a single result of a whole block."""
    kernel = Kernel({})
    kernel.variable("i0", ROWS)
    b = kernel.builder
    flags = kernel.buffer("x0", (ROWS,), "bool").at(("i0",))
    value = kernel.buffer("x1", (3,), "float32").at((2,), flags)
    scope = Scope(kernel, {"i0": Var("x", ("XBLOCK",), "x_in")}, {"x0": "bool", "x1": "float32", "y0": "bool"})
    scope.store("y0", "i0", b.call("gt", "bool", value, b.const(1, "float32")))
    text = source("x0, x1, y0, XBLOCK: tl.constexpr", scope.lines, row=False)
    flags_in = np.array([True, False, True, True, False])
    got = interpret(
        text, "kernel", [flags_in, np.array([0, 0, 7], np.float32), np.zeros(ROWS, bool)], constants={"XBLOCK": 8}
    )[2]
    np.testing.assert_array_equal(got, flags_in)


@pytest.mark.parametrize(("wraps", "bad"), [(True, None), (True, 7), (True, -8), (False, None), (False, -1)])
def test_run_time_indices(interpret, wraps, bad):
    table = np.arange(7, dtype=np.float32) * 10
    ids = np.array([0, 6, -1, -7, 3] if wraps else [0, 6, 1, 5, 3], np.int64)
    if bad is not None:
        ids[3] = bad
    kernel = Kernel({})
    kernel.variable("i0", ROWS)
    index = kernel.dynamic(kernel.buffer("x0", (ROWS,), "int64").at(("i0",)), 7, wraps=wraps)
    scope = Scope(kernel, {"i0": Var("x", ("XBLOCK",), "x_in")}, {"x0": "int64", "x1": "float32", "y0": "float32"})
    scope.store("y0", "i0", kernel.buffer("x1", (7,), "float32").at((index,)))
    assert scope.uses_fault
    text = source("x0, x1, fault, y0, XBLOCK: tl.constexpr", scope.lines, row=False)
    arrays = [ids, table, np.zeros(1, np.int32), np.full(ROWS, np.nan, np.float32)]
    _, _, fault, got = interpret(text, "kernel", arrays, constants={"XBLOCK": 8})
    assert fault[0] == (bad is not None)
    right = np.arange(ROWS) != 3 if bad is not None else np.full(ROWS, True)
    np.testing.assert_array_equal(got[right], table[ids[right]])


def test_a_half_operand_of_a_product_is_loaded_as_it_is():
    kernel = Kernel({})
    kernel.variable("i0", ROWS)
    b = kernel.builder
    load = kernel.buffer("x0", (ROWS,), "bfloat16").at(("i0",))
    scope = Scope(kernel, {"i0": Var("x", ("XBLOCK",), "x_in")}, {"x0": "bfloat16"})
    assert scope.raw(load, "bfloat16") == "t0"
    assert scope.lines == ["t0 = tl.load(x0 + (x), mask=x_in, other=0.0)"]
    assert scope.raw(b.call("neg", "float32", load), "bfloat16").startswith("tl.cast(")
    assert scope.lines[1].endswith(".to(tl.float32)")


def test_negative_numerators_take_the_floor():
    assert "tw.index_floordiv(" in size(sizes.floordiv(sizes.add("a", -3), 2))
    assert "index" not in size(sizes.floordiv(sizes.add("a", 3), 2))


def test_shapes_that_do_not_fit():
    assert merge_shapes(("A", "1"), ("1", "B")) == ("A", "B")
    assert merge_shapes((), ("1", "B")) == ("1", "B")
    with pytest.raises(AssertionError):
        merge_shapes(("A",), ("1", "B"))


def test_literals_keep_every_digit():
    assert literal(1e39, "float32") == 'float("inf")'
    assert np.float32(literal(math.pi, "float32")) == np.float32(math.pi)
    assert float(literal(0.1, "float64")) == 0.1

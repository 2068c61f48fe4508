"""``load(device="interpreter")`` on a plan written by hand: operands of every kind, faults, states, wrong kernels."""

import numpy as np
import pytest

import tilewright
from tilewright.codegen.artifact import ConstantData, layout_constants, write_artifact
from tilewright.runtime import sizes
from tilewright.runtime.errors import ArtifactError, InputError, InterpreterError, ShapeError, UsageError
from tilewright.runtime.plan import (
    Buffer,
    Constant,
    Origin,
    Plan,
    Port,
    Ref,
    StateBuffer,
    Step,
    Symbol,
    Tile,
    TileConstant,
    Variant,
)

TABLE = np.arange(40, dtype=np.float32).reshape(10, 4)
START = np.array([10, 20, 30, 40], np.float32)
CONSTANTS = (
    ConstantData("table", "float32", (10, 4), lambda: TABLE),
    ConstantData("start", "float32", (4,), lambda: START),
)
HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
SOURCES = {
    "gather": HEAD
    + """def gather(index, table, fault, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, 4)
    at = tl.load(index + row, mask=row < n, other=0)
    bad = (at < 0) | (at >= 10)
    tl.store(fault + row * 0, 1, mask=bad & (row < n))
    at = tl.where(bad, 0, at)
    rows = tl.load(table + at[:, None] * 4 + column[None, :])
    tl.store(out + row[:, None] * 4 + column[None, :], rows, mask=(row < n)[:, None])
""",
    "total": HEAD
    + """def total(rows, state, counters, sums, n, BLOCK: tl.constexpr):
    column = tl.arange(0, 4)
    acc = tl.load(state + column)
    for row in range(0, n):
        acc += tl.load(rows + row * 4 + column)
    tl.store(sums + column, acc)
    tl.store(state + column, acc)
    if tl.atomic_add(counters, 1) == tl.num_programs(0) - 1:
        tl.store(counters, 0)
""",
}


def tile(block, guard=1):
    return Tile(f"b{block}", (TileConstant("BLOCK", block),), 4, 1, guard)


def plan():
    places = layout_constants(CONSTANTS)
    constants = tuple(Constant(item.key, item.key, item.dtype, item.shape, *places[item.key]) for item in CONSTANTS)
    gather = (Ref("input", 0), Ref("constant", 0), Ref("fault", 0), Ref("buffer", 0))
    total = (Ref("buffer", 0), Ref("state", 0), Ref("counters", 0), Ref("output", 0))
    programs = sizes.ceildiv("n", "BLOCK")
    tiles = (tile(16, sizes.compare("le", 16, "n")), tile(4))
    return Plan(
        entry="main",
        symbols=(Symbol("n", 1, 64, 2, 0, 0),),
        inputs=(Port("index", "int64", ("n",)),),
        outputs=(Port("sums", "float32", (4,)),),
        results={"tuple": [{"output": 0}, {"size": "n"}]},
        checks=(),
        states=(StateBuffer("state", "float32", (4,), 16, "start"),),
        constants=constants,
        buffers=(Buffer("rows", "float32", ("n", 4), "rows", sizes.mul("n", 16), 0, 1),),
        steps=(
            Step("gather", "loop", (Variant("gather", gather, ("n",), programs, tiles=tiles),), (2, 3), Origin(("g",))),
            Step("total", "loop", (Variant("total", total, ("n",), 1, tiles=(tile(1),)),), (1, 3)),
        ),
    )


@pytest.fixture
def write(tmp_path):
    def run(**changed):
        sources = {f"{name}.py": (changed.get(name) or text).encode() for name, text in SOURCES.items()}
        path = tmp_path / "toy.tw"
        return write_artifact(
            path, plans={"cuda": (plan(),)}, constants=CONSTANTS, targets=(), sources=sources, info={}
        )

    return run


@pytest.mark.parametrize("n", [1, 5, 16, 37])
def test_runs_a_plan(write, n):
    index = np.random.default_rng(n).integers(0, 10, n)
    with tilewright.load(write(), device="interpreter") as model:
        sums, size = model(index)
        again, _ = model(index)
    assert size == n
    np.testing.assert_allclose(sums, START + TABLE[index].sum(0))
    np.testing.assert_array_equal(sums, again, "a plain call starts from the initial state")


def test_a_session_keeps_its_state(write):
    with tilewright.load(write(), device="interpreter") as model, model.session() as session:
        session([1])
        sums, _ = session([2])
        np.testing.assert_array_equal(sums, START + TABLE[1] + TABLE[2])
        out = np.zeros(4, np.float32)
        model([3], out=out)
        np.testing.assert_array_equal(out, START + TABLE[3])


def test_an_index_out_of_range_is_an_input_error(write):
    with tilewright.load(write(), device="interpreter") as model:
        with pytest.raises(InputError, match=r"an index is out of range in step 0 \(gather; node g\)"):
            model(np.array([3, 10]))
        model(np.array([3, 9]))
        with pytest.raises(ShapeError):
            model(np.zeros(65, np.int64))


def test_steps_can_be_timed_and_read(write):
    index, seen = np.array([7, 0, 7]), []
    with tilewright.load(write(), device="interpreter") as model:
        model.trace(lambda step, variant, read: seen.append((step, variant, read(Ref("buffer", 0)))), index)
        times = model.profile(index)
        with pytest.raises(KeyError):
            model.trace(lambda *_: {}["stop"], index)
    assert [step for step, _, _ in seen] == [0, 1]
    np.testing.assert_array_equal(seen[0][2], TABLE[index])
    assert [time.step for time in times] == [0, 1] and all(time.begin_ns <= time.end_ns for time in times)


def test_scratch_reads_as_nan_before_it_is_written(write):
    lazy = SOURCES["gather"].replace("mask=(row < n)[:, None])", "mask=(row < n - 1)[:, None])")
    with tilewright.load(write(gather=lazy), device="interpreter") as model:
        assert np.isnan(model([1, 2])[0]).all()


def test_a_kernel_that_leaves_its_counters_is_refused(write):
    path = write(total=SOURCES["total"].replace("tl.store(counters, 0)", "pass"))
    message = r"step 1 .*kernel total does not leave its counters zero"
    with tilewright.load(path, device="interpreter") as model, pytest.raises(InterpreterError, match=message):
        model([1])


def test_an_access_outside_of_an_operand_names_step_kernel_and_line(write):
    far = SOURCES["gather"].replace("at = tl.where(bad, 0, at)", "at = at + 7")
    message = r"(?s)step 0 \(gather.*kernel gather failed in program 0 of 1: IndexError.*gather\.py:13: rows = tl\.load"
    with tilewright.load(write(gather=far), device="interpreter") as model:
        with pytest.raises(InterpreterError, match=message):
            model([1, 9])
        model([1, 2])


def test_nothing_runs_from_a_damaged_source(write):
    path = write()
    source = path / "kernels/triton/total.py"
    source.write_text(source.read_text().replace("n):", "m):"))
    with pytest.raises(ArtifactError, match="total.py"):
        tilewright.load(path, device="interpreter")


def test_a_closed_model_ends_its_worker(write):
    model = tilewright.load(write(), device="interpreter")
    process = model._device._interpreter._process
    model([1])
    model.close()
    assert process.returncode == 0
    with pytest.raises(UsageError, match="closed"):
        model([1])


def test_the_interpreter_needs_plans_of_gpus(toy):
    with pytest.raises(ArtifactError, match="--target cuda"):
        tilewright.load(toy, device="interpreter")

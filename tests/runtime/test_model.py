"""Calling models: inputs of every kind, errors that leave the model usable, outputs, structure, tracing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import tilewright
from tilewright.codegen.artifact import write_artifact
from tilewright.runtime.entry import StepTime
from tilewright.runtime.errors import ArtifactError, InputError, ShapeError, UsageError
from tilewright.runtime.plan import Buffer, Plan, Ref


def inputs(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 8), dtype=np.float32), rng.integers(0, 10, n)


def agrees(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.shape == expected.shape and bool(np.allclose(got, expected, rtol=1e-6, atol=1e-6))


@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_sizes_and_ways_to_pass_inputs(toy_model, toy_reference, n):
    x, idx = inputs(n)
    expected = toy_reference(x, idx)
    for got in (toy_model(x, idx), toy_model(x, idx=idx), toy_model(idx=idx, x=x), toy_model.entry("main")(x, idx)):
        assert got.dtype == np.float32
        assert agrees(got, expected)


def test_inputs_that_are_not_laid_out_as_kernels_need(toy_model, toy_reference):
    x, idx = inputs(6)
    expected = toy_reference(x, idx)
    shifted = np.zeros(x.nbytes + 1, np.uint8)
    shifted[1:] = x.reshape(-1).view(np.uint8)
    misaligned = shifted[1:].view(np.float32).reshape(6, 8)
    assert not misaligned.flags.aligned
    readonly = x.copy()
    readonly.flags.writeable = False
    wide = np.zeros((6, 16), np.float32)
    wide[:, ::2] = x
    for variant in (np.asfortranarray(x), misaligned, readonly, wide[:, ::2], x[::-1][::-1], x.view(np.memmap)):
        assert agrees(toy_model(variant, idx), expected)
    assert agrees(toy_model(x, np.repeat(idx, 2)[::2]), expected)


def test_dlpack_tensors(toy_model, toy_reference):
    x, idx = inputs(5)
    expected = toy_reference(x, idx)
    assert agrees(toy_model(torch.from_numpy(x), torch.from_numpy(idx)), expected)
    assert agrees(toy_model(torch.from_numpy(x.T.copy()).T, torch.from_numpy(idx)), expected)  # strided
    assert agrees(toy_model(torch.from_numpy(np.concatenate([x, x]))[5:], idx), expected)  # an offset into its storage
    with pytest.raises(ShapeError, match="'x': cannot use this Tensor: .*requires? grad"):
        toy_model(torch.from_numpy(x).requires_grad_(), idx)
    with pytest.raises(ShapeError, match="'x': cannot use this Tensor"):
        toy_model(torch.empty(5, 8, device="meta"), idx)
    with pytest.raises(ShapeError, match=r"'x': expected float32\[n, 8\], got float16\[5, 8\]"):
        toy_model(torch.from_numpy(x).half(), idx)


@pytest.mark.parametrize("count", [0, 2, 16])
def test_bfloat16(toy_model, count):
    half = toy_model.entry("half")
    x = torch.arange(count, dtype=torch.bfloat16)
    y, size = half(x)
    assert (y.dtype, size) == (ml_dtypes.bfloat16, count)
    np.testing.assert_array_equal(y.astype(np.float32), np.arange(count, dtype=np.float32))
    again, _ = half(y)
    np.testing.assert_array_equal(again, y)
    given = torch.zeros(count, dtype=torch.bfloat16)
    half(y, out=given)
    assert torch.equal(given, x)


def test_python_numbers_take_the_dtype_of_the_input(toy_model, toy_reference):
    x, idx = inputs(2)
    assert agrees(toy_model(x.tolist(), idx.tolist()), toy_reference(x, idx))
    assert agrees(toy_model([[1] * 8, [2] * 8], [0, 9]), toy_reference(np.outer([1, 2], np.ones(8)), np.array([0, 9])))
    with pytest.raises(ShapeError, match="'idx': expected int64.*got a list of float64"):
        toy_model(x, [0.0, 1.0])
    assert agrees(toy_model(x, [True, False]), toy_reference(x, np.array([1, 0])))
    with pytest.raises(InputError, match="'x': a value does not fit float32"):
        toy_model([[1e300] * 8] * 2, idx)
    with pytest.raises(ShapeError, match="'x': not a regular list"):
        toy_model([[1.0], [1.0, 2.0]], idx)
    with pytest.raises(ShapeError, match=r"'x': expected float32\[n, 8\] as a numpy array or DLPack tensor, got str"):
        toy_model("x", idx)


@pytest.mark.parametrize(
    ("x", "idx", "expected"),
    [
        (np.zeros((2, 8)), None, r"input 'x': expected float32\[n, 8\], got float64\[2, 8\]; convert it with .astype"),
        (np.zeros((2, 8), ">f4"), None, r"input 'x': expected float32\[n, 8\]"),
        (None, np.zeros(2, np.int32), r"input 'idx': expected int64\[n\], got int32\[2\]"),
        (np.zeros(8, np.float32), None, r"input 'x': expected float32\[n, 8\], got shape \[8\]"),
        (np.zeros((1, 2, 8), np.float32), None, r"input 'x': expected float32\[n, 8\], got shape \[1, 2, 8\]"),
        (np.zeros((2, 9), np.float32), None, "input 'x', axis 1: expected 8, got 9"),
        (np.zeros((0, 8), np.float32), None, r"input 'x', axis 0 \(n\): expected 1 to 64, got 0"),
        (np.zeros((65, 8), np.float32), None, r"input 'x', axis 0 \(n\): expected 1 to 64, got 65"),
        (None, np.zeros(3, np.int64), r"'idx', axis 0: expected 2, got 3 \(n; n comes from input 'x', axis 0\)"),
        (np.zeros((13, 8), np.float32), np.zeros(13, np.int64), r"n must not be 13 \(here n = 13\)"),
    ],
)
def test_shape_errors_leave_the_model_usable(toy_model, toy_reference, x, idx, expected):
    good = inputs(2)
    with pytest.raises(ShapeError, match=expected):
        toy_model(good[0] if x is None else x, good[1] if idx is None else idx)
    assert agrees(toy_model(*good), toy_reference(*good))


def test_multiples(toy_model):
    with pytest.raises(ShapeError, match=r"'x', axis 0 \(h\): expected 0 to 16 in multiples of 2, got 3"):
        toy_model.entry("half")(np.zeros(3, ml_dtypes.bfloat16))


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
@pytest.mark.parametrize("n", [1, 50])
def test_an_index_out_of_range_names_the_step(toy_model, toy_reference, bad, n):
    x, idx = inputs(n)
    broken = idx.copy()
    broken[n // 2] = bad
    with pytest.raises(InputError, match=r"step 1 \(lookup; module words; toy.py:7; node embedding\)"):
        toy_model(x, broken)
    with pytest.raises(InputError):
        toy_model.profile(x, broken)
    assert agrees(toy_model(x, idx), toy_reference(x, idx))


def test_usage_errors(toy_model, toy):
    x, idx = inputs(2)
    with pytest.raises(UsageError, match="takes x, idx; idx missing"):
        toy_model(x)
    with pytest.raises(UsageError, match="there is no input 'mask'"):
        toy_model(x, idx, mask=x)
    with pytest.raises(UsageError, match="'x' was given twice"):
        toy_model(x, x=x)
    with pytest.raises(UsageError, match="got 3 positional"):
        toy_model(x, idx, x)
    with pytest.raises(UsageError, match="no entry point 'nope'; the artifact has main, count, half, busy"):
        toy_model.entry("nope")
    with pytest.raises(UsageError, match="no entry point 'nope'"):
        tilewright.load(toy, entry="nope")
    for device in ("gpu", "cuda:", "cuda:01", "cuda:-1", "", None):
        with pytest.raises(UsageError, match="unknown device"):
            tilewright.load(toy, device=device)
    for device in ("cuda", "cuda:3", "interpreter"):
        with pytest.raises(ArtifactError, match="holds no kernels for .*, but cpu:x86-64-v9, cpu:generic"):
            tilewright.load(toy, device=device)
    with pytest.raises(UsageError, match="device 'cuda' takes no number of threads"):
        tilewright.load(toy, device="cuda", threads=2)
    with pytest.raises(UsageError, match="device 'cpu' takes no stream"):
        tilewright.load(toy, device="cpu", stream=0)
    for threads in (0, -1, 513, 1.5, True):
        with pytest.raises(UsageError, match="threads must be a number from 1 to 512"):
            tilewright.load(toy, threads=threads)


def test_out(toy_model, toy_reference):
    x, idx = inputs(4)
    expected = toy_reference(x, idx)
    for form in (lambda y: y, lambda y: [y], lambda y: (y,), lambda y: {"y": y}):
        y = np.zeros((4, 4), np.float32)
        got = toy_model(x, idx, out=form(y))
        assert got is y
        assert agrees(y, expected)
    assert agrees(toy_model(x, idx, out={}), expected)


@pytest.mark.parametrize(
    ("out", "error", "expected"),
    [
        (np.zeros((4, 5), np.float32), ShapeError, r"output 'y': expected float32\[4, 4\], got float32\[4, 5\]"),
        (np.zeros((4, 4)), ShapeError, r"output 'y': expected float32\[4, 4\], got float64\[4, 4\]"),
        (np.zeros((4, 4), np.float32).T[::-1], ShapeError, "must be C-contiguous, aligned and writable"),
        (np.broadcast_to(np.float32(0), (4, 4)), ShapeError, "must be C-contiguous, aligned and writable"),
        ([[0.0] * 4] * 4, UsageError, "the model has 1 outputs, got 4 arrays"),
        ({"z": np.zeros((4, 4), np.float32)}, UsageError, "there is no output 'z'; the outputs are y"),
        ("y", ShapeError, "expected a numpy array or DLPack tensor, got str"),
    ],
)
def test_out_that_does_not_fit(toy_model, out, error, expected):
    with pytest.raises(error, match=expected):
        toy_model(*inputs(4), out=out)


def test_out_must_not_be_an_input(toy_model):
    memory = np.zeros((4, 12), np.float32).reshape(-1)
    x, y = memory[:32].reshape(4, 8), memory[31:47].reshape(4, 4)
    with pytest.raises(UsageError, match="shares memory with an input"):
        toy_model(x, np.zeros(4, np.int64), out=y)


def test_outputs_belong_to_the_caller(toy_model, toy_reference):
    x, idx = inputs(64)
    first = toy_model(x, idx)
    kept = first.copy()
    second = toy_model(-x, idx)
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(first, second)
    assert first.flags.writeable


def test_structure_of_results(toy_model):
    result = toy_model.entry("count")(np.ones(4, np.float32))
    assert list(result) == ["total", "again"]
    again, nothing = result["again"]
    assert nothing is None
    np.testing.assert_array_equal(again, result["total"])
    assert not np.shares_memory(again, result["total"])
    assert isinstance(toy_model.entry("half")(np.zeros(2, ml_dtypes.bfloat16)), list)
    assert isinstance(toy_model.entry("busy")(np.zeros((1, 64), np.float32)), tuple)


def test_what_can_be_asked(toy_model, toy):
    assert toy_model.entries == ("main", "count", "half", "busy")
    assert (toy_model.target, toy_model.threads) == ("cpu:generic", 3)
    x, idx = toy_model.inputs
    assert (x.name, x.dtype, x.shape, x.ranges) == ("x", "float32", ("n", 8), {"n": (1, 64)})
    assert str(idx) == "idx: int64[n] with n 1..64"
    assert [str(spec) for spec in toy_model.entry("half").outputs] == ["y: bfloat16[h*2] with h 0..8"]
    assert "cpu:generic, 3 threads" in repr(toy_model)
    with tilewright.load(toy, entry="half") as model:
        assert model.inputs[0].dtype == "bfloat16"


def test_many_shapes_and_back(toy_model, toy_reference):
    """More shapes than are remembered, in an order that makes the arena grow and stay."""
    busy = toy_model.entry("busy")
    for n in [*range(300, 1, -1), *range(1, 300, 7)]:
        (y,) = busy(np.full((n, 64), n, np.float32))
        assert (y == n + 64).all()
    assert agrees(toy_model(*inputs(3)), toy_reference(*inputs(3)))


@pytest.mark.parametrize("n", [1, 40])
def test_profile(toy_model, n):
    times = toy_model.profile(*inputs(n))
    assert [(item.step, item.variant) for item in times] == [(0, 0 if n == 1 else 1), (1, 0)]
    assert all(isinstance(item, StepTime) and item.begin_ns <= item.end_ns for item in times)
    assert times[0].end_ns <= times[1].begin_ns


def test_trace_reads_every_operand(toy_model, toy_reference, toy_parts):
    x, idx = inputs(5)
    w, table = (spec.load() for spec in toy_parts["constants"][:2])
    seen = []

    def look(step, variant, read):
        seen.append((step, variant, read(Ref("buffer", 0)), read(Ref("output", 0))))
        np.testing.assert_array_equal(read(Ref("input", 0)), x)
        np.testing.assert_array_equal(read(Ref("constant", 0)), w)
        np.testing.assert_array_equal(read(Ref("constant", 1)), table)
        assert not read(Ref("constant", 1)).flags.writeable

    result = toy_model.trace(look, x, idx)
    assert agrees(result, toy_reference(x, idx))
    assert [(step, variant) for step, variant, _, _ in seen] == [(0, 1), (1, 0)]
    assert agrees(seen[0][2], x @ w)
    assert agrees(seen[1][3], result)


def test_trace_reads_states(toy_model):
    states = []
    count = toy_model.entry("count")
    count.trace(lambda step, variant, read: states.append(read(Ref("state", 0))), np.ones(4, np.float32))
    np.testing.assert_array_equal(states, [[11, 21, 31, 41]])


def test_trace_that_raises_ends_the_run(toy_model, toy_reference):
    steps = []

    def stop(step, variant, read):
        steps.append(step)
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        toy_model.trace(stop, *inputs(5))
    assert steps == [0]
    assert agrees(toy_model(*inputs(5)), toy_reference(*inputs(5)))
    assert len(toy_model.profile(*inputs(5))) == 2


def test_images_are_read_in_their_logical_shape(toy_model, toy):
    from tilewright.runtime.inspection import Reader

    logical = np.arange(2 * 20 * 3 * 5, dtype=np.float32).reshape(2, 20, 3, 5)
    padded = np.zeros((2, 32, 3, 5), np.float32)
    padded[:, :20] = logical
    stored = {
        0: padded.reshape(2, 2, 16, 3, 5).transpose(0, 1, 3, 4, 2),
        3: logical.transpose(0, 2, 3, 1),
    }
    buffer = Buffer("b", "float32", ("n", 20, 3, 5), "channels16", 3840, 0, 0)
    strange = Buffer("s", "float32", ("n",), "spiral", 64, 0, 0)
    small = Buffer("t", "float32", ("n", 100), "rows", 64, 0, 0)
    last = Buffer("l", "float32", ("n", 20, 3, 5), "channels_last", 2400, 0, 0)
    plan = Plan("e", (), (), (), {}, (), (), (), (buffer, strange, small, last), ())
    read = Reader(plan, {"n": 2}, lambda ref, count: np.frombuffer(stored[ref.index].tobytes(), np.uint8)[:count])
    np.testing.assert_array_equal(read(Ref("buffer", 0)), logical)
    np.testing.assert_array_equal(read(Ref("buffer", 3)), logical)
    with pytest.raises(ArtifactError, match="unknown layout 'spiral'"):
        read(Ref("buffer", 1))
    with pytest.raises(ArtifactError, match="does not fit its place"):
        read(Ref("buffer", 2))


def test_an_artifact_that_is_replaced_while_it_is_loaded(toy_parts, other_targets, tmp_path):
    """The loader of the system knows libraries by name: the new one must not be taken for the old one."""
    x = np.zeros((2, 64), np.float32)
    others = {**toy_parts, "targets": other_targets}
    models = []
    for parts, expected in ((toy_parts, 64), (others, 128), (toy_parts, 64), (others, 128)):
        model = tilewright.load(write_artifact(tmp_path / "same.tw", **parts))
        models.append((model, expected))
        again = tilewright.load(tmp_path / "same.tw")
        models.append((again, expected))
        for loaded, value in models:
            assert (loaded.entry("busy")(x)[0] == value).all()

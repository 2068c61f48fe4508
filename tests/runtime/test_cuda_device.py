"""Models on a GPU, with a driver that is faked: what is computed, launched, kept, freed and refused."""

from __future__ import annotations

import gc
import random
import sys

import numpy as np
import pytest
from ml_dtypes import bfloat16

import tilewright
from tilewright.runtime.cuda.workspace import MOST_CALLS
from tilewright.runtime.errors import ArtifactError, DeviceError, InputError, ShapeError, UsageError
from tilewright.runtime.plan import Ref


@pytest.fixture
def model(gpu_toy, machine):
    with tilewright.load(gpu_toy, device="cuda:0") as loaded:
        yield loaded


def inputs(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.standard_normal((n, 8)).astype(np.float32), rng.integers(0, 10, n)


def test_it_runs(model, machine, toy_reference):
    for n in (1, 2, 12, 64, 1):
        for _ in range(3):
            x, idx = inputs(n)
            np.testing.assert_allclose(model(x, idx), toy_reference(x, idx), rtol=1e-6)
    assert model.entries == ("main", "count", "half", "chain")
    assert (model.device, model.target) == ("cuda:0", "cuda:sm_90")
    assert "cuda:sm_90 on cuda:0 (Fake GPU)" in repr(model)


def test_a_shape_that_repeats_becomes_a_graph(model, machine):
    for run in range(4):
        model(*inputs(3))
        assert [item.graph for item in machine.launched] == [run > 0] * 2
        machine.launched.clear()
    assert machine.calls["cuGraphInstantiate"] == 1
    model(*inputs(4))
    assert not machine.launched[0].graph


def test_what_is_launched(model, machine):
    model(*inputs(1))
    one, lookup = machine.launched
    assert (one.kernel, one.grid, one.threads, one.shared, one.cluster) == ("one_row", 1, 128, 0, 1)
    assert one.arguments[3] == 1 and one.arguments[4:] == lookup.arguments[-2:]
    assert one.arguments[2] == lookup.arguments[0]  # the buffer
    assert lookup.arguments[5:7] == [1, 10]
    assert all(address % 16 == 0 for address in one.arguments[:3] + lookup.arguments[:4] + lookup.arguments[-2:-1])
    machine.launched.clear()
    model.entry("half")(np.zeros(6, bfloat16))
    (copy,) = machine.launched
    assert (copy.grid, copy.cluster, copy.threads, copy.arguments[2]) == (2, 2, 128, 3)
    machine.launched.clear()
    model.entry("half")(np.zeros(6, bfloat16))
    (copy,) = machine.launched
    assert copy.graph and (copy.grid, copy.cluster) == (2, 2)


def test_more_shared_memory_than_usual_is_asked_for(model, machine, monkeypatch):
    from tilewright.runtime import tiles

    monkeypatch.setattr(tiles, "choose", lambda variant, values, *rest: tiles.allowed(variant, values)[-1])
    model(*inputs(64))
    rows, _ = machine.launched
    assert (rows.kernel, rows.shared, rows.threads, rows.grid) == ("rows", 100 << 10, 256, 1)
    assert list(machine.most_shared.values()) == [100 << 10]


def test_bfloat16_and_empty_calls(model, machine):
    x = np.arange(6).astype(bfloat16)
    y, rows = model.entry("half")(x)
    assert y.dtype == bfloat16 and rows == 6
    np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16))
    before = len(machine.launched)
    for _ in range(3):
        y, rows = model.entry("half")(np.zeros(0, bfloat16))
        assert y.shape == (0,) and rows == 0
    assert len(machine.launched) == before  # there was nothing to do


def test_results_belong_to_the_caller(model):
    chain = model.entry("chain")
    first, again = chain(np.zeros(5, np.float32))
    other, _ = chain(np.ones(5, np.float32))
    np.testing.assert_array_equal(first, [5] * 5)
    np.testing.assert_array_equal(other, [6] * 5)
    assert not np.may_share_memory(first, again)


def test_states(model):
    count, x = model.entry("count"), np.ones(4, np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(count(x)["total"], [11, 21, 31, 41])
    with model.session() as session, model.session() as other:
        for calls in range(1, 5):
            np.testing.assert_array_equal(session.entry("count")(x)["total"], np.array([10, 20, 30, 40]) + calls)
        np.testing.assert_array_equal(other.entry("count")(x)["total"], [11, 21, 31, 41])
        session.reset()
        np.testing.assert_array_equal(session.entry("count")(x)["total"], [11, 21, 31, 41])
    with pytest.raises(UsageError, match="the session is closed"):
        session(x)


def test_an_index_out_of_range(model, toy_reference):
    for _ in range(3):  # directly, and in graphs
        x, idx = inputs(4)
        with pytest.raises(
            InputError, match=r"out of range in step 1 \(lookup; module words; toy.py:7; node embedding\)"
        ):
            model(x, np.array([1, 2, 10, 3]))
        np.testing.assert_allclose(model(x, idx), toy_reference(x, idx), rtol=1e-6)


def test_out(model, toy_reference):
    x, idx = inputs(5)
    y = np.empty((5, 4), np.float32)
    for _ in range(3):
        assert model(x, idx, out=y) is y
        np.testing.assert_allclose(y, toy_reference(x, idx), rtol=1e-6)
    with pytest.raises(UsageError, match="shares memory with an input"):
        model.entry("chain")(y[0], out=y[0])
    with pytest.raises(ShapeError, match=r"expected float32\[5, 4\]"):
        model(x, idx, out=np.empty((4, 4), np.float32))


def test_inputs_are_checked(model):
    x, idx = inputs(5)
    with pytest.raises(ShapeError, match="convert it with .astype"):
        model(x.astype(np.float64), idx)
    with pytest.raises(ShapeError, match="n must not be 13"):
        model(*inputs(13))
    with pytest.raises(UsageError, match="idx missing"):
        model(x)
    np.testing.assert_allclose(model(x[::-1], list(idx)), model(x[::-1].copy(), idx))  # host arrays are copied


def test_the_arena_grows_and_graphs_follow(model, machine):
    chain = model.entry("chain")
    for n in (10, 10, 10_000, 10, 10, 50_000, 10_000, 10_000, 10):
        x = np.arange(n, dtype=np.float32)
        np.testing.assert_array_equal(chain(x)[0], x + 5)


def test_few_graphs_are_kept(model, machine):
    chain = model.entry("chain")
    chain(np.zeros(100, np.float32))
    for n in range(1, 3 * MOST_CALLS):
        for _ in range(2):
            chain(np.zeros(n, np.float32))
        assert len(machine.live["executable"]) == len(machine.live["graph"]) <= MOST_CALLS
    assert len(machine.live["graph"]) == MOST_CALLS


def test_profile(model):
    for _ in range(3):
        times = model.profile(*inputs(4))
        assert [(item.step, item.variant) for item in times] == [(0, 1), (1, 0)]
        assert all(item.begin_ns <= item.end_ns for item in times) and times[-1].end_ns > 0
        model(*inputs(4))
    with pytest.raises(InputError):
        model.profile(inputs(4)[0], np.full(4, 99))


def test_trace_reads_every_operand(model, toy_reference):
    x, idx = inputs(6)
    for _ in range(2):
        seen = []

        def look(step, variant, read, seen=seen):
            for position, ref in enumerate(model.entry("main").plan.steps[step].variants[variant].operands):
                if ref.kind != "fault":
                    seen.append((step, position, read(ref)))
            if step == 0:
                np.testing.assert_allclose(read(Ref("buffer", 0)), x @ read(Ref("constant", 0)), rtol=1e-6)

        y = model.trace(look, x, idx)
        np.testing.assert_allclose(y, toy_reference(x, idx), rtol=1e-6)
        np.testing.assert_array_equal(seen[-1][2], y)
        np.testing.assert_array_equal(seen[0][2], x)
        assert len(seen) == 7
    states = []
    model.entry("count").trace(lambda step, variant, read: states.append(read(Ref("state", 0))), np.ones(4, np.float32))
    np.testing.assert_array_equal(states, [[11, 21, 31, 41]])


def test_trace_that_raises_ends_the_run(model, toy_reference):
    def stop(step, variant, read):
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        model.trace(stop, *inputs(5))
    np.testing.assert_allclose(model(*inputs(5)), toy_reference(*inputs(5)), rtol=1e-6)


def test_a_launch_that_fails_names_its_step(model, machine, toy_reference):
    machine.fail("cuLaunchKernelEx", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", after=1)
    with pytest.raises(DeviceError, match=r"step 1 \(lookup; .*kernel add_rows, tile b32, 1 programs.*LAUNCH_OUT_OF"):
        model(*inputs(5))
    machine.fail("cuGraphAddKernelNode", "CUDA_ERROR_INVALID_VALUE", after=0)
    model(*inputs(6))
    with pytest.raises(DeviceError, match=r"step 0 \(product"):
        model(*inputs(6))
    machine.fail("cuGraphInstantiate", "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(DeviceError, match="cuGraphInstantiate"):
        model(*inputs(6))
    machine.fail("cuGraphLaunch", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
    with pytest.raises(DeviceError, match="cuGraphLaunch"):
        model(*inputs(6))
    np.testing.assert_allclose(model(*inputs(6)), toy_reference(*inputs(6)), rtol=1e-6)


def test_a_kernel_that_crashes(model, machine):
    machine.fail("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", after=0)
    with pytest.raises(
        DeviceError, match=r"a kernel of entry 'half' failed while it ran: .*ILLEGAL_ADDRESS.*trace\(\)"
    ):
        model.entry("half")(np.zeros(0, bfloat16), out=None)
    model.entry("chain")(np.zeros(3, np.float32))
    machine.fail("cuStreamSynchronize", "CUDA_ERROR_ILLEGAL_ADDRESS", after=1)
    with pytest.raises(DeviceError, match=r"step 1 \(increment_1; origin unknown\): kernel increment failed"):
        model.entry("chain").trace(lambda *_: None, np.zeros(3, np.float32))


def test_calls_from_several_threads(model, toy_reference):
    from concurrent.futures import ThreadPoolExecutor

    def work(n):
        for _ in range(5):
            np.testing.assert_allclose(model(*inputs(n)), toy_reference(*inputs(n)), rtol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 9)))


def test_closing(gpu_toy, machine):
    model = tilewright.load(gpu_toy, device="cuda")
    session = model.session()
    session(*inputs(3))
    model(*inputs(3))
    model.close()
    assert machine.leaks() == {}
    for call in (model, session, session.reset):
        with pytest.raises(UsageError, match="the model is closed"):
            call()
    model.close()
    session.close()


def test_the_last_reference_frees_everything(gpu_toy, machine):
    model = tilewright.load(gpu_toy, device="cuda")
    model(*inputs(3))
    session = model.session()
    del model
    gc.collect()
    session(*inputs(3))
    del session
    gc.collect()
    assert machine.leaks() == {}


def test_scratch_memory_of_kernels(model, machine):
    """As much as all programs need, for both of Triton's kinds; none where no kernel wants any."""
    model.entry("chain")(np.zeros(99, np.float32))
    assert machine.launched[-1].arguments[-2:] == [0, 0]
    model(*inputs(64))
    lookup = machine.launched[-1]
    assert lookup.grid == 2 and lookup.arguments[-1] == lookup.arguments[-2] + 256
    assert (lookup.arguments[-2], 256 + 2 * 8) in [(begin, count) for begin, (_, count, _) in machine.allocated.items()]


def test_sizes_that_do_not_fit_their_type(model):
    from tilewright.runtime.cuda.calls import Kernel
    from tilewright.runtime.cuda.modules import Function
    from tilewright.runtime.launches import Launch

    toy = sys.modules["tilewright_tests_cuda_toy"]
    function = Function(0, toy.binary("k", "b32"), ("*fp32", "i32", "i64"))
    launch = Launch(0, 0, "k", toy.tile(32), 1, (), (2**31, 5))
    with pytest.raises(ArtifactError, match="kernel k takes an i32, and cannot take 2147483648"):
        Kernel(launch, function, [256], (0, 0))
    Kernel(Launch(0, 0, "k", toy.tile(32), 1, (), (2**31 - 1, 2**40)), function, [256], (0, 0))


def test_random_calls(gpu_toy, machine, toy_reference):
    """Any order of entry points, sizes, sessions, faults, resets and ways to call gives what numpy gives."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    with tilewright.load(gpu_toy, device="cuda") as model:
        sessions = [model.session() for _ in range(2)]
        totals = [np.array([10, 20, 30, 40], np.float32) for _ in sessions]
        for _ in range(150):
            number = rng.randrange(2)
            caller, total = rng.choice([(model, None), (sessions[number], totals[number])])
            match rng.randrange(6):
                case 0 | 1:
                    x, idx = inputs(rng.choice([1, 2, 3, 31, 32, 33, 64]))
                    out = np.empty((len(x), 4), np.float32) if rng.random() < 0.3 else None
                    got = caller.entry("main")(x, idx=idx, out=out)
                    np.testing.assert_allclose(got, toy_reference(x, idx), rtol=1e-6)
                case 2:
                    x = np.full(4, rng.randrange(5), np.float32)
                    got = caller.entry("count")(x)["total"]
                    if total is None:
                        np.testing.assert_array_equal(got, np.array([10, 20, 30, 40]) + x)
                    else:
                        total += x
                        np.testing.assert_array_equal(got, total)
                case 3:
                    x = np.arange(rng.choice([1, 7, 100, 5000]), dtype=np.float32)
                    np.testing.assert_array_equal(caller.entry("chain")(x)[1], x + 5)
                case 4:
                    with pytest.raises(InputError):
                        caller.entry("main")(inputs(2)[0], [0, rng.choice([10, -11])])
                case 5 if total is not None:
                    caller.reset()
                    total[:] = [10, 20, 30, 40]
        for session in sessions:
            session.close()

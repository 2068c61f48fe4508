"""Threads, sessions, forks, closing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tilewright.runtime.errors import UsageError

ONES = np.ones(4, np.float32)


def busy_is_right(model, n: int) -> bool:
    (y,) = model.entry("busy")(np.full((n, 64), n, np.float32))
    return bool((y == n + 64).all())


def test_many_threads_one_model(toy_model, toy_reference):
    rng = np.random.default_rng(0)
    cases = [(rng.standard_normal((n, 8), dtype=np.float32), rng.integers(0, 10, n)) for n in (1, 7, 64, 33)]
    expected = [toy_reference(*case) for case in cases]

    def work(seed: int) -> bool:
        order = np.random.default_rng(seed).integers(0, len(cases), 100)
        right = all(np.allclose(toy_model(*cases[i]), expected[i], rtol=1e-6, atol=1e-6) for i in order)
        return right and all(busy_is_right(toy_model, int(n) + 1) for n in order)

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(8)))


def test_callers_wait_for_a_free_workspace(toy):
    with tilewright.load(toy, threads=1) as model:
        limit = model._pool.limit
        inside = threading.Semaphore(0)
        leave = threading.Event()

        def look(step, variant, read):
            inside.release()
            assert leave.wait(30)

        with ThreadPoolExecutor(limit + 1) as executor:
            calls = [executor.submit(model.entry("count").trace, look, ONES) for _ in range(limit + 1)]
            for _ in range(limit):
                assert inside.acquire(timeout=30)
            assert not inside.acquire(timeout=0.1)
            leave.set()
            assert inside.acquire(timeout=30)
            for call in calls:
                np.testing.assert_array_equal(call.result()["total"], [11, 21, 31, 41])


def test_plain_calls_start_from_the_initial_state(toy_model):
    for _ in range(3):
        np.testing.assert_array_equal(toy_model.entry("count")(ONES)["total"], [11, 21, 31, 41])


def test_sessions_keep_their_own_state(toy_model):
    one, other = toy_model.session(), toy_model.session()
    for step in range(1, 4):
        np.testing.assert_array_equal(one.entry("count")(ONES)["total"], np.array([10, 20, 30, 40]) + step)
    np.testing.assert_array_equal(other.entry("count")(ONES)["total"], [11, 21, 31, 41])
    toy_model.entry("count")(ONES)
    one.entry("busy")(np.zeros((3, 64), np.float32))
    np.testing.assert_array_equal(one.entry("count")(ONES)["total"], [14, 24, 34, 44])
    one.reset()
    np.testing.assert_array_equal(one.entry("count")(ONES)["total"], [11, 21, 31, 41])
    with pytest.raises(UsageError, match="no entry point 'nope'"):
        one.entry("nope")


def test_one_session_from_several_threads_loses_nothing(toy_model):
    session = toy_model.session()
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: session.entry("count")(ONES), range(200)))
    np.testing.assert_array_equal(session.entry("count")(ONES)["total"], np.array([10, 20, 30, 40]) + 201)


def test_session_is_usable_after_an_error(toy_model):
    session = toy_model.session()
    with pytest.raises(tilewright.TilewrightError):
        session(np.zeros((2, 8), np.float32), np.array([0, 99]))
    with pytest.raises(tilewright.TilewrightError):
        session.entry("count")(np.zeros(5, np.float32))
    np.testing.assert_array_equal(session.entry("count")(ONES)["total"], [11, 21, 31, 41])


def in_child(check) -> int:
    """Exit status of a forked child that runs ``check``: 0 when it returns True."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork(toy_model):
    session = toy_model.session()
    session.entry("count")(ONES)
    assert busy_is_right(toy_model, 100)
    for _ in range(3):
        assert in_child(lambda: busy_is_right(toy_model, 100) and busy_is_right(toy_model, 7)) == 0
    assert in_child(lambda: bool((session.entry("count")(ONES)["total"] == [12, 22, 32, 42]).all())) == 0
    assert in_child(lambda: in_child(lambda: busy_is_right(toy_model, 100)) == 0) == 0
    assert in_child(lambda: toy_model.close() is None) == 0
    assert busy_is_right(toy_model, 100)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_other_threads_are_in_calls(toy_model):
    stop = threading.Event()
    session = toy_model.session()

    def work():
        while not stop.is_set():
            assert busy_is_right(toy_model, 200)
            session.entry("busy")(np.zeros((50, 64), np.float32))

    with ThreadPoolExecutor(3) as executor:
        workers = [executor.submit(work) for _ in range(3)]
        try:
            for _ in range(20):
                assert in_child(lambda: busy_is_right(toy_model, 200) and session.entry("count")(ONES) is not None) == 0
        finally:
            stop.set()
        for worker in workers:
            worker.result()


def square_in_worker(n: int) -> bool:
    return busy_is_right(MODEL, n)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_multiprocessing_pool(toy_model):
    global MODEL
    MODEL = toy_model
    assert busy_is_right(toy_model, 100)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(square_in_worker, range(1, 40)).get(60) == [True] * 39
    del MODEL


def test_close(toy):
    model = tilewright.load(toy, threads=2)
    entry, session = model.entry("busy"), model.session()
    assert busy_is_right(model, 100)
    model.close()
    model.close()
    for call in (model.entry("busy"), entry, session.entry("busy")):
        with pytest.raises(UsageError, match="the model is closed"):
            call(np.zeros((1, 64), np.float32))
    with pytest.raises(UsageError, match="the model is closed"):
        session.reset()


def test_close_waits_for_running_calls(toy):
    model = tilewright.load(toy, threads=2)
    inside, leave = threading.Event(), threading.Event()

    def look(step, variant, read):
        inside.set()
        assert leave.wait(30)

    with ThreadPoolExecutor(2) as executor:
        call = executor.submit(model.entry("count").trace, look, ONES)
        assert inside.wait(30)
        closing = executor.submit(model.close)
        time.sleep(0.05)
        assert not closing.done()
        leave.set()
        np.testing.assert_array_equal(call.result()["total"], [11, 21, 31, 41])
        closing.result(30)


def native_threads() -> int:
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("tilewright")


def test_threads_start_when_needed_and_end_with_the_model(toy):
    gc.collect()
    before = native_threads()
    model = tilewright.load(toy, threads=4)
    assert native_threads() == before
    assert busy_is_right(model, 100)
    deadline = time.monotonic() + 30
    while native_threads() < before + 3 and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread names itself when it first runs
    assert native_threads() == before + 3
    entry = model.entry("busy")
    del model
    entry(np.zeros((9, 64), np.float32))  # an entry point keeps what it needs
    del entry
    assert native_threads() == before  # without waiting for the garbage collector


def test_nothing_spins_when_idle(toy_model):
    assert busy_is_right(toy_model, 100)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_mapping_ends_with_the_model(toy):
    def mapped() -> bool:
        return "weights.safetensors" in Path("/proc/self/maps").read_text()

    gc.collect()
    if mapped():
        pytest.skip("another test's model is alive")
    model = tilewright.load(toy)
    assert mapped()
    del model
    assert not mapped()

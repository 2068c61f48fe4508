"""The interpreter's process: how it starts, shares memory, reports, dies and ends."""

import gc
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tilewright.runtime.errors import InterpreterError
from tilewright.runtime.interpreter.launch import Launch, Operand
from tilewright.runtime.interpreter.memory import Shared
from tilewright.runtime.interpreter.process import Interpreter

SOURCE = """
import triton
import triton.language as tl
import tw_math as tw


@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tw.twice(tl.load(x + at, mask=at < n)), mask=at < n)


@triton.jit
def broken(x):
    value = tl.load(x) + missing
    tl.store(x, value)


@triton.jit
def endless(x):
    while tl.load(x) == 0:
        tl.store(x + 1, 1.0)
"""
HELPERS = """
import triton


@triton.jit
def twice(x):
    return x + x
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kernels.py").write_text(SOURCE)
    (tmp_path / "tw_math.py").write_text(HELPERS)
    return tmp_path


@pytest.fixture
def interpreter(folder):
    process = Interpreter(folder)
    yield process
    process.close()


def floats(interpreter, count):
    memory = Shared(interpreter, count * 4)
    return memory, memory.array.view(np.float32)


def launch(memory, kernel="double", sizes=(), constants=None, grid=1, size=None):
    operand = Operand("float32", memory.id, 0, len(memory) if size is None else size)
    return Launch("kernels.py", kernel, [operand], sizes, constants or {}, grid)


def test_kernels_work_on_shared_memory(interpreter, folder):
    memory, x = floats(interpreter, 11)
    x[:] = np.arange(11)
    double = launch(memory, sizes=[10], constants={"BLOCK": 4}, grid=3)
    interpreter.run([double, double])
    np.testing.assert_array_equal(x, [*np.arange(10) * 4, 10])
    assert sorted(path.name for path in folder.iterdir()) == ["kernels.py", "tw_math.py"], "it leaves nothing behind"


def test_a_kernel_that_raises_is_named_with_its_line(interpreter):
    memory, x = floats(interpreter, 4)
    with pytest.raises(InterpreterError, match=r"(?s)kernel broken failed in program 0 of 1.*missing.*kernels.py:15"):
        interpreter.run([launch(memory, "broken")])
    x[:] = 1
    interpreter.run([launch(memory, sizes=[4], constants={"BLOCK": 4})])
    assert (x == 2).all(), "the interpreter stays usable"


def test_operands_outside_of_their_block_are_refused(interpreter):
    memory, _ = floats(interpreter, 4)
    with pytest.raises(InterpreterError, match="an operand of 17 bytes at 0 in a block of 16"):
        interpreter.run([launch(memory, sizes=[4], constants={"BLOCK": 4}, size=17)])


def test_memory_is_let_go(interpreter):
    memory, x = floats(interpreter, 1 << 18)
    del memory, x
    gc.collect()
    memory, _ = floats(interpreter, 4)
    interpreter.run([launch(memory, sizes=[4], constants={"BLOCK": 4})])
    mapped = Path(f"/proc/{interpreter._process.pid}/maps").read_text().count("memfd:tilewright")
    assert mapped == 1


def test_threads_take_turns(interpreter):
    memory, x = floats(interpreter, 4)
    x[:] = 1
    double = launch(memory, sizes=[4], constants={"BLOCK": 4})
    threads = [threading.Thread(target=interpreter.run, args=([double],)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (x == 2**6).all()


def test_a_worker_that_dies_is_noticed(interpreter):
    memory, x = floats(interpreter, 4)
    x[:] = 0
    threading.Timer(0.3, os.kill, (interpreter._process.pid, signal.SIGKILL)).start()
    with pytest.raises(InterpreterError, match=r"ended \(signal SIGKILL\) while running endless"):
        interpreter.run([launch(memory, "endless")])
    with pytest.raises(InterpreterError, match="the interpreter is closed"):
        interpreter.run([launch(memory, "endless")])


def test_closing_ends_the_worker(interpreter):
    interpreter.close()
    assert interpreter._process.returncode == 0
    interpreter.close()


def test_the_worker_ends_with_its_parent(folder):
    program = """if True:
        import os, sys
        from tilewright.runtime.interpreter.process import Interpreter
        interpreter = Interpreter(sys.argv[1])
        print(interpreter._process.pid, flush=True)
        os._exit(0)  # runs no finalizer
    """
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    deadline = time.monotonic() + 20
    while alive(int(done.stdout)):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.02)


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_forked_child_is_told_to_load_again(interpreter):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Shared(interpreter, 4)
        except InterpreterError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"load the model after a fork" in os.read(reading, 1000)
    Shared(interpreter, 4)


def test_without_triton_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InterpreterError, match="pip install 'triton"):
        Interpreter(folder)

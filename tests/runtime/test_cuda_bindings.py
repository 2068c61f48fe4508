"""Models on a GPU with the real bindings and a driver in C (``fake_libcuda.c``): what the runtime says must arrive."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.codegen.c.toolchain import find_compiler

HERE = Path(__file__).parent

BEGIN = """
import ctypes, gc, importlib.util, sys, threading
import numpy as np
from ml_dtypes import bfloat16

library, artifact, toy_path = sys.argv[1:]
lib = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("cuda_toy", toy_path)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
launched = []

@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64), *[ctypes.c_uint] * 4, ctypes.c_int)
def run(name, arguments, grid, threads, shared, cluster, graph):
    name = name.decode()
    values = [arguments[index] for index in range(len(toy.PARAMETERS[name]) + 2)]
    launched.append((name, grid, threads, shared, cluster, bool(graph)))
    toy.KERNELS[name](values, grid)

lib.fake_set_run(run)

import tilewright
from tilewright.runtime.cuda.tune import tune
from tilewright.runtime.errors import InputError

class Tensor:
    \"\"\"On the device of the fake, which is the host.\"\"\"

    def __init__(self, array):
        memory = np.zeros(array.nbytes + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        self.array = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__array_interface__, "stream": 1, "strides": None}

class Exported:
    \"\"\"Takes a result through DLPack as a library in C does: it calls the deleter when it ends.\"\"\"

    def __init__(self, result, deleter=ctypes.CFUNCTYPE(None, ctypes.c_void_p)):
        api = ctypes.pythonapi
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
        api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
        capsule = result.__dlpack__(stream=2)
        self.address = api.PyCapsule_GetPointer(capsule, b"dltensor")
        self.name = b"used_dltensor"
        api.PyCapsule_SetName(capsule, self.name)
        size = 48 + 8  # DLTensor, then its owner
        self.end = deleter(ctypes.c_void_p.from_address(self.address + size).value)

    def __del__(self):
        self.end(self.address)
"""

CALLS = """
W = np.arange(32, dtype=np.float32).reshape(8, 4) / 16  # as conftest.py has them
TABLE = np.arange(40, dtype=np.float32).reshape(10, 4)
rng = np.random.default_rng(0)
with tilewright.load(artifact, device="cuda") as model:
    for n in (1, 64):
        for turn in range(4):
            x, idx = rng.standard_normal((n, 8)).astype(np.float32), rng.integers(0, 10, n)
            expected = x @ W + TABLE[idx]
            np.testing.assert_allclose(model(x, idx), expected, rtol=1e-6)
            given = Tensor(x), Tensor(idx)
            y = model(*given)
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6)
            out = Tensor(np.zeros_like(expected))
            model(x, idx, out=out)
            np.testing.assert_allclose(out.array, expected, rtol=1e-6)
            kept = Exported(y)
            del y, kept
    assert {one[-1] for one in launched} == {False, True}
    launched.clear()
    half = model.entry("half")
    for _ in range(3):
        data = rng.standard_normal(6).astype(bfloat16)
        np.testing.assert_array_equal(half(data)[0], data)
    assert [one[4] for one in launched] == [2, 2, 2] and {one[-1] for one in launched} == {False, True}
    with model.session() as session:
        for turn in range(1, 4):
            total = session.entry("count")(np.ones(4, np.float32))["total"]
            np.testing.assert_array_equal(total, np.array([10, 20, 30, 40]) + turn)
    for _ in range(3):
        try:
            model(np.zeros((1, 8), np.float32), np.array([10]))
        except InputError:
            pass
        else:
            raise AssertionError("an index out of range was not noticed")
    model(np.zeros((1, 8), np.float32), np.array([9]))
    assert len(model.profile(np.zeros((1, 8), np.float32), np.array([9]))) == 2
    done = []
    def call():
        x, idx = np.ones((3, 8), np.float32), np.array([1, 2, 9])
        for _ in range(5):
            np.testing.assert_allclose(model(x, idx), x @ W + TABLE[idx], rtol=1e-6)
        done.append(1)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(done) == 4

class Given:
    cuda_stream = 0

with tilewright.load(artifact, device="cuda", stream=Given()) as model:
    y = model.entry("chain")(Tensor(np.zeros(5, np.float32)))[0]
    model.synchronize()
    np.testing.assert_array_equal(y.numpy(), np.full(5, 5))
    del y
del model, given
gc.collect()
launched.clear()
tune(artifact, values=[{"n": 64}], entries=["main"], repeats=2)
assert ("rows", 1, 256, 100 << 10, 0, False) in launched, set(launched)  # more than is there without asking
gc.collect()
assert lib.fake_problems() == 0
assert lib.fake_alive() == 0, lib.fake_alive()
print("fine")
"""

EXIT = """
model = tilewright.load(artifact, device="cuda")
x, idx = Tensor(np.zeros((3, 8), np.float32)), Tensor(np.zeros(3, np.int64))
for _ in range(3):
    result = model(x, idx)
exported = Exported(result)
other = Exported(model(x, idx))
cycle = [model, result, exported]
cycle.append(cycle)
print("fine")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    pytest.importorskip("cuda.bindings.driver")
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.submodule_search_locations:
        pytest.skip("cuda.h comes with Triton")
    headers = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "include"
    output = tmp_path_factory.mktemp("libcuda") / "libcuda.so.1"
    command = [
        *find_compiler().command, "-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
        "-Wl,-soname,libcuda.so.1", "-I", str(headers), str(HERE / "fake_libcuda.c"), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def run(library: Path, artifact: Path, script: str) -> None:
    command = [sys.executable, "-c", script, str(library), str(artifact), str(HERE / "cuda_toy.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", ""), done.stderr


def test_calls(library, gpu_toy, tmp_path):
    copy = shutil.copytree(gpu_toy, tmp_path / "toy.tw")  # which tuning writes into
    run(library, copy, BEGIN + CALLS)


@pytest.mark.parametrize("before", ["", "import atexit\natexit.register(lib.fake_end)\n"], ids=["", "driver ended"])
def test_a_process_may_end_with_everything_alive(library, gpu_toy, before):
    run(library, gpu_toy, BEGIN + before + EXIT)

"""A small model written by hand (``toy.c``) as artifacts on disk, so that the runtime is tested without the compiler.

Fixtures: ``toy`` is the path of an artifact that tests must not change, ``toy_copy`` one of the test's own,
``toy_model`` the loaded model, ``toy_parts`` what :func:`write_artifact` takes.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright
from tilewright.codegen.artifact import ConstantData, TargetBinaries, layout_constants, weights_id, write_artifact
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.runtime import sizes
from tilewright.runtime.plan import Buffer, Check, Constant, Origin, Plan, Port, Ref, StateBuffer, Step, Symbol, Variant

HERE = Path(__file__).parent
C_SOURCES = HERE.parents[1] / "codegen" / "templates" / "c"
BUSY_STEPS = 64

W = np.arange(32, dtype=np.float32).reshape(8, 4) / 16
TABLE = np.arange(40, dtype=np.float32).reshape(10, 4)
START = np.array([10, 20, 30, 40], np.float32)

CONSTANTS = (
    ConstantData("w", "float32", (8, 4), lambda: W),
    ConstantData("table", "float32", (10, 4), lambda: TABLE),
    ConstantData("start", "float32", (4,), lambda: START),
)


def constant(name: str) -> Constant:
    spec = next(item for item in CONSTANTS if item.key == name)
    offset, count = layout_constants(CONSTANTS)[name]
    return Constant(name, name, spec.dtype, spec.shape, offset, count, (f"module.{name}",))


def main_plan() -> Plan:
    x, idx, y, t = Ref("input", 0), Ref("input", 1), Ref("output", 0), Ref("buffer", 0)
    product = (x, Ref("constant", 0), t)
    return Plan(
        entry="main",
        symbols=(Symbol("n", 1, 64, 2, 0, 0),),
        inputs=(Port("x", "float32", ("n", 8)), Port("idx", "int64", ("n",))),
        outputs=(Port("y", "float32", ("n", 4)),),
        results={"output": 0},
        checks=(Check(sizes.compare("ne", "n", 13), "n must not be 13"),),
        states=(),
        constants=(constant("w"), constant("table")),
        buffers=(Buffer("t", "float32", ("n", 4), "rows", sizes.mul("n", 16), 0, 1),),
        steps=(
            Step(
                "product",
                "matmul",
                (
                    Variant("one_row", product, ("n",), "n", sizes.compare("eq", "n", 1)),
                    Variant("rows", product, ("n",), "n"),
                ),
                (2,),
            ),
            Step(
                "lookup",
                "indexing",
                (Variant("add_rows", (t, Ref("constant", 1), idx, y), ("n", 10), "n"),),
                (3,),
                Origin(("embedding",), "words", "toy.py:7"),
            ),
        ),
    )


def count_plan() -> Plan:
    operands = (Ref("input", 0), Ref("state", 0), Ref("output", 0))
    return Plan(
        entry="count",
        symbols=(),
        inputs=(Port("x", "float32", (4,)),),
        outputs=(Port("total", "float32", (4,)),),
        results={"dict": {"total": {"output": 0}, "again": {"tuple": [{"output": 0}, {"constant": None}]}}},
        checks=(),
        states=(StateBuffer("total", "float32", (4,), 16, "start"),),
        constants=(constant("start"),),
        buffers=(),
        steps=(Step("accumulate", "loop", (Variant("accumulate", operands, (), 4),), (1, 2)),),
    )


def half_plan() -> Plan:
    return Plan(
        entry="half",
        symbols=(Symbol("h", 0, 8, 2, 0, 0, 2),),
        inputs=(Port("x", "bfloat16", (sizes.mul("h", 2),)),),
        outputs=(Port("y", "bfloat16", (sizes.mul("h", 2),)),),
        results={"list": [{"output": 0}, {"size": sizes.to_json(sizes.mul("h", 2))}]},
        checks=(),
        states=(),
        constants=(),
        buffers=(),
        steps=(Step("copy", "loop", (Variant("copy16", (Ref("input", 0), Ref("output", 0)), (), "h"),), (1,)),),
    )


def busy_plan() -> Plan:
    steps = []
    for index in range(BUSY_STEPS):
        source = Ref("buffer", index % 2) if index else Ref("input", 0)
        target = Ref("buffer", (index + 1) % 2) if index < BUSY_STEPS - 1 else Ref("output", 0)
        steps.append(Step(f"increment_{index}", "loop", (Variant("increment", (source, target), (64,), "n"),), (1,)))
    count = sizes.mul("n", 256)
    return Plan(
        entry="busy",
        symbols=(Symbol("n", 1, 4096, 2, 0, 0),),
        inputs=(Port("x", "float32", ("n", 64)),),
        outputs=(Port("y", "float32", ("n", 64)),),
        results={"tuple": [{"output": 0}]},
        checks=(),
        states=(),
        constants=(),
        buffers=(
            Buffer("a", "float32", ("n", 64), "rows", count, 0, BUSY_STEPS - 1),
            Buffer("b", "float32", ("n", 64), "rows", count, 0, BUSY_STEPS - 1, (0,)),
        ),
        steps=tuple(steps),
    )


def compile_library(folder: Path, identity: str, size: int, *extra: str) -> bytes:
    """``toy.c`` with the C runtime as a shared library."""
    output = folder / "toy.so"
    defines = [f'-DWEIGHTS_ID="{identity}"', f"-DWEIGHTS_SIZE={size}"]
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-pthread", "-I", str(C_SOURCES)]
    sources = [str(HERE / "toy.c"), str(C_SOURCES / "tw_runtime.c")]
    command = [*find_compiler().command, *flags, *defines, *extra, *sources, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output.read_bytes()


@pytest.fixture(scope="session")
def toy_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    library = compile_library(tmp_path_factory.mktemp("toy_build"), *weights_id(CONSTANTS))
    return {
        "plans": [main_plan(), count_plan(), half_plan(), busy_plan()],
        "constants": CONSTANTS,
        "targets": [
            TargetBinaries("cpu:x86-64-v9", ("avx9000", "sse2"), {"model.so": b"not for this machine"}),
            TargetBinaries("cpu:generic", (), {"model.so": library, "kernels/rows.c": b"/* source */\n"}),
        ],
        "info": {"source": "toy.c"},
    }


@pytest.fixture(scope="session")
def other_targets(tmp_path_factory: pytest.TempPathFactory) -> list[TargetBinaries]:
    """Kernels whose entry ``busy`` adds 2 in every step."""
    folder = tmp_path_factory.mktemp("other_build")
    library = compile_library(folder, *weights_id(CONSTANTS), "-DINCREMENT=2")
    return [TargetBinaries("cpu:generic", (), {"model.so": library})]


@pytest.fixture(scope="session")
def toy(toy_parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("toy") / "toy.tw", **toy_parts)


@pytest.fixture
def toy_copy(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "copy.tw"))


@pytest.fixture
def toy_model(toy: Path):
    with tilewright.load(toy, threads=3) as model:
        yield model


def reference(x: np.ndarray, idx: np.ndarray) -> np.ndarray:
    """What entry ``main`` computes, in numpy."""
    return x @ W + TABLE[idx]


@pytest.fixture(scope="session")
def toy_reference():
    return reference


@pytest.fixture
def changed_plan():
    """A function that replaces fields of the plan of entry ``main``."""
    return lambda **fields: dataclasses.replace(main_plan(), **fields)


def beside(name: str) -> Any:
    """A module of this folder that holds no tests."""
    spec = importlib.util.spec_from_file_location(f"tilewright_tests_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


@pytest.fixture(scope="session")
def fake_cuda() -> Any:
    return beside("fake_cuda")


@pytest.fixture(scope="session")
def gpu_parts(toy_parts: dict[str, Any], fake_cuda: Any) -> dict[str, Any]:
    """What :func:`write_artifact` takes for the toy on CPUs and GPUs."""
    toy = beside("cuda_toy")
    plans = [toy.main_plan(main_plan()), toy.count_plan(count_plan()), toy.half_plan(half_plan()), toy.chain_plan()]
    return {
        "plans": {"cuda": plans},
        "constants": CONSTANTS,
        "targets": [toy.target(fake_cuda.image)],
        "info": {},
        "sources": {"rows.py": b"# source\n"},
    }


@pytest.fixture(scope="session")
def gpu_toy(gpu_parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("gpu_toy") / "toy.tw", **gpu_parts)


@pytest.fixture
def machine(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch):
    """A machine with one H200 and the toy's kernels; at the end nothing may be left on it."""
    from tilewright.runtime.cuda import driver

    made = fake_cuda.FakeCuda()
    made.kernels.update(beside("cuda_toy").KERNELS)
    monkeypatch.setitem(sys.modules, driver.MODULE, made)
    driver.forget()
    yield made
    driver.forget()
    gc.collect()
    assert made.leaks() == {}
    assert made.problems == []

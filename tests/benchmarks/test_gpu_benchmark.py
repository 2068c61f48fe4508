"""The GPU benchmark without a GPU: what it plans, its state, its tables, and that it says so where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("state")``: a module of the folder, which is no package of ours."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: import_module(f"benchmarks.{name}")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_says_that_there_is_no_gpu(tmp_path):
    done = run("--state", str(tmp_path / "state.json"))
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("no GPU at hand: nothing is measured")
    assert not (tmp_path / "state.json").exists()


def test_units_have_names_of_their_own_and_fit_several_runs(benchmark):
    planning = benchmark("gpu_units")
    planned = planning.units()
    assert len({unit.name for unit in planned}) == len(planned)
    assert max(unit.seconds for unit in planned) < 570
    assert planned[0].name == "ceiling/copy"
    for dtype in ("float16", "bfloat16"):
        assert f"model/bert_base/{dtype}/64/max-autotune" in {
            unit.name for unit in planning.units(("float16", "bfloat16"))
        }
    checked = {(unit.parameters["name"], unit.parameters["dtype"]) for unit in planned if unit.kind == "template"}
    assert checked == {(name, dtype) for name in planning.TEMPLATES for dtype in planning.DTYPES}


def test_every_template_has_a_program(benchmark):
    programs, planning = benchmark("gpu_templates"), benchmark("gpu_units")
    assert set(programs.CASES) == set(planning.TEMPLATES)
    for name in programs.CASES:
        module, inputs, _ = programs.case(name)
        again = programs.case(name)
        assert torch.isfinite(module(*inputs)).all() and torch.equal(module(*inputs), again[0](*again[1]))


def test_every_kind_of_unit_can_be_measured(benchmark):
    planning, measuring = benchmark("gpu_units"), benchmark("gpu_measure")
    for unit in planning.units():
        code = measuring.KINDS[unit.kind].__code__
        assert set(unit.parameters) == set(code.co_varnames[: code.co_argcount]), unit.name


def test_the_state_goes_on_where_it_ended(benchmark, tmp_path):
    states = benchmark("state")
    machine = {"gpu": "NVIDIA H200", "torch": "2.13.0"}
    state = states.State.open(tmp_path / "state.json", machine)
    state.record("matmul/a", {"us": 1.5})
    state.record("matmul/b", {"error": "out of memory"})
    again = states.State.open(tmp_path / "state.json", machine)
    assert again.results == state.results
    assert again.has("matmul/a") and again.has("matmul/b") and not again.has("matmul/c")
    assert again.has("matmul/a", retry=True) and not again.has("matmul/b", retry=True)
    with pytest.raises(states.OtherMachine, match="holds measurements of gpu NVIDIA H200, torch 2.13.0"):
        states.State.open(tmp_path / "state.json", machine | {"gpu": "NVIDIA A100"})


def test_measures_what_is_not_done_and_keeps_to_its_time(benchmark, tmp_path, monkeypatch):
    main, states, planning = benchmark("gpu"), benchmark("state"), benchmark("gpu_units")
    asked = []
    monkeypatch.setattr(main.Worker, "run", lambda self, unit, limit: asked.append(unit.name) or {"us": 1.0})
    planned = [planning.Unit(name, "matmul", {}, seconds) for name, seconds in (("a", 5), ("b", 50), ("c", 5))]
    state = states.State.open(tmp_path / "state.json", {})
    state.record("a", {"us": 2.0})
    main.measure(state, planned, 20, retry=False)
    assert asked == ["c"] and state.results["a"] == {"us": 2.0}
    main.measure(state, planned, 100, retry=False)
    assert asked == ["c", "b"]


def test_a_unit_that_ends_its_process_is_an_error(benchmark, monkeypatch):
    main, planning = benchmark("gpu"), benchmark("gpu_units")
    monkeypatch.setattr(main.sys, "executable", "/bin/false")
    worker = main.Worker()
    assert worker.run(planning.Unit("a", "copy"), 10) == {"error": "the process ended"}
    worker.close()


RESULTS = {
    "ceiling/copy": {"rate": 4e12},
    "ceiling/matmul": {"rate": 800e12},
    "matmul/1024x1024x1024/bfloat16": {"us": 4.0, "torch_us": 5.0, "flops": 2 * 1024**3, "deviation": 0.0},
    "matvec/1x4096x4096/bfloat16": {"us": 10.0, "torch_us": 9.0, "bytes": 34e6, "deviation": 0.0},
    "attention/1x12x197x197x64/bfloat16": {"error": "out of memory"},
    "template/row/float32": {"good": False, "deviation": 0.5, "tolerance": 1e-5},
    "model/resnet50/float16/1/tilewright": {"ms": 1.0},
    "model/resnet50/float16/1/eager": {"ms": 4.0},
    "model/vit_b16/float16/1/tilewright": {"ms": 2.0},
    "model/vit_b16/float16/1/eager": {"ms": 2.0},
    "model/bert_base/bfloat16/1/tilewright": {"error": "differs from eager"},
    "model/bert_base/bfloat16/1/eager": {"ms": 1.0},
}


def test_summary(benchmark):
    found = benchmark("gpu_report").summary(RESULTS)
    assert found == pytest.approx(
        {
            "models/1/eager": 2.0,
            "matmul/ratio/least": 1.25,
            "matmul/ratio/mean": 1.25,
            "matvec/ratio/least": 0.9,
            "matvec/ratio/mean": 0.9,
            "matvec/bandwidth/least": 0.85,
        }
    )


def test_report(benchmark, tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": 1, "machine": {"gpu": "X"}, "results": RESULTS}))
    done = run("--report", "--state", str(tmp_path / "state.json"))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.startswith("gpu X\n")
    assert "copy bandwidth 4.00 TB/s" in text and "matmul rate 800 TFLOP/s" in text
    assert "1024x1024x1024/bfloat16" in text and "( 1.25x)" in text and "67%" in text and "85%" in text
    assert "template/row/float32: error 0.5, tolerance 1e-05" in text
    assert "4.000 ms ( 4.00x)" in text and "geometric mean at batch 1 against eager: 2.00x" in text
    assert "failed: attention/1x12x197x197x64/bfloat16: out of memory" in text
    assert "not measured:" in text

"""The CPU benchmark without timing: what it plans, how it goes on, its processes, its tables and its plot."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import tilewright

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "Zen 4", "instructions": "x86-64-v4", "threads": 2}


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("cpu_units")``: a module of the folder, which is no package of ours; run from the repository."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    return lambda name: import_module(f"benchmarks.{name}")


def timed(ms: float, *, turns: int = 3) -> dict:
    return {"ms": ms, "low": ms * 0.9, "high": ms * 1.2, "least": ms * 0.9, "calls": 9, "turns": [ms] * turns}


KERNELS = [
    {"kernel": "conv_a", "family": "convolution", "calls": 3, "seconds": 0.020, "flops": 3e9, "bytes": 1e6,
     "modules": ["inner.blocks.0", "inner.blocks.1"]},
    {"kernel": "add_b", "family": "loop", "calls": 2, "seconds": 0.004, "flops": 0, "bytes": 80e6, "modules": []},
    {"kernel": "conv_c", "family": "convolution", "calls": 1, "seconds": 0.012, "flops": 1e9, "bytes": 1e6,
     "modules": ["inner.stem"]},
]  # fmt: skip
LIMITS = {"float32": 200e9, "bfloat16": 400e9, "read": 40e9}
RESULTS = {
    "build/resnet50/fp32/1/reference": {"flops": 8e9, "weight_bytes": 100 << 20},
    "build/resnet50/fp32/1/tilewright": {"seconds": 6.0, "bytes": 98 << 20},
    "build/resnet50/fp32/1/aotinductor": {"seconds": 24.0, "bytes": 99 << 20},
    "time/resnet50/fp32/1": {
        "systems": {
            "tilewright": timed(50.0),
            "eager": timed(80.0),
            "aotinductor": {"error": "the process ended"},
            "onnxruntime": timed(40.0),
        },
        "limits": LIMITS,
        "kernels": KERNELS,
    },
    "start/resnet50/fp32/1": {
        "python": {"seconds": 0.1, "low": 0.1, "high": 0.1, "peak_bytes": 30 << 20},
        "systems": {
            "tilewright": {"seconds": 0.2, "low": 0.2, "high": 0.3, "peak_bytes": 150 << 20},
            "eager": {"error": "no output in 300 s"},
            "onnxruntime": {"seconds": 0.4, "low": 0.4, "high": 0.5, "peak_bytes": 200 << 20},
        },
    },
    "build/gpt2/fp32/8/reference": {"flops": 4e9, "weight_bytes": 400 << 20},
    "time/gpt2/fp32/8": {
        "systems": {"tilewright": timed(100.0), "openvino": timed(130.0), "eager": timed(150.0)},
        "limits": LIMITS,
        "kernels": KERNELS,
    },
}


def test_plans_latencies_first_and_each_case_once(benchmark):
    units = benchmark("cpu_units")
    planned = units.cases(list(units.MODELS), ["fp32", "bf16"])
    assert len(set(planned)) == len(planned) == 2 * (2 * 7 - 1)  # the sentence encoder has one batch
    assert [case.latency for case in planned] == [True] * 14 + [False] * 12
    assert {*units.TRANSFORMERS, *units.CONVOLUTIONAL} == set(units.MODELS)
    assert set(benchmark("cpu_systems").LOADERS) == set(units.SYSTEMS)
    assert set(benchmark("cpu_build").BUILDERS) == {name for name, system in units.SYSTEMS.items() if system.builds}


def test_skips_what_is_not_installed(benchmark, monkeypatch):
    units, main = benchmark("cpu_units"), benchmark("cpu")
    monkeypatch.setattr(units, "find_spec", lambda name: None if name in ("openvino", "onnxscript") else object())
    found = main.skips(list(units.SYSTEMS), ["fp32"])
    assert found == {
        "onnxruntime": "onnxscript not installed (pip install 'tilewright[bench]')",
        "openvino": "openvino not installed (pip install 'tilewright[bench]')",
    }
    monkeypatch.setattr(units, "find_spec", lambda name: object())
    assert main.skips(list(units.SYSTEMS), ["fp32"]) == {}
    assert main.skips(list(units.SYSTEMS), ["fp32", "bf16"]) == {
        "onnxruntime": "in bf16: it has no bfloat16 kernels for CPUs"
    }


def bench_of(benchmark, tmp_path, monkeypatch, *, seconds: float = 1e9):
    """A bench whose stages only say that they were run."""
    measuring, states = benchmark("cpu_measure"), benchmark("state")
    ran = []

    def stage(name):
        def run(self, case, systems, built, folder):
            ran.append(f"{name} {case.name}")
            return {"systems": {system: {} for system in systems}}

        return run

    def build(self, case, what, folder):
        ran.append(f"build {case.name} {what}")
        return {"error": "too large"} if what == "inductor" else {"seconds": 1.0, "flops": 1e3}

    monkeypatch.setattr(measuring.Bench, "time", stage("time"))
    monkeypatch.setattr(measuring.Bench, "start", stage("start"))
    monkeypatch.setattr(measuring.Bench, "_build", build)
    state = states.State.open(tmp_path / "state.json", MACHINE)
    deadline = measuring.time.monotonic() + seconds
    return measuring.Bench(state, tmp_path / "work", 2, 0.1, 3, 3, deadline), ran


def test_goes_on_where_it_ended(benchmark, tmp_path, monkeypatch):
    case, systems = benchmark("cpu_units").Case("mlp", "fp32", 1), ["tilewright", "inductor"]
    bench, ran = bench_of(benchmark, tmp_path, monkeypatch)
    bench.run(case, systems)
    name = "mlp/fp32/1"
    builds = [f"build {name} {what}" for what in ("reference", "tilewright", "inductor")]
    assert ran == [*builds, f"time {name}", f"start {name}"]
    assert not (tmp_path / "work" / name).exists()
    again, ran = bench_of(benchmark, tmp_path, monkeypatch)
    again.run(case, systems)
    assert ran == []
    again.run(case, [*systems, "eager"])  # numbers of several runs are not mixed
    assert ran[-2:] == [f"time {name}", f"start {name}"]
    assert again.not_built(case, "inductor") == {"error": "not built: too large"}
    benchmark("cpu").forget(again.state, [case], tmp_path / "work")
    assert again.state.results == {}


def test_starts_python_alone_beside_the_systems(benchmark, tmp_path, monkeypatch):
    case, measuring = benchmark("cpu_units").Case("mlp", "fp32", 1), benchmark("cpu_measure")
    start = measuring.Bench.start
    bench, _ = bench_of(benchmark, tmp_path, monkeypatch)
    seconds = {"python": 0.1, "tilewright": 0.2, "buffers": 0.15, "eager": 0.4}
    monkeypatch.setattr(measuring.Bench, "start_one", lambda self, case, name, folder: (seconds[name], 1 << 20))
    found = start(bench, case, ["tilewright"], ["tilewright"], tmp_path)
    assert found["python"]["seconds"] == 0.1
    assert {name: item["seconds"] for name, item in found["systems"].items()} == {"tilewright": 0.15}  # without numpy
    assert found["tilewright_numpy"]["seconds"] == 0.2
    assert start(bench, case, ["eager"], ["eager"], tmp_path).keys() == {"python", "systems"}


def test_keeps_artifacts_of_a_case_that_was_cut_off(benchmark, tmp_path, monkeypatch):
    case, measuring = benchmark("cpu_units").Case("mlp", "fp32", 8), benchmark("cpu_measure")
    bench, ran = bench_of(benchmark, tmp_path, monkeypatch, seconds=measuring.BUILD_SECONDS + 5)
    monkeypatch.setattr(measuring, "USUAL_RATES", {"fp32": 1.0})
    with pytest.raises(measuring.OutOfTime):
        bench.run(case, ["tilewright"])
    assert ran == ["build mlp/fp32/8 reference", "build mlp/fp32/8 tilewright"]
    (tmp_path / "state.json").unlink()  # what was built is known without it
    again, ran = bench_of(benchmark, tmp_path, monkeypatch)
    again.run(case, ["tilewright"])
    assert again.state.results["build/mlp/fp32/8/reference"]["flops"] == 1e3
    assert ran == ["time mlp/fp32/8"]  # start-up is measured with the case for latency


def test_refuses_wrong_outputs(benchmark):
    measuring, values = benchmark("cpu_measure"), benchmark("values")
    assert measuring.judged({"deviation": 1e-5}, 1e-4) == {"deviation": 1e-5}
    assert "differ from eager PyTorch's by 0.2" in measuring.judged({"deviation": 0.2}, 1e-4)["error"]
    assert "differ" in measuring.judged({"deviation": float("nan")}, 1e-4)["error"]
    want = [np.array([1.0, -4.0], np.float32), np.array([2], np.int64)]
    assert values.deviation(want, [np.array([1.0, -3.0], np.float32), want[1]]) == 0.25
    assert np.isnan(values.deviation(want, [np.array([np.nan, -4.0], np.float32), want[1]]))
    with pytest.raises(ValueError, match="shape"):
        values.deviation(want, [want[0][:1], want[1]])


def test_a_process_loads_checks_takes_turns_and_profiles(benchmark, tmp_path):
    linear, x = torch.nn.Linear(40, 24).eval(), torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    tilewright.compile(linear, (x,), output=tmp_path / "model.tw", verify="off")
    values = benchmark("values")
    values.save_arrays(tmp_path / "inputs.npy", [x.numpy()])
    values.save_arrays(tmp_path / "outputs.npy", [linear(x).detach().numpy()])
    process = benchmark("process").Process("benchmarks.cpu_worker")
    try:
        request = {"system": "tilewright", "folder": str(tmp_path), "threads": 1, "precision": "fp32"}
        assert process.ask({"load": request}, 60)["deviation"] < 1e-5
        process.stop()
        assert process.ask({"turn": 0.0}, 0.3) == {"error": "no answer in 0 s"} and process.ended
    finally:
        process.close()
    process = benchmark("process").Process("benchmarks.cpu_worker")
    try:
        process.ask({"load": request}, 60)
        process.stop()
        process.resume()
        assert len(process.ask({"turn": 0.0}, 60)["times"]) == 1
        (kernel,) = process.ask({"profile": 2}, 60)["kernels"]
        assert kernel["family"] == "matmul" and kernel["flops"] == 2 * 3 * 40 * 24
        assert "KeyError" in process.ask({"nothing": 0}, 60)["error"] and process.ended
    finally:
        process.close()
    command = [sys.executable, "-m", "benchmarks.cpu_worker", "tilewright", str(tmp_path), "1", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    moment, peak = done.stdout.split()
    assert float(moment) > 0 and 5e6 < int(peak) < 500e6


def test_builds_in_children_of_one_process(benchmark, tmp_path):
    process = benchmark("process").Process("benchmarks.cpu_build")
    request = {"threads": 1, "folder": str(tmp_path), "target": "cpu:x86-64-v3", "precision": "fp32", "batch": 3}
    request |= {"model": "mlp", "environment": {"TILEWRIGHT_CACHE": "off"}}
    try:
        assert process.ask(request | {"what": "reference"}, 60)["flops"] > 0
        assert "KeyError" in process.ask(request | {"what": "nothing"}, 60)["failed"] and not process.ended
        built = process.ask(request | {"what": "tilewright"}, 60)
        assert built["seconds"] > 0 and built["bytes"] > 1000
    finally:
        process.close()
    (inputs,) = benchmark("values").load_arrays(tmp_path / "inputs.npy")
    (outputs,) = benchmark("values").load_arrays(tmp_path / "outputs.npy")
    with tilewright.load(tmp_path / "model.tw", threads=1) as model:
        assert inputs.shape[0] == 3 and model.target == "cpu:x86-64-v3"
        assert benchmark("values").deviation([outputs], benchmark("values").flatten(model(inputs))) < 1e-4


def test_limits_are_measured(benchmark, tmp_path):
    limits = benchmark("limits")
    found = limits.loops(limits.target_of(), tmp_path, reading=False)
    assert "float32" in found and all(loop.rate(1) > 0 for loop in found.values())


def test_statistics(benchmark):
    found = benchmark("cpu_measure").statistics_of([[0.001, 0.003], [0.002]])
    assert found == {"ms": 2.0, "low": 1.0, "high": 3.0, "least": 1.0, "calls": 3, "turns": [2.0, 2.0]}


def test_losses(benchmark):
    losing = benchmark("cpu_losses")
    found = losing.kernel_losses(KERNELS, LIMITS, "float32")
    assert [(loss.name, round(loss.bound_ms, 3), round(loss.lost_ms, 3)) for loss in found] == [
        ("conv_c", 5.0, 7.0),
        ("conv_a", 15.0, 5.0),
        ("add_b", 2.0, 2.0),
    ]
    families = losing.family_losses(found)
    assert [(loss.name, loss.calls, round(loss.lost_ms, 3)) for loss in families] == [
        ("convolution", 4, 12.0),
        ("loop", 2, 2.0),
    ]
    text = list(losing.describe_losses(KERNELS, LIMITS, "float32", ms=40.0, gap_ms=3.0))
    assert "convolution" in text[0] and "62% of the limit, loses   12.000 ms" in text[0]
    assert text[2].split() == ["between", "the", "kernels", "4.000", "ms"]
    assert text[3].strip().startswith("conv_c: 1 x") and text[3].endswith("(stem)")
    assert len(text) == 4  # conv_c alone makes up for twice the gap
    assert list(losing.describe_losses([], LIMITS, "float32", 1.0, 0.1)) == ["  its kernels were not profiled"]


def test_report(benchmark):
    units, reporting = benchmark("cpu_units"), benchmark("cpu_report")
    planned = [units.Case("resnet50", "fp32", 1), units.Case("gpt2", "fp32", 8), units.Case("unet", "fp32", 1)]
    text = reporting.report(MACHINE, RESULTS, planned, {"openvino": "openvino not installed"})
    assert text.startswith("cpu Zen 4, instructions x86-64-v4, threads 2\n")
    assert "8 Gop and 100 MiB of weights: 40 ms at the limit" in text
    rows = {line[:15].strip(): line for line in text.splitlines()}
    assert rows["ONNX Runtime"].split()[2:] == [
        "40.00",
        "36.00..48.00",
        "100%",
        "25.0",
        "0.80x",
        "-",
        "0.40",
        "s",
        "200",
        "-",
    ]
    assert "the process ended" in rows["AOTInductor"] and "start: no output in 300 s" in text
    assert "resnet50 fp32, batch 1: ONNX Runtime is faster (0.80x); 10.00 of 50.00 ms to find" in text
    assert "conv_c: 1 x" in text and "(blocks.0)" in text
    assert "gpt2 fp32, batch 8: " not in text  # nothing is faster there
    assert "skipped: OpenVINO: openvino not installed" in text
    assert "not measured: 1 of 3 cases; run again to go on (unet/fp32/1 is next)" in text
    assert "MISSED    0.80  (at least 1.15)  fp32 latency of convolutional networks" in text
    assert "reached   0.25  (at most 0.50)  fp32 compile time as a share of AOTInductor's: resnet50" in text


def test_goals(benchmark):
    units, judging = benchmark("cpu_units"), benchmark("cpu_goals")
    planned = [units.Case("resnet50", "fp32", 1), units.Case("gpt2", "fp32", 8), units.Case("unet", "fp32", 1)]
    rows = [
        {"name": "square 1024", "dtype": "float32", "threads": 2, "share": 0.96, "limit": 2e11, "blas_rate": 1.6e11},
        {"name": "vit 197 q/k/v", "dtype": "float32", "threads": 2, "share": 0.94, "limit": 1e11, "blas_rate": 5e10},
        {"name": "llama decode 2048 to 8192", "dtype": "float32", "threads": 2, "share": 0.4},
        {"name": "bf16 square 1024", "dtype": "bfloat16", "threads": 2, "share": 0.8},
    ]
    found = {
        goal.text: (round(goal.value, 3), goal.limit, goal.reached) for goal in judging.goals(RESULTS, planned, rows)
    }
    products = "large products on 2 threads, share of the limit, geometric mean of"
    assert found == {
        "fp32 latency of convolutional networks, geometric mean (resnet50 0.80 to onnxruntime)": (0.8, 1.15, False),
        "fp32 throughput of gpt2 to openvino": (1.3, 1.0, True),
        "fp32 compile time as a share of AOTInductor's: resnet50": (0.25, 0.5, True),
        "fp32 start-up as a share of the fastest peer's: resnet50 (Python and numpy alone 0.25)": (0.5, 0.5, True),
        "fp32 peak memory as a share of the leanest peer's: resnet50": (0.75, 1.0, True),
        f"float32 {products} 2 (least 0.94: vit 197 q/k/v; numpy's BLAS 0.63)": (0.95, 0.92, True),
        f"bfloat16 {products} 1 (least 0.80: bf16 square 1024)": (0.8, 0.85, False),
    }
    assert set(judging.LEAST_TRANSFORMERS) == set(judging.LEAST_CONVOLUTIONAL) == set(units.PRECISIONS)


def test_starts_without_numpy_stand_beside_those_with_it(benchmark):
    """Records before there were any have numpy's only, and say nothing of it."""
    case = benchmark("cpu_units").Case("resnet50", "fp32", 1)
    start = RESULTS["start/resnet50/fp32/1"]
    with_numpy = {"seconds": 0.3, "low": 0.3, "high": 0.3, "peak_bytes": 180 << 20}
    results = RESULTS | {"start/resnet50/fp32/1": start | {"tilewright_numpy": with_numpy}}
    texts = [goal.text for goal in benchmark("cpu_goals").goals(results, [case])]
    aside = "(without numpy; with it 0.75, Python and numpy alone 0.25)"
    assert f"fp32 start-up as a share of the fastest peer's: resnet50 {aside}" in texts
    assert "fp32 peak memory as a share of the leanest peer's: resnet50 (without numpy; with it 0.90)" in texts
    record = {"date": "2026-12-01", "machine": MACHINE, "goals": [], "results": results}
    text = benchmark("cpu_readme").section(record, "benchmarks/results/x.json")
    assert "| 0.80 | 0.20 (0.30) | 150 (180) |" in text and "a process without numpy" in text
    tables = benchmark("cpu_report").report(MACHINE, results, [case], {})
    assert "0.30 s  Tilewright with numpy arrays" in tables and "0.10 s  Python and numpy alone" in tables


def test_takes_part(benchmark):
    units, main = benchmark("cpu_units"), benchmark("cpu")
    systems = ["tilewright", "aotinductor", "eager"]
    assert main.taking_part(units.Case("unet", "fp32", 1), systems, units.BATCHED) == systems
    assert main.taking_part(units.Case("unet", "fp32", 8), systems, units.BATCHED) == ["tilewright", "eager"]
    every = list(units.SYSTEMS)
    assert "onnxruntime" not in main.taking_part(units.Case("unet", "bf16", 8), every, every)


def test_rounds_fit_a_case(benchmark, tmp_path):
    measuring, units = benchmark("cpu_measure"), benchmark("cpu_units")
    results = {"build/unet/fp32/1/reference": {"flops": 1e8}, "build/vit_b16/fp32/8/reference": {"flops": 280e9}}
    state = benchmark("state").State(tmp_path / "state.json", MACHINE, results)
    bench = measuring.Bench(state, tmp_path, 2, 0.3, 8, 7, 1e9)
    assert bench.rounds_of(units.Case("unet", "fp32", 1), 6) == 8
    assert bench.rounds_of(units.Case("vit_b16", "fp32", 8), 6) == measuring.FEWEST_ROUNDS
    assert bench.environment(tmp_path, "eager")["OMP_NUM_THREADS"] == "2"
    assert bench._build(units.Case("unet", "fp32", 1), "eager", tmp_path) == {}  # nothing to build, so no process


def test_a_target_restricts_tilewright_alone(benchmark, tmp_path, monkeypatch, capsys):
    main = benchmark("cpu")
    target = ["--target", "cpu:x86-64-v3", "--state", str(tmp_path / "state.json")]
    monkeypatch.setattr(sys, "argv", ["cpu", *target, "--systems", "tilewright,eager"])
    assert main.main() == 2 and "no other system" in capsys.readouterr().err
    measured = []
    monkeypatch.setattr(main, "measure", lambda bench, planned, systems, batched: measured.append((bench, systems)))
    monkeypatch.setattr(sys, "argv", ["cpu", *target, "--models", "mlp", "--output", str(tmp_path / "out")])
    main.main()
    ((bench, systems),) = measured
    assert systems == ["tilewright"] and bench.target == "cpu:x86-64-v3"
    assert bench.state.machine["target"] == "cpu:x86-64-v3"  # its numbers go to a state of their own
    assert [path.name[10:] for path in (tmp_path / "out").iterdir()] == ["-cpu-systems-x86-64-v3.json"]
    limits = benchmark("limits")
    assert set(limits.loops(limits.target_of("cpu:x86-64-v3"), tmp_path, reading=False)) == {"float32", "int8"}


def test_reports_a_state_file(benchmark, tmp_path, monkeypatch, capsys):
    main = benchmark("cpu")
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"format": 1, "machine": MACHINE, "results": RESULTS}))
    arguments = ["cpu", "--report", "--state", str(state), "--output", str(tmp_path / "out"), "--models", "resnet50"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert main.main() == 0
    record = json.loads(capsys.readouterr().out)
    (written,) = (tmp_path / "out").glob("*-cpu-systems.json")
    assert json.loads(written.read_text()) == record and record["results"] == RESULTS
    monkeypatch.setattr(sys, "argv", ["cpu", "--report", "--state", str(tmp_path / "none.json")])
    assert main.main() == 2 and "nothing was measured" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cpu", "--systems", "openvno"])
    with pytest.raises(SystemExit, match="2"):
        main.main()


def test_plot(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    units, plotting = benchmark("cpu_units"), benchmark("cpu_plot")
    planned = [units.Case("resnet50", "fp32", 1), units.Case("gpt2", "fp32", 8)]
    assert plotting.plot(RESULTS, planned, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not plotting.plot({}, planned, tmp_path / "none.png")


def test_the_readme_shows_the_newest_records(benchmark):
    writing = benchmark("cpu_readme")
    goals = [{"reached": True}, {"reached": False}]
    record = {"date": "2026-11-21", "machine": MACHINE, "goals": goals, "results": RESULTS}
    text = writing.section(record, "benchmarks/results/x.json")
    assert "| resnet50 | fp32 | 50 | 40 (ONNX Runtime) | 0.80 | 0.20 | 150 |" in text
    assert "| gpt2 | fp32 | 100 | 130 (OpenVINO) | 1.30 |" in text and "(benchmarks/results/x.png)" in text
    assert "Of 2 goals 1 are reached." in text
    readme = (ROOT / "README.md").read_text()
    again = writing.replaced(readme, text)
    assert text in again and writing.replaced(again, text) == again and again.endswith(readme[-500:])
    with pytest.raises(ValueError, match="README"):
        writing.replaced("nothing", text)
    # What is shown is what was measured.
    assert writing.replaced(readme, writing.sections(writing.newest())) == readme

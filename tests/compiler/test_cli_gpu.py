"""GPU targets on the command line, without a GPU: what is compiled, shown, run in the interpreter, and refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tilewright.codegen.triton.pool import find_triton
from tilewright.compiler.cli import cli
from tilewright.runtime.cuda import tune as tuning
from tilewright.runtime.cuda.probe import gpus_present
from tilewright.runtime.cuda.tune import Measured
from tilewright.runtime.errors import TilewrightError
from tilewright.runtime.gpus import Gpu

GPU = ("name", "major", "minor")

SOURCES = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 8)

    def forward(self, x):
        return self.head(self.norm(x).sin())

def small():
    return Small().eval(), (torch.linspace(-1, 1, 72).reshape(3, 24),)

def other():
    module = Small().eval()
    nn.init.normal_(module.head.weight)
    return module, (torch.linspace(-1, 1, 72).reshape(3, 24),)

class Strange(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x)

def strange():
    return Strange().eval(), (torch.eye(3),)
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def answer(*arguments: object) -> Any:
    return json.loads(succeed(*arguments, "--json").stdout)


def has_gpu() -> bool:
    try:
        return bool(gpus_present())
    except TilewrightError:
        return False


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "nets.py"
    path.write_text(SOURCES)
    return path


@pytest.fixture(scope="module")
def both(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for a GPU and a CPU."""
    path = tmp_path_factory.mktemp("both") / "both.tw"
    succeed("compile", f"{sources}:small", "-o", path, "--target", "cuda:sm_80,cpu:x86-64-v3", "-q")
    return path


@pytest.fixture(scope="module")
def gpu(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for GPUs alone."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.tw"
    succeed("compile", f"{sources}:small", "-o", path, "--target", "cuda:sm_80", "-q")
    return path


@pytest.fixture(scope="module")
def cpu(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for CPUs alone."""
    path = tmp_path_factory.mktemp("cpu") / "cpu.tw"
    succeed("compile", f"{sources}:small", "-o", path, "--target", "cpu:x86-64-v3", "-q")
    return path


@pytest.fixture(scope="module")
def x(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("x") / "x.npy"
    array = np.linspace(-1, 1, 72, dtype=np.float32).reshape(3, 24)
    np.save(path, array)
    return path, array


def test_compile_reports_both_kinds_of_device(sources, tmp_path):
    target = ("--target", "cuda:sm_80,cpu:x86-64-v3", "-q")
    found = answer("compile", f"{sources}:small", "-o", tmp_path / "m.tw", *target)
    assert found["targets"] == ["cpu:x86-64-v3", "cuda:sm_80"]
    assert set(found["steps"]) == {"main", "main.cuda"} == set(found["passes"]) == set(found["memory"])
    assert {item["device"] for item in found["errors"]} == {"cpu", "cuda"} and all(i["ok"] for i in found["errors"])
    assert found["verification"] == {"cuda": {"device_run": has_gpu()}} and not found["not_applied"]
    text = succeed("compile", f"{sources}:small", "-o", tmp_path / "m.tw", *target).stdout
    assert "main (cuda): output differs from PyTorch" in text
    assert has_gpu() or "GPU kernels were not run, as no GPU for them is here" in text


def test_inspect_shows_every_tile(both):
    tiles = answer("inspect", both, "kernels", "--device", "cuda")["tiles"]
    assert {tile["architecture"] for tile in tiles} == {"sm_80"}
    usable = [tile for tile in tiles if not tile["rejected"]]
    assert all(tile["registers"] > 0 and tile["spills"] == 0 for tile in usable)
    text = succeed("inspect", both, "kernels").stdout
    assert "Kernels of main" in text and "Kernels of main.cuda" in text
    assert "registers  shared memory  spills" in text and usable[0]["tile"] in text


@pytest.mark.parametrize("section", ["overview", "graph", "plan", "memory", "passes", "weights"])
def test_inspect_sections_show_both_plans(both, gpu, section):
    if section != "weights":
        text = succeed("inspect", both, section).stdout
        assert "main.cuda" in text
        assert "main.cuda" not in succeed("inspect", both, section, "--device", "cpu").stdout
    assert succeed("inspect", gpu, section).stdout
    assert answer("inspect", both, section)


def test_inspect_overview_says_what_was_not_run(gpu):
    text = succeed("inspect", gpu).stdout
    assert "target cuda:sm_80: " in text and "by Triton 3." in text
    assert has_gpu() or "(the device was not run)" in text


def test_inspect_shows_a_kernels_source_for_each_target(both):
    kernels = answer("inspect", both, "kernels")["entries"]
    for name, target, word in (("main", "cpu:x86-64-v3", "void {}("), ("main.cuda", "cuda:sm_80", "def {}(")):
        kernel = kernels[name]["kernels"][0]["kernel"]
        source = succeed("inspect", both, "kernel", kernel, "--target", target).stdout
        assert word.format(kernel) in source
        found = answer("inspect", both, "kernel", kernel, "--target", target)
        assert found["source"] == source and name in {step["entry"] for step in found["steps"]}


def test_the_cpu_and_the_interpreter_agree(both, x, tmp_path):
    results = []
    for device in ("cpu", "interpreter"):
        found = answer("run", both, x[0], "--device", device, "-o", tmp_path / "y.npy")
        assert found["outputs"][0]["shape"] == [3, 8]
        results.append(np.load(tmp_path / "y.npy"))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-5)


def test_verify_in_the_interpreter(gpu, sources):
    found = answer("verify", gpu, f"{sources}:small", "--device", "interpreter", "--kernels", "-q")
    assert found["outputs"] and all(item["ok"] and item["device"] == "cuda" for item in found["outputs"])
    assert found["kernels"] and all(item["ok"] for item in found["kernels"])
    wrong = call("verify", gpu, f"{sources}:other", "--device", "interpreter", "--kernels", "-q")
    assert wrong.exit_code == 4 and "DIFFERS" in wrong.stdout


def test_check_lists_what_gpus_lack(sources):
    assert "every operator is supported" in succeed("compile", f"{sources}:small", "--check", "-q", "--target",
                                                    "cuda:sm_90").stdout  # fmt: skip
    result = call("compile", f"{sources}:strange", "--check", "-q", "--target", "cuda:sm_90,cpu:x86-64-v3", "--json")
    assert result.exit_code == 3
    unsupported = json.loads(result.stdout)["unsupported"]
    assert {item["device"] for item in unsupported} == {"cpu", "cuda"}
    refused = call("compile", f"{sources}:strange", "-o", "o.tw", "-q", "--target", "cuda:sm_90")
    assert refused.exit_code == 3 and "not supported for cuda" in refused.stderr


WRONG = [
    (("compile", "{source}", "-o", "{out}", "--target", "cuda:sm_70", "-q"), 2, "unknown target 'cuda:sm_70'"),
    (("compile", "{source}", "-o", "{out}", "--target", "cuda:90", "-q"), 2, "cuda:sm_90"),
    (("compile", "{source}", "-o", "{out}", "--target", "rocm", "-q"), 2, "rocm"),
    (("compile", "{source}", "-o", "{out}", "--ptx", "-q"), 2, "--ptx is for GPUs"),
    (("compile", "{source}", "-o", "{out}", "--ptx", "--target", "cuda:sm_90", "-q"), 2, "--ptx"),
    (("compile", "{source}", "-o", "{out}", "--precision", "fp16", "-q"), 2, "auto, fp32 or bf16"),
    (("compile", "{source}", "-o", "{out}", "--target", "cpu,cuda:sm_90", "--precision", "tf32", "-q"), 2, "alone"),
    (("run", "{both}", "{x}", "--device", "gpu"), 2, "cuda:<number>"),
    (("run", "{both}", "{x}", "--device", "interpreter", "--threads", "2"), 2, "threads"),
    (("run", "{cpu}", "{x}", "--device", "interpreter"), 5, "compile the model with --target cuda"),
    (("run", "{cpu}", "{x}", "--device", "cuda"), 5, "compile the model with --target cuda"),
    (("run", "{gpu}", "{x}", "--device", "cpu"), 5, "compile the model with --target cpu"),
    (("bench", "{gpu}", "--device", "cpu"), 5, "compile the model with --target cpu"),
    (("inspect", "{gpu}", "--device", "cpu"), 2, "nothing for cpu"),
    (("tune", "{cpu}", "-q"), 5, "nothing to measure"),
    (("tune", "{gpu}", "--device", "cpu", "-q"), 2, "is no GPU"),
    (("tune", "{gpu}", "--entry", "second", "-q"), 2, "second"),
    (("tune", "{gpu}", "--shape", "batch=2", "-q"), 2, "all its sizes are fixed"),
    (("inspect", "{both}", "kernel", "none", "--target", "cuda:sm_80"), 2, "no kernel 'none'"),
    (("inspect", "{both}", "kernel", "none", "--target", "cuda:sm_90"), 2, "no target 'cuda:sm_90'"),
]


@pytest.mark.parametrize(("arguments", "code", "named"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_input_gives_one_clear_message(arguments, code, named, sources, both, gpu, cpu, x, tmp_path):
    places = {"source": f"{sources}:small", "both": both, "gpu": gpu, "cpu": cpu, "x": x[0], "out": tmp_path / "o.tw"}
    result = call(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert result.stderr.count("error: ") == 1 and named in result.stderr
    assert "Traceback" not in result.stderr and not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("run", "{both}", "{x}", "--device", "cuda"), 2),
        (("run", "{gpu}", "{x}"), 5),
        (("bench", "{gpu}", "--device", "cuda:1"), 2),
        (("tune", "{gpu}", "-q"), 2),
        (("verify", "{gpu}", "{source}", "--device", "cuda", "-q"), 2),
        (("compile", "{source}", "-o", "{out}", "--target", "cuda", "-q"), 2),
    ],
)
def test_a_machine_without_a_gpu_says_so(arguments, code, sources, both, gpu, x, tmp_path):
    places = {"source": f"{sources}:small", "both": both, "gpu": gpu, "x": x[0], "out": tmp_path / "o.tw"}
    result = call(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert "NVIDIA driver" in result.stderr or "no GPU" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def test_auto_runs_on_the_cpu_where_no_gpu_fits(both, x):
    found = answer("run", both, x[0])
    assert found["outputs"][0]["name"] == "output"


def test_a_damaged_table_of_binaries_is_named(both, tmp_path):
    damaged = Path(shutil.copytree(both, tmp_path / "damaged.tw"))
    table = damaged / "kernels" / "sm_80" / "binaries.json"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    for command in (("inspect", damaged, "kernels"), ("verify", damaged, "--integrity")):
        result = call(*command)
        assert result.exit_code == 5 and "binaries.json" in result.stderr


def test_without_triton_it_says_what_to_install(sources, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    find_triton.cache_clear()
    try:
        result = call("compile", f"{sources}:small", "-o", tmp_path / "o.tw", "--target", "cuda:sm_90", "-q")
    finally:
        find_triton.cache_clear()
    assert result.exit_code == 1 and "pip install 'tilewright[compile]'" in result.stderr


def test_doctor_lists_gpus_and_their_targets():
    found = answer("doctor")["gpus"]
    assert "cuda:sm_90" in found["targets"]
    assert bool(found["devices"]) == has_gpu() and (found["error"] is None or "driver" in found["error"])
    text = succeed("doctor").stdout
    assert "targets, which need no GPU to compile for: cuda:sm_80" in text and "triton" in text


def test_tune_shows_what_it_measured(gpu, monkeypatch):
    """The measuring itself needs a GPU; its tests are the runtime's, with a driver that is faked."""
    present = Gpu("NVIDIA H200", 9, 0, **{item.name: 1 for item in fields(Gpu) if item.name not in GPU})
    found = Measured("main", 0, "matmul_a", {"n": 3}, {"64x64": 2e-6, "32x32": 1e-6}, "64x64", "32x32")
    monkeypatch.setattr(tuning, "tune", lambda path, **how: tuning.Tuning(present, (found,), Path(path) / "tuned.json"))
    lines = succeed("tune", gpu, "-q").stdout.splitlines()
    assert "measured on NVIDIA H200 (compute capability 9.0); recorded in" in lines[0]
    assert lines[2].split()[2:] == ["matmul_a", "n=3", "2", "64x64", "2.0", "us", "32x32", "1.0", "us", "2.00"]
    assert answer("tune", gpu, "-q")["measured"][0]["best"] == "32x32"


def test_precision_is_recorded(sources, tmp_path):
    succeed(
        "compile", f"{sources}:small", "-o", tmp_path / "m.tw", "--target", "cuda:sm_80", "--precision", "tf32", "-q"
    )
    info = answer("inspect", tmp_path / "m.tw")["info"]
    assert info["precision"] == {"requested": "tf32", "applied": "tf32"}

"""The commands in process: what they print, what they write, and the exit code and one clear line for wrong input."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tilewright.compiler.cli import cli
from tilewright.runtime.model import load

SOURCES = """
import torch
from torch import nn
from tilewright.models import mlp

class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.types = nn.Embedding(5, 4), nn.Embedding(1, 4)

    def forward(self, ids, types, x):
        rows = self.table(ids) + self.types(types)
        return {"rows": rows, "pair": (x.relu(), x.shape[0]), "none": None}

def lookup():
    print("a model's own code may print")
    torch.manual_seed(0)
    ids = torch.zeros(3, dtype=torch.int64)
    return Lookup().eval(), (ids, ids.clone(), torch.ones(3, 2)), {}, {"ids": "n:1..8", "types": "n", "x": "n,2"}

def other_weights():
    return mlp.build(seed=1), mlp.example()[0], {}, {"x": "batch:1..64,128"}

class Strange(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x) + torch.linalg.inv(x).sum()

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
    """The JSON document, which is all of standard output."""
    return json.loads(succeed(*arguments, "--json").stdout)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "sources.py"
    path.write_text(SOURCES)
    return path


@pytest.fixture(scope="session")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlp") / "mlp.tw"
    succeed("compile", "mlp", "-o", path, "-q")
    return path


@pytest.fixture(scope="session")
def lookup(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lookup") / "lookup.tw"
    succeed("compile", f"{sources}:lookup", "-o", path, "-q")
    return path


@pytest.fixture
def x(tmp_path: Path) -> tuple[Path, np.ndarray]:
    array = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    return tmp_path / "x.npy", array


def test_compile_reports_what_it_made(tmp_path, sources):
    found = answer("compile", f"{sources}:lookup", "-o", tmp_path / "out.tw", "--target", "cpu,cpu:x86-64-v3")
    assert found["path"] == str(tmp_path / "out.tw")
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out.tw").rglob("*") if file.is_file())
    assert [target for target in found["targets"] if target == "cpu:x86-64-v3"]
    assert {item["output"] for item in found["errors"]} and all(item["ok"] for item in found["errors"])
    assert list(found["seconds"]) == ["capture", "passes", "lower", "kernels", "write", "verify"]
    assert found["passes"]["main"][0]["pass"] == "01_widen_floats"
    assert [case["at"] for case in found["memory"]["main"]] == ["smallest", "sample", "largest"]
    assert found["not_applied"] == []


def test_compile_takes_shapes_samples_and_disabled_passes(tmp_path):
    np.savez(tmp_path / "sample.npz", x=np.ones((2, 128), np.float32))
    output, dump = tmp_path / "small.tw", tmp_path / "dump"
    options = ("--shape", "x=rows:1..3,128", "--inputs", tmp_path / "sample.npz", "--disable-pass", "fold_scales")
    result = succeed("compile", "mlp", "-o", output, *options, "--dump-dir", dump)
    assert "differs from PyTorch by" in result.stdout and "scratch of main" in result.stdout
    assert "kernels" in result.stderr  # progress, a line per phase
    overview = answer("inspect", output)
    assert overview["info"]["disabled_passes"] == ["fold_scales"]
    (symbol,) = overview["entries"]["main"]["symbols"]
    assert (symbol["name"], symbol["minimum"], symbol["maximum"]) == ("rows", 1, 3)
    assert (dump / "passes.json").is_file()
    # the sizes to verify at stay inside of what was compiled, though the registry's model takes more
    assert {item["sizes"]["rows"] for item in answer("verify", output, "-q")["outputs"]} == {1, 2, 3}


def test_stop_after_writes_no_artifact(tmp_path):
    result = succeed("compile", "mlp", "-o", tmp_path / "no.tw", "--stop-after", "canonicalize")
    assert "canonicalize" in result.stdout and "no artifact" in result.stderr
    assert not (tmp_path / "no.tw").exists()
    assert answer("compile", "mlp", "--stop-after", "fold_scales", "-q")["stopped_after"] == "fold_scales"


def test_check_lists_everything_that_is_unsupported(sources):
    assert "supported" in succeed("compile", "mlp", "--check", "-q").stdout
    result = call("compile", f"{sources}:strange", "--check", "-q", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert not found["supported"] and len(found["unsupported"]) >= 2
    assert all("sources.py:" in item["source"] for item in found["unsupported"])
    text = call("compile", f"{sources}:strange", "--check", "-q")
    assert text.exit_code == 3 and "det" in text.stdout and "inv" in text.stdout
    refused = call("compile", f"{sources}:strange", "-o", "never.tw", "-q")
    assert refused.exit_code == 3 and "det" in refused.stderr and not Path("never.tw").exists()


def test_run_gives_what_the_model_gives(mlp, x, tmp_path):
    path, array = x
    with load(mlp) as model:
        expected = model(array)
    for inputs in ((path,), (f"x={path}",), (path.with_suffix(".npz"),), ("--input", f"x={path}")):
        succeed("run", mlp, *inputs, "-o", tmp_path / "y.npz")
        with np.load(tmp_path / "y.npz") as saved:
            np.testing.assert_array_equal(saved["output"], expected)
    result = succeed("run", mlp, path, "-o", tmp_path / "y.npy", "--threads", "1")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
    assert "output  float32  [3, 10]" in result.stdout


def test_run_shows_results_that_are_no_tensors(lookup, tmp_path):
    arrays = {"ids": np.array([0, 4]), "types": np.array([0, 0]), "x": np.ones((2, 2), np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)
    found = answer("run", lookup, tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert found["values"] == {"result['pair'][1]": 2, "result['none']": None}
    assert [item["shape"] for item in found["outputs"]] == [[2, 4], [2, 2]]
    with np.load(tmp_path / "out.npz") as saved:
        assert sorted(saved.files) == sorted(item["name"] for item in found["outputs"])


def test_bench_times_calls_and_kernels(mlp, x):
    found = answer("bench", mlp, "--shape", "batch=8", "--repeat", 5, "--threads", 1)
    assert found["sizes"] == {"batch": 8} and found["threads"] == 1
    latency = found["latency"]
    assert latency["calls"] == 5
    assert 0 < latency["smallest"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
    assert sum(item["calls"] for item in found["kernels"]) == 3
    assert sum(item["flops"] for item in found["kernels"]) >= 2 * 8 * (128 * 256 + 256 * 256 + 256 * 10)
    text = succeed("bench", mlp, "--inputs", x[0].with_suffix(".npz"), "--repeat", 3)
    assert "batch=3" in text.stdout and "GFLOP/s" in text.stdout and "%" in text.stdout


def test_bench_makes_up_indices_that_are_legal(lookup):
    found = answer("bench", lookup, "--repeat", 2)
    assert "0 for types" in found["inputs"] and "1 for ids" in found["inputs"]  # types has one row only


def test_inspect_sections(mlp):
    overview = succeed("inspect", mlp).stdout
    assert "x: float32[batch, 128]" in overview and "batch 1..64" in overview
    assert "layers.0.bias" in succeed("inspect", mlp, "graph").stdout
    assert "fuse_operators" in succeed("inspect", mlp, "passes").stdout
    assert "batch = axis 0 of x, 1..64" in succeed("inspect", mlp, "plan").stdout
    assert "layers.0.weight" in succeed("inspect", mlp, "weights").stdout
    memory = answer("inspect", mlp, "memory", "--shape", "batch=7")["entries"]["main"]["scratch"]
    assert [case["at"] for case in memory] == ["smallest", "sample", "largest", "asked"]
    assert all(case["bound"] <= case["peak"] <= case["total"] for case in memory)
    kernels = answer("inspect", mlp, "kernels")["entries"]["main"]["kernels"]
    assert sum(len(item["steps"]) for item in kernels) == 3 and all(item["flops"] for item in kernels)
    weights = answer("inspect", mlp, "weights")["tensors"]
    assert {source for item in weights for source in item["sources"]} >= {"layers.0.weight", "layers.2.bias"}
    assert all(item["kernels"] for item in weights)


def test_inspect_shows_a_kernels_source(mlp):
    name = answer("inspect", mlp, "kernels")["entries"]["main"]["kernels"][0]["kernel"]
    source = succeed("inspect", mlp, "kernel", name).stdout
    assert f"void {name}(" in source
    found = answer("inspect", mlp, "kernel", name)
    assert found["source"] == source and found["steps"][0]["step"] == 0


def test_verify_outputs_and_kernels(mlp, sources):
    found = answer("verify", mlp, "--kernels", "--integrity", "-q")
    assert {item["sizes"]["batch"] for item in found["outputs"]} == {1, 2, 5}
    assert [item["step"] for item in found["kernels"]] == [0, 1, 2] and found["kernels_not_compared"] == 0
    assert found["integrity"]["ok"]
    assert "ok" in succeed("verify", mlp, "-q").stdout
    wrong = call("verify", mlp, f"{sources}:other_weights", "--kernels", "-q")
    assert wrong.exit_code == 4
    assert "DIFFERS" in wrong.stdout and "the first is step 0" in wrong.stderr


def test_verify_finds_damaged_weights(mlp, tmp_path):
    damaged = Path(shutil.copytree(mlp, tmp_path / "damaged.tw"))
    content = bytearray((damaged / "weights.safetensors").read_bytes())
    content[-1000] ^= 1
    (damaged / "weights.safetensors").write_bytes(content)
    result = call("verify", damaged, "--integrity")
    assert result.exit_code == 5 and "weights.safetensors" in result.stderr and not result.stdout


def test_a_flipped_byte_in_code_stops_run(mlp, x, tmp_path):
    damaged = Path(shutil.copytree(mlp, tmp_path / "damaged.tw"))
    (library,) = damaged.glob("kernels/*/model.so")
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    result = call("run", damaged, x[0])
    assert result.exit_code == 5 and "model.so" in result.stderr


def test_doctor(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    found = answer("doctor", "--build")
    assert found["cache"]["directory"] == str(tmp_path / "cache")
    assert next(item for item in found["packages"] if item["name"] == "torch")["version"] == version("torch")
    assert sum(target["chosen"] for target in found["targets"]) == 1
    assert {"gcc", "clang", "zig"} & {item["kind"] for item in found["compilers"]}
    assert all(item["build"] == "ok" for item in found["compilers"])
    assert {item["name"] for item in found["environment"]} >= {"TILEWRIGHT_CC", "TILEWRIGHT_DEBUG"}
    assert "No problems found" in succeed("doctor").stdout


def test_doctor_names_problems_with_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CC", "no-such-compiler")
    monkeypatch.setenv("TILEWRIGHT_CACHE_SIZE", "plenty")
    found = answer("doctor")
    problems = {item["what"]: item["remedy"] for item in found["problems"]}
    assert any("no-such-compiler" in what for what in problems)
    assert any("plenty" in what for what in problems) and all(problems.values())


def test_doctor_fails_where_nothing_can_run(monkeypatch):
    from tilewright.runtime import cpu

    monkeypatch.setattr(cpu, "features", lambda: frozenset({"sse2"}))
    result = call("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["serious"]


def test_help_and_version():
    assert call("--version").stdout.startswith("tilewright 0.")
    assert call().stdout == call("--help").stdout
    for name in cli.commands:
        text = succeed(name, "--help").stdout
        assert "Examples:" in text and f"tilewright {name}" in text


WRONG = [
    (("frobnicate",), 2, "frobnicate"),
    (("compile",), 2, "SOURCE"),
    (("compile", "mlp"), 2, "-o DIR"),
    (("compile", "mlp", "-o", "o.tw", "--verify", "maybe"), 2, "maybe"),
    (("compile", "mlpp", "-o", "o.tw", "-q"), 2, "did you mean the registered model mlp"),
    (("compile", "mlp", "-o", "o.tw", "--target", "cpu:pdp11", "-q"), 2, "pdp11"),
    (("compile", "mlp", "-o", "o.tw", "--shape", "x", "-q"), 2, "x"),
    (("compile", "mlp", "-o", "o.tw", "--shape", "y=batch:1..4,128", "-q"), 2, "'y'"),
    (("compile", "mlp", "-o", "o.tw", "--shape", "x=batch:9..4,128", "-q"), 2, "batch"),
    (("compile", "mlp", "-o", "o.tw", "--quantize", "int3", "-q"), 2, "choose int8, int4-g32"),
    (("compile", "mlp", "-o", "o.tw", "--activations", "int8", "-q"), 2, "add --quantize"),
    (("compile", "mlp", "-o", "o.tw", "--precision", "fp7", "-q"), 2, "fp7"),
    (("compile", "mlp", "-o", "o.tw", "--disable-pass", "fold_batchnorm", "-q"), 2, "fold_batch_norm"),
    (("compile", "mlp", "--stop-after", "nothing", "-q"), 2, "nothing"),
    (("compile", "mlp", "--check", "--stop-after", "canonicalize"), 2, "--check"),
    (("compile", "mlp", "-o", "{folder}", "-q"), 2, "not a Tilewright artifact"),
    (("compile", "{folder}/text.txt", "-o", "o.tw", "-q"), 2, "text.txt"),
    (("compile", "{folder}", "-o", "o.tw", "-q"), 2, "config.json"),
    (("compile", "mlp", "-o", "o.tw", "--inputs", "{folder}/text.txt", "-q"), 2, "text.txt"),
    (("compile", "mlp", "-o", "o.tw", "--inputs", "{folder}/truncated.npz", "-q"), 2, "truncated.npz"),
    (("run", "nowhere.tw"), 5, "nowhere.tw"),
    (("run", "{folder}"), 5, "manifest.json"),
    (("run", "{mlp}"), 2, "x: float32[batch, 128]"),
    (("run", "{mlp}", "{folder}/none.npy"), 2, "none.npy"),
    (("run", "{mlp}", "{folder}/text.txt"), 2, "text.txt"),
    (("run", "{mlp}", "{folder}/truncated.npz"), 2, "truncated.npz"),
    (("run", "{mlp}", "{folder}/objects.npy"), 2, "objects.npy"),
    (("run", "{mlp}", "z={folder}/x.npy"), 2, "'z'"),
    (("run", "{mlp}", "{folder}/x.npy", "x={folder}/x.npy"), 2, "twice"),
    (("run", "{mlp}", "{folder}/double.npy"), 1, "float64"),
    (("run", "{mlp}", "{folder}/wide.npy"), 1, "axis 1"),
    (("run", "{mlp}", "{folder}/many.npy"), 1, "1 to 64"),
    (("run", "{mlp}", "{folder}/x.npy", "-o", "y.txt"), 2, ".npz"),
    (("run", "{mlp}", "{folder}/x.npy", "-o", "{folder}/none/y.npz"), 2, "no folder"),
    (("run", "{mlp}", "{folder}/x.npy", "--entry", "second"), 2, "second"),
    (("run", "{mlp}", "{folder}/x.npy", "--threads", "0"), 2, "threads"),
    (("run", "{lookup}", "{folder}/lookup.npz"), 1, "index"),
    (("run", "{lookup}", "{folder}/x.npy"), 2, "one array"),
    (("bench", "{mlp}", "--shape", "batch"), 2, "batch=8"),
    (("bench", "{mlp}", "--shape", "rows=2"), 2, "rows"),
    (("bench", "{mlp}", "--shape", "batch=65"), 2, "1 to 64"),
    (("bench", "{mlp}", "--shape", "batch=2", "--inputs", "{folder}/x.npz"), 2, "--shape"),
    (("inspect", "{mlp}", "everything"), 2, "overview"),
    (("inspect", "{mlp}", "kernel"), 2, "kernels"),
    (("inspect", "{mlp}", "kernel", "../../../../etc/passwd"), 2, "no kernel"),
    (("inspect", "{mlp}", "plan", "name"), 2, "takes no name"),
    (("inspect", "{mlp}", "--entry", "second"), 2, "second"),
    (("inspect", "{mlp}", "kernel", "entry_main", "--target", "cpu:none"), 2, "cpu:none"),
    (("verify", "{lookup}", "-q"), 2, "SOURCE"),
    (("verify", "{mlp}", "digits", "-q"), 2, "digits"),
    (("verify", "nowhere.tw", "--integrity"), 5, "nowhere.tw"),
    (("demo", "--repeat", "0"), 2, "repeat"),
]


@pytest.fixture(scope="session")
def wrong_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text.txt").write_text("no model\n")
    np.save(folder / "x.npy", np.ones((2, 128), np.float32))
    np.save(folder / "double.npy", np.ones((2, 128)))
    np.save(folder / "wide.npy", np.ones((2, 129), np.float32))
    np.save(folder / "many.npy", np.ones((65, 128), np.float32))
    np.save(folder / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.savez(folder / "x.npz", x=np.ones((2, 128), np.float32))
    (folder / "truncated.npz").write_bytes((folder / "x.npz").read_bytes()[:500])
    np.savez(folder / "lookup.npz", ids=np.array([5]), types=np.array([0]), x=np.ones((1, 2), np.float32))
    return folder


@pytest.mark.parametrize(("arguments", "code", "named"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_input_gives_one_clear_line(arguments, code, named, mlp, lookup, wrong_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [text.format(folder=wrong_files, mlp=mlp, lookup=lookup) for text in arguments]
    result = call(*filled)
    assert result.exit_code == code, result.stderr
    message = result.stderr.strip()
    assert message.startswith("error: ") and named in message
    assert "Traceback" not in message and not result.stdout
    lines = message.splitlines()
    assert len(lines) == 1 or "Targets:" in message  # an unknown target lists them all on a line of its own
    assert not list(tmp_path.iterdir())


def test_unexpected_errors_say_how_to_get_the_traceback(mlp, x, monkeypatch):
    from tilewright.runtime import model

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(model, "load", broken)
    result = call("run", mlp, x[0])
    assert result.exit_code == 1 and "surprise" in result.stderr and "TILEWRIGHT_DEBUG" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("TILEWRIGHT_DEBUG", "1")
    assert "Traceback" in call("run", mlp, x[0]).stderr


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tilewright.compiler.driver", None)

    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    from tilewright.compiler.cli import compile as command

    monkeypatch.setattr(command, "phases", lambda quiet: missing("torch"))
    result = call("compile", "mlp", "-o", "o.tw")
    assert result.exit_code == 1 and "pip install 'tilewright[compile]'" in result.stderr

"""Builds that cannot work, or are stopped: what is said, and what is left behind."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tilewright
from tilewright import models
from tilewright.codegen import artifact
from tilewright.codegen.c import dialect, toolchain
from tilewright.models.initialize import initialize
from tilewright.passes.eliminate_dead_code import EliminateDeadCode
from tilewright.runtime.errors import CompileError, NumericsError, UnsupportedOperator


class Layer(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).real.sort(-1).values


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), Layer())

    def forward(self, x):
        return torch.linalg.inv(self.body(x)) + torch.cummax(x, 0).values


def test_all_unsupported_operators_are_listed_at_once(tmp_path):
    with pytest.raises(UnsupportedOperator) as caught:
        tilewright.compile(Strange().eval(), (torch.randn(8, 8),), output=tmp_path / "no.tw")
    message = str(caught.value)
    for operator in ("aten.fft_fft", "aten.sort", "aten.linalg_inv", "aten.cummax"):
        assert operator in message, message
    assert "in body.1" in message and "node sort" in message and "getitem" not in message
    line = Layer.forward.__code__.co_firstlineno + 1
    assert f"test_bad_builds.py:{line}" in message and "docs/operators.md" in message
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())


class Nonzero(nn.Module):
    def forward(self, x):
        return x[x > 0], torch.nonzero(x)


def test_sizes_that_depend_on_data(tmp_path):
    with pytest.raises(UnsupportedOperator, match=r"nonzero[\s\S]*test_bad_builds\.py") as caught:
        tilewright.compile(Nonzero().eval(), (torch.randn(4, 4),), output=tmp_path / "no.tw")
    assert "depend" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_is_found_and_named(tmp_path, monkeypatch):
    right = dialect.call

    def wrong(op, dtype, arg_dtypes, args):
        return right("add" if op == "sub" else op, dtype, arg_dtypes, args)

    class Difference(nn.Module):
        def forward(self, x, y):
            return {"sum": x + y, "difference": x - y}

    monkeypatch.setattr(dialect, "call", wrong)
    with pytest.raises(NumericsError) as caught:
        tilewright.compile(Difference().eval(), (torch.randn(3, 5), torch.randn(3, 5)), output=tmp_path / "bad.tw")
    message = str(caught.value)
    assert "difference: error" in message and "tolerance 1e-04" in message and "sum: error" not in message
    assert re.search(r"first kernel that diverges is loop_\w+ \(step \d, .* at .*test_bad_builds\.py:\d+\)", message)
    assert caught.value.exit_code == 4


def test_a_wrong_pass_is_told_from_a_wrong_kernel(tmp_path, monkeypatch):
    def wrong(self, program, report):
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.neg.default
            report.change(node, "for a test")

    monkeypatch.setattr(EliminateDeadCode, "run", wrong)
    module, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    with pytest.raises(NumericsError, match="A pass changed the model.*--verify passes"):
        tilewright.compile(module, (x,), output=tmp_path / "bad.tw")
    with pytest.raises(NumericsError, match=r"pass \d\d_eliminate_dead_code.*output 0"):
        tilewright.compile(module, (x,), output=tmp_path / "bad.tw", verify="passes")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_outputs_that_prove_nothing_are_told(quantize, tmp_path):
    model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 3))
    with torch.no_grad():
        model[0].weight[1] = torch.nan
    with pytest.warns(UserWarning, match="main: output has no finite number in PyTorch, so comparing it says nothing"):
        tilewright.compile(model.eval(), (torch.randn(2, 32),), output=tmp_path / "nan.tw", quantize=quantize)


def test_an_artifact_that_fails_verification_is_not_left_in_its_place(tmp_path, monkeypatch):
    """What was there before stays; a failed build does not look finished."""
    good = nn.Linear(4, 4).eval()
    tilewright.compile(good, (torch.randn(2, 4),), output=tmp_path / "model.tw")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model.tw").rglob("*") if path.is_file()}
    right = dialect.call
    monkeypatch.setattr(dialect, "call", lambda op, *rest: right("sub" if op == "add" else op, *rest))

    class Sum(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.raises(NumericsError):
        tilewright.compile(Sum().eval(), (torch.randn(2, 4),), output=tmp_path / "model.tw")
    assert [path.name for path in tmp_path.iterdir()] == ["model.tw"]
    after = {path.name: path.read_bytes() for path in (tmp_path / "model.tw").rglob("*") if path.is_file()}
    assert after == before


PHASES = ("capture", "passes", "lower", "kernels", "write", "verify")


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_leaves_nothing(tmp_path, phase):
    def stop(name, detail):
        if name == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tilewright.compile("mlp", output=tmp_path / "out" / "mlp.tw", progress=stop)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("stage", ["plan", "kernels", "weights", "rename"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, stage):
    write, move = artifact._write, artifact._move_into_place

    def full(folder, path, parts):
        if path.startswith(stage):
            (folder / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, path, parts)

    def full_rename(folder, output):
        if stage == "rename":
            raise OSError(errno.ENOSPC, "No space left on device")
        return move(folder, output)

    monkeypatch.setattr(artifact, "_write", full)
    monkeypatch.setattr(artifact, "_move_into_place", full_rename)
    with pytest.raises(CompileError, match=r"no space left for .*mlp\.tw; free some"):
        tilewright.compile("mlp", output=tmp_path / "mlp.tw", verify="off")
    assert not list(tmp_path.iterdir())


def test_a_failing_kernel_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "COMPILE_FLAGS", (*toolchain.COMPILE_FLAGS, "-include", "no_such_header.h"))
    with pytest.raises(CompileError, match=r"kernel '\w+'.*failed[\s\S]*no_such_header\.h"):
        tilewright.compile("mlp", output=tmp_path / "mlp.tw", verify="off")
    assert not list(tmp_path.iterdir())


# -- compilers ---------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TILEWRIGHT_CC", raising=False)
    monkeypatch.setattr(toolchain, "_zig_package", lambda: ())
    with pytest.raises(CompileError) as caught:
        tilewright.compile("mlp", output=tmp_path / "mlp.tw")
    message = str(caught.value)
    assert "no C compiler" in message and "pip install ziglang" in message and "TILEWRIGHT_CC" in message
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CC", "/bin/false --quiet")
    with pytest.raises(CompileError, match=r"TILEWRIGHT_CC='/bin/false --quiet' is no C compiler.*pip install ziglang"):
        tilewright.compile("mlp", output=tmp_path / "mlp.tw")


def test_zig_builds_what_runs(tmp_path, monkeypatch):
    pytest.importorskip("ziglang")
    monkeypatch.setenv("TILEWRIGHT_CC", "zig")
    result = tilewright.compile("mlp", output=tmp_path / "mlp.tw")
    assert result.errors and all(error.ok for error in result.errors)
    spec = models.get("mlp")
    (x,), _ = spec.example()
    with tilewright.load(result.path, threads=2) as model, torch.no_grad():
        np.testing.assert_allclose(model(x.numpy()), spec.build()(x).numpy(), rtol=1e-5, atol=1e-5)
        flags = next((result.path / "kernels").rglob("flags.txt")).read_text()
        assert "zig" in flags


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_damaged_cache_entry_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    module, x = initialize(nn.Linear(4, 3), 0), torch.randn(2, 4)
    tilewright.compile(module, (x,), output=tmp_path / "first.tw", verify="off")
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    for path in entries:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    tilewright.compile(module, (x,), output=tmp_path / "second.tw")
    assert _tree(tmp_path / "first.tw") == _tree(tmp_path / "second.tw")


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the directory should be")
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="kernel cache"):
        tilewright.compile(nn.Linear(4, 3).eval(), (torch.randn(2, 4),), output=tmp_path / "model.tw")
    tilewright.load(tmp_path / "model.tw").close()


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

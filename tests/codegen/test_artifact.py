"""Writing artifacts: the weight file, determinism, replacing, and leaving nothing behind when something goes wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tilewright.codegen import artifact as writer
from tilewright.codegen.artifact import ConstantData, TargetBinaries, layout_constants, weights_id, write_artifact
from tilewright.runtime.artifact import read_artifact, verify_integrity
from tilewright.runtime.errors import ArtifactError, CompileError, UsageError
from tilewright.runtime.plan import Constant, Plan, Port, Ref, Step, Variant

ARRAYS = {
    "a.weight": np.arange(15, dtype=np.float32).reshape(3, 5),
    "empty": np.zeros((0, 7), np.int64),
    "scalar": np.array(5, np.int8),
    "half": np.arange(33).astype(ml_dtypes.bfloat16),
    "flags": np.array([True, False, True]),
    "line": np.arange(16, dtype=np.float32),
}


def constants(arrays=ARRAYS):
    return [
        ConstantData(key, array.dtype.name, array.shape, lambda array=array: array) for key, array in arrays.items()
    ]


def plan(specs, entry="main") -> Plan:
    places = layout_constants(specs)
    operands = (Ref("input", 0), Ref("output", 0))
    return Plan(
        entry=entry,
        symbols=(),
        inputs=(Port("x", "float32", (2,)),),
        outputs=(Port("y", "float32", (2,)),),
        results={"output": 0},
        checks=(),
        states=(),
        constants=tuple(Constant(s.key, s.key, s.dtype, s.shape, *places[s.key]) for s in specs),
        buffers=(),
        steps=(Step("copy", "loop", (Variant("copy", operands, (), 2),), (1,)),),
    )


def write(output: Path, specs=None, **changes):
    specs = constants() if specs is None else specs
    arguments = {
        "plans": [plan(specs)],
        "constants": specs,
        "targets": [TargetBinaries("cpu:x86-64-v3", ("avx2",), {"model.so": b"code", "kernels/k.c": b"int k;\n"})],
        "info": {"source": "model.py"},
    }
    return write_artifact(output, **{**arguments, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_are_aligned_and_other_tools_can_read_them(tmp_path):
    output = write(tmp_path / "m.tw")
    identity, size = weights_id(constants())
    artifact = read_artifact(output)
    assert (artifact.weights.id, artifact.weights.size) == (identity, size)
    assert artifact.weights_path.stat().st_size == size
    content = artifact.weights_path.read_bytes()
    start = len(artifact.weights.header)
    assert start % 64 == 0
    with safe_open(artifact.weights_path, "np") as tensors:
        for key, array in ARRAYS.items():
            offset, count = layout_constants(constants())[key]
            assert offset % 64 == 0
            assert content[start + offset : start + offset + count] == array.tobytes()
            if array.dtype != ml_dtypes.bfloat16:
                np.testing.assert_array_equal(tensors.get_tensor(key), array)
    verify_integrity(output)


def test_weights_of_several_blocks_are_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK", 4096)
    arrays = {f"a{size}": np.arange(size, dtype=np.float32) for size in (3, 5000, 1, 1024, 2048)}
    artifact = verify_integrity(write(tmp_path / "m.tw", constants(arrays)))
    with safe_open(artifact.weights_path, "np") as tensors:
        for key, array in arrays.items():
            np.testing.assert_array_equal(tensors.get_tensor(key), array)


def test_no_constants_at_all(tmp_path):
    artifact = verify_integrity(write(tmp_path / "m.tw", []))
    assert artifact.weights.tensors == {}


def test_same_arguments_same_bytes(tmp_path):
    one, other = write(tmp_path / "one.tw"), write(tmp_path / "deep" / "other.tw")
    assert files(one) == files(other)


def test_replaces_an_artifact(tmp_path):
    output = write(tmp_path / "m.tw")
    write(output, info={"source": "another.py"})
    assert read_artifact(output).manifest.info == {"source": "another.py"}
    assert os.listdir(tmp_path) == ["m.tw"]


def test_fills_an_empty_directory(tmp_path):
    (tmp_path / "m.tw").mkdir()
    verify_integrity(write(tmp_path / "m.tw"))


def test_refuses_to_replace_anything_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UsageError, match="photos exists and is not a Tilewright artifact"):
        write(tmp_path / "photos")
    with pytest.raises(UsageError, match="cat.jpg exists and is a file"):
        write(tmp_path / "photos" / "cat.jpg")
    (tmp_path / "photos" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(UsageError, match="not a Tilewright artifact"):
        write(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("reason", [KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_interruption_leaves_nothing_behind(tmp_path, exists, reason):
    def fail():
        raise reason

    output = tmp_path / "m.tw"
    before = files(write(output)) if exists else {}
    broken = [*constants(), ConstantData("late", "float32", (1,), fail)]
    with pytest.raises(CompileError if isinstance(reason, OSError) else type(reason)):
        write(output, broken)
    assert os.listdir(tmp_path) == (["m.tw"] if exists else [])
    assert not exists or files(output) == before


def test_full_disk(tmp_path, monkeypatch):
    real = os.fsync
    calls = []

    def fail_late(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(writer.os, "fsync", fail_late)
    with pytest.raises(CompileError, match="no space left for .*m.tw"):
        write(tmp_path / "m.tw")
    assert os.listdir(tmp_path) == []


def test_rename_that_fails_restores_the_old_artifact(tmp_path, monkeypatch):
    output = write(tmp_path / "m.tw")
    before = files(output)
    real = Path.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CompileError, match="Permission denied"):
        write(output, info={})
    monkeypatch.undo()
    assert files(output) == before
    assert os.listdir(tmp_path) == ["m.tw"]


def test_unwritable_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match="cannot write"):
        write(tmp_path / "file" / "m.tw")


@pytest.mark.parametrize(
    "array", [np.zeros((3, 4), np.float32), np.zeros((3, 5), np.float64), np.zeros((3, 5), np.uint16)]
)
def test_constant_that_is_not_what_it_was_said_to_be(tmp_path, array):
    with pytest.raises(CompileError, match=r"constant a: declared float32\[3, 5\]"):
        write(tmp_path / "m.tw", [ConstantData("a", "float32", (3, 5), lambda: array)])
    assert os.listdir(tmp_path) == []


def test_plan_that_disagrees_with_the_weights(tmp_path):
    with pytest.raises(CompileError, match="not laid out as the weight file"):
        write(tmp_path / "m.tw", constants(), plans=[plan([ConstantData("zz", "int8", (3,), bytes)])])


def test_invalid_plan_is_an_error_of_the_compiler(tmp_path):
    bad = plan([], entry="not an identifier")
    with pytest.raises(ArtifactError, match="entry: 'not an identifier'"):
        write(tmp_path / "m.tw", [], plans=[bad])


@pytest.mark.parametrize("key", ["__metadata__", "__pad_0"])
def test_reserved_keys(key):
    with pytest.raises(ValueError, match="reserved"):
        layout_constants([ConstantData(key, "int8", (1,), lambda: np.zeros(1, np.int8))])


def test_progress_counts_to_the_end(tmp_path):
    seen: list[tuple[int, int]] = []
    write(tmp_path / "m.tw", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(ARRAYS)
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_non_contiguous_data_is_written_in_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    output = write(tmp_path / "m.tw", [ConstantData("t", "float32", (4, 3), lambda: array)])
    with safe_open(output / "weights.safetensors", "np") as tensors:
        np.testing.assert_array_equal(tensors.get_tensor("t"), array)

"""Loading damaged, incomplete, hostile and foreign artifacts: always an ArtifactError that names the file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest

import tilewright
from tilewright.codegen.artifact import TargetBinaries, write_artifact
from tilewright.runtime import manifest as manifests
from tilewright.runtime import weights as weight_files
from tilewright.runtime.artifact import read_artifact, verify_integrity
from tilewright.runtime.errors import ArtifactError
from tilewright.runtime.plan import FORMAT_VERSION

LIBRARY = "kernels/generic/model.so"


def refused(path: Path, how=tilewright.load) -> str:
    with pytest.raises(ArtifactError) as caught:
        how(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, **changes) -> None:
    """Change fields of the manifest, keeping its checksum right."""
    path = folder / "manifest.json"
    manifest = manifests.parse(path.read_bytes(), "manifest")
    path.write_bytes(manifests.dump(dataclasses.replace(manifest, **changes)))


def relist(folder: Path, file: str, content: bytes) -> None:
    """Replace a file and its record in the manifest, as somebody with bad intentions would."""
    (folder / file).write_bytes(content)
    manifest = manifests.parse((folder / "manifest.json").read_bytes(), "manifest")
    digest = hashlib.sha256(content).hexdigest()
    records = [
        dataclasses.replace(record, size=len(content), sha256=digest) if record.path == file else record
        for record in manifest.files
    ]
    rewrite(folder, files=tuple(records))


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["manifest.json", "plan/main.json", "plan/count.json", LIBRARY])
def test_one_flipped_bit(toy_copy, file):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    path = toy_copy / file
    size = path.stat().st_size
    for position in [0, size - 2, *(rng.randrange(size) for _ in range(60))]:
        bit = rng.randrange(8)
        flip(path, position, bit)
        try:
            message = refused(toy_copy)
        except pytest.fail.Exception:
            # white space between the manifest's values carries nothing
            assert file == "manifest.json"
            assert json.loads(path.read_bytes()) == json.loads(flipped_back(path, position, bit))
        else:
            assert file in message
        flip(path, position, bit)
    tilewright.load(toy_copy).close()


def flipped_back(path: Path, position: int, bit: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    return bytes(content)


def test_every_flipped_byte_of_the_weight_header(toy_copy):
    path = toy_copy / weight_files.FILE_NAME
    header = len(read_artifact(toy_copy).weights.header)
    for position in range(random.randrange(4), header, 4):
        flip(path, position, position % 8)
        assert weight_files.FILE_NAME in refused(toy_copy, read_artifact)
        flip(path, position, position % 8)
    verify_integrity(toy_copy)


def test_flipped_weight_is_found_by_verify_integrity(toy_copy):
    path = toy_copy / weight_files.FILE_NAME
    flip(path, path.stat().st_size - 1, 3)
    read_artifact(toy_copy)
    assert str(path) in refused(toy_copy, verify_integrity)


def test_damaged_source_is_found_by_verify_integrity(toy_copy):
    (toy_copy / "kernels/generic/kernels/rows.c").write_bytes(b"/* SOURCE */\n")
    read_artifact(toy_copy)
    assert "rows.c" in refused(toy_copy, verify_integrity)


def test_every_missing_file(toy_copy):
    names = [str(path.relative_to(toy_copy)) for path in toy_copy.rglob("*") if path.is_file()]
    assert len(names) == 9
    for name in names:
        (toy_copy / name).rename(toy_copy / "away")
        assert name in refused(toy_copy)
        (toy_copy / "away").rename(toy_copy / name)
    read_artifact(toy_copy)


@pytest.mark.parametrize("file", ["plan/main.json", LIBRARY, "weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_truncated_file(toy_copy, file, keep):
    content = (toy_copy / file).read_bytes()
    (toy_copy / file).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    if file == "manifest.json" and keep == -1:
        return  # only the line's end is gone
    assert file in refused(toy_copy)


def test_truncated_weights_whose_size_is_listed(toy_copy):
    """Offsets must lie inside the file even when the manifest agrees with it."""
    content = (toy_copy / "weights.safetensors").read_bytes()
    relist(toy_copy, "weights.safetensors", content[:-64])
    message = refused(toy_copy)
    assert "weights.safetensors: tensor" in message
    assert "truncated" in message


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 100, bytes(8), b"\x02" + bytes(7) + b"[]", b"{}" * 40])
def test_weights_that_are_no_safetensors(toy_copy, content):
    relist(toy_copy, "weights.safetensors", content)
    assert "weights.safetensors" in refused(toy_copy)


def test_version_from_the_future(toy_copy):
    rewrite_raw(toy_copy, format=FORMAT_VERSION + 1, anything="new")
    message = refused(toy_copy)
    expected = f"format version {FORMAT_VERSION + 1} is newer than this Tilewright reads ({FORMAT_VERSION}); upgrade"
    assert f"manifest.json: {expected}" in message


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.0])
def test_version_that_never_was(toy_copy, version):
    rewrite_raw(toy_copy, format=version)
    assert "manifest.json" in refused(toy_copy)


def rewrite_raw(folder: Path, **fields) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    path.write_text(json.dumps({**data, **fields}))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret", "plan/../../secret", "plan//main.json", "./plan/main.json", "a\\b", "a\0b", ""]
)
def test_paths_that_leave_the_directory(toy_copy, path):
    manifest = read_artifact(toy_copy).manifest
    first, *others = manifest.files
    rewrite(toy_copy, files=(*others, first, dataclasses.replace(first, path=path)))
    assert "manifest.json: files[8].path: path" in refused(toy_copy)


def test_links_that_leave_the_directory(toy_copy, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(toy_copy / "plan", outside)
    (toy_copy / "plan").symlink_to(outside)
    assert "is a link that leaves the artifact's directory" in refused(toy_copy)
    (toy_copy / "plan").unlink()
    (toy_copy / "plan").mkdir()
    for name in os.listdir(outside):
        (toy_copy / "plan" / name).symlink_to(outside / name)
    assert "is a link that leaves the artifact's directory" in refused(toy_copy)


def test_links_inside_and_to_the_directory_are_fine(toy_copy, tmp_path):
    (toy_copy / "plan").rename(toy_copy / "plans")
    (toy_copy / "plan").symlink_to("plans")
    (tmp_path / "link.tw").symlink_to(toy_copy)
    tilewright.load(tmp_path / "link.tw").close()


def test_a_pipe_is_not_waited_for(toy_copy):
    (toy_copy / "plan/main.json").unlink()
    os.mkfifo(toy_copy / "plan/main.json")
    assert "not a regular file" in refused(toy_copy)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_manifest_that_is_none(toy_copy, content):
    (toy_copy / "manifest.json").write_bytes(content)
    assert "manifest.json" in refused(toy_copy)


def test_not_a_directory(tmp_path):
    assert "does not exist; expected the directory" in refused(tmp_path / "none")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "is a file; expected the directory" in refused(tmp_path / "model.onnx")
    assert "manifest.json: No such file" in refused(tmp_path)


def test_plan_with_an_offset_beyond_the_weights(toy_copy):
    plan = json.loads((toy_copy / "plan/main.json").read_bytes())
    plan["constants"][1]["offset"] = 1 << 40
    relist(toy_copy, "plan/main.json", json.dumps(plan).encode())
    assert "plan/main.json: constants[1]: table is float32[10, 4] at byte 1099511627776" in refused(toy_copy)


def test_plan_with_another_dtype_than_the_weights(toy_copy):
    plan = json.loads((toy_copy / "plan/main.json").read_bytes())
    plan["constants"][0]["dtype"] = "int32"
    relist(toy_copy, "plan/main.json", json.dumps(plan).encode())
    assert "plan/main.json: constants[0]: w is int32[8, 4]" in refused(toy_copy)


def test_plan_of_another_entry_point(toy_copy):
    relist(toy_copy, "plan/main.json", (toy_copy / "plan/count.json").read_bytes())
    assert "plan/main.json: is the plan of another entry point than 'main'" in refused(toy_copy)


def test_states_must_agree_between_entry_points(toy_parts, tmp_path):
    count = toy_parts["plans"][1]
    zeros = dataclasses.replace(count, entry="again", states=(dataclasses.replace(count.states[0], initial=""),))
    output = write_artifact(tmp_path / "m.tw", **{**toy_parts, "plans": [count, zeros]})
    assert "plan/again.json: states[0]: total differs between entry points" in refused(output)


def test_library_for_other_weights(toy_parts, tmp_path):
    """Same shapes, other order: the identity compiled into the library differs."""
    constants = toy_parts["constants"][::-1]
    output = write_artifact(
        tmp_path / "m.tw", **{**toy_parts, "plans": toy_parts["plans"][2:3], "constants": constants}
    )
    assert f"{LIBRARY}: was compiled for other weights" in refused(output)


def test_library_that_is_no_library(toy_parts, tmp_path):
    targets = [TargetBinaries("cpu:generic", (), {"model.so": b"\x7fELF, but no more"})]
    output = write_artifact(tmp_path / "m.tw", **{**toy_parts, "targets": targets})
    assert f"{LIBRARY}: cannot be loaded" in refused(output)


def test_library_without_the_entry_point(toy_parts, tmp_path):
    plan = dataclasses.replace(toy_parts["plans"][0], entry="other")
    output = write_artifact(tmp_path / "m.tw", **{**toy_parts, "plans": [plan]})
    assert f"{LIBRARY}: does not export tw_run_other" in refused(output)


def test_no_target_fits(toy_parts, tmp_path):
    targets = [
        TargetBinaries("cpu:x86-64-v9", ("avx9000", "zmm64"), {"model.so": b""}),
        TargetBinaries("cuda:sm_90", (), {"model.so": b""}),
    ]
    output = write_artifact(tmp_path / "m.tw", **{**toy_parts, "targets": targets})
    message = refused(output)
    assert (
        "manifest.json: no target fits this processor: cpu:x86-64-v9 needs avx9000 zmm64 (missing: avx9000" in message
    )
    assert "It has " in message
    output = write_artifact(tmp_path / "gpu.tw", **{**toy_parts, "targets": targets[1:]})
    assert "holds no kernels for a CPU" in refused(output)


def test_nothing_is_loaded_before_all_is_checked(toy_copy, monkeypatch):
    opened = []
    monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: opened.append(args))
    flip(toy_copy / "plan/busy.json", 100, 1)
    refused(toy_copy)
    flip(toy_copy / "plan/busy.json", 100, 1)
    flip(toy_copy / LIBRARY, 5000, 1)
    refused(toy_copy)
    assert opened == []

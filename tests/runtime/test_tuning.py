"""Measuring tiles and keeping what was measured, with a driver that is faked."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest

import tilewright
from tilewright.runtime import tuned
from tilewright.runtime.artifact import read_artifact
from tilewright.runtime.cuda.tune import tune
from tilewright.runtime.errors import ArtifactError, DeviceError, UsageError
from tilewright.runtime.tuned import TunedFileWarning


@pytest.fixture
def artifact(gpu_toy, tmp_path):
    return shutil.copytree(gpu_toy, tmp_path / "m.tw")


@pytest.fixture
def slow(machine, monkeypatch):
    """Launches take the time given by their number of threads."""
    times = {128: 3.0, 256: 2.0}

    def elapsed(self, begin, end):
        (_, first), (_, last) = self.events[int(begin)], self.events[int(end)]
        assert last > first
        return times.get(machine.launched[-1].threads, 1.0)

    monkeypatch.setattr(type(machine), "cuEventElapsedTime", elapsed)
    return times


def inputs(n):
    return np.ones((n, 8), np.float32), np.zeros(n, np.int64)


def threads(machine, path, n) -> int:
    """Of the programs that the first step ran with."""
    machine.launched.clear()
    with tilewright.load(path, device="cuda") as model:
        model(*inputs(n))
    return machine.launched[0].threads


def test_tuning(artifact, machine, slow):
    said = []
    found = tune(artifact, values=[{"n": 64}, {"n": 2}, {"n": 64}], repeats=3, progress=said.append)
    (one,) = found.measured
    assert (one.entry, one.step, one.kernel, one.values, one.best) == ("main", 0, "rows", {"n": 64}, "b128")
    assert one.seconds == {"b32": 0.003, "b128": 0.002}
    assert said == ["1 of 1: rows at n=64"]
    assert found.file == artifact / "tuned.json"
    assert machine.leaks() == {}
    assert threads(machine, artifact, 64) == 256
    slow[256] = 5.0
    tune(artifact, values=[{"n": 64}], entries=["main"], repeats=1)
    assert threads(machine, artifact, 64) == 128
    (device,) = tuned.read(read_artifact(artifact)).devices
    assert [choice.tile for choice in device.choices] == ["b32"]


def test_the_cache_is_emptied_before_each_launch(artifact, machine, slow):
    tune(artifact, values=[{"n": 64}], repeats=4)
    assert machine.calls["cuLaunchKernelEx"] == 2 * (3 + 4)
    assert machine.calls["cuMemsetD8Async"] >= 2 * (3 + 4)


def test_tuning_refuses(artifact, machine, toy):
    for problem, kind, options in (
        ("no entry point 'other'", UsageError, {"entries": ["other"]}),
        ("n goes from 1 to 64, got 65", UsageError, {"values": [{"n": 65}]}),
        ("device 'cpu' is no GPU", UsageError, {"device": "cpu"}),
        ("there is no GPU cuda:4", UsageError, {"device": "cuda:4"}),
    ):
        with pytest.raises(kind, match=problem):
            tune(artifact, **options)
    with pytest.raises(ArtifactError, match="nothing to measure"):
        tune(toy)
    machine.fail("cuLaunchKernelEx", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", 3)
    with pytest.raises(DeviceError, match="rows"):
        tune(artifact, values=[{"n": 64}], entries=["main"])
    assert machine.leaks() == {} and not (artifact / "tuned.json").exists()


def test_a_file_of_another_artifact_is_ignored(artifact, machine, slow):
    before = threads(machine, artifact, 64)
    slow[128 if before == 256 else 256] = 0.1
    tune(artifact, values=[{"n": 64}], repeats=1)
    after = threads(machine, artifact, 64)
    assert after != before
    file = artifact / "tuned.json"
    content = file.read_text()
    data = json.loads(content)
    for wrong in (
        json.dumps({**data, "artifact": "0" * 64}),
        json.dumps({**data, "format": 2}),
        json.dumps({**data, "devices": [{"device": 5}]}),
        "[",
        "[" * 100_000,
        "null",
        "",
    ):
        file.write_text(wrong)
        with pytest.warns(TunedFileWarning, match="tuned.json: .* is ignored; run `tilewright tune` again"):
            assert threads(machine, artifact, 64) == before
    tune(artifact, values=[{"n": 64}], repeats=1)  # replaces what is wrong, silently
    assert file.read_text() == content
    data["devices"][0]["choices"][0]["tile"] = "b9999"  # no such binary: as if it had not been measured
    file.write_text(json.dumps(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert threads(machine, artifact, 64) == before


def test_files_hold_several_gpus(artifact, machine, slow):
    tune(artifact, values=[{"n": 64}], repeats=1)
    opened = read_artifact(artifact)
    (device,) = tuned.read(opened).devices
    from tilewright.runtime.cuda.probe import gpus_present

    other = dataclasses.replace(gpus_present()[0], name="Another GPU")
    assert tuned.choices(opened, other) == {}
    choice = dataclasses.replace(device.choices[0], tile="b32", sizes=(7,))
    tuned.write(opened, other, (choice,))
    assert tuned.choices(opened, other) == {choice.key: "b32"}
    assert tuned.choices(opened, gpus_present()[0]) == {device.choices[0].key: "b128"}


def test_a_directory_that_cannot_be_written(artifact, machine, slow, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tuned.os, "replace", refuse)
    with pytest.raises(UsageError, match="tuned.json: cannot be written: Permission denied"):
        tune(artifact, values=[{"n": 64}], repeats=1)
    assert [path.name for path in artifact.glob(".*")] == []

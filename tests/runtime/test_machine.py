"""Processor features and default threads, on made-up machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tilewright.runtime import threads
from tilewright.runtime.cpu import choose, features, parse_cpuinfo
from tilewright.runtime.errors import ArtifactError
from tilewright.runtime.manifest import Target
from tilewright.runtime.threads import cpu_quota, default_threads

V3 = Target("cpu:x86-64-v3", ("avx2", "fma"), "v3/model.so")
V4 = Target("cpu:x86-64-v4", ("avx2", "fma", "avx512f"), "v4/model.so")


def test_features_are_those_of_all_processors():
    text = "processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx2 fma avx512f\n"
    assert parse_cpuinfo(text) == {"fpu", "avx2", "fma"}
    assert parse_cpuinfo("processor : 0\nFeatures\t: fp asimd\n") == {"fp", "asimd"}
    assert parse_cpuinfo("") == frozenset()
    assert features()


def test_first_target_that_fits():
    everything = frozenset(("avx2", "fma", "avx512f", "fpu"))
    assert choose((V4, V3), everything, "m") is V4
    assert choose((V3, V4), everything, "m") is V3
    assert choose((V4, V3), frozenset(("avx2", "fma")), "m") is V3
    assert choose((Target("cuda:sm_90", (), "x"), V3), everything, "m") is V3
    with pytest.raises(
        ArtifactError, match=r"m: no target fits.*v4 needs avx2 avx512f fma \(missing: avx512f fma\).*avx2"
    ):
        choose((V4, V3), frozenset(("avx2",)), "m")


def group(root: Path, lines: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "100000 100000\n", "a/cpu.max": "400000 100000\n"}, 1.0),
        ("0::/not/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ("3:cpu,cpuacct:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:name=systemd:/x:y\n", {}, None),
    ],
)
def test_quota(tmp_path, lines, files, quota):
    assert cpu_quota(group(tmp_path, lines, files)) == quota


def test_default_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(6)))
    assert default_threads(tmp_path) == 6
    assert default_threads(group(tmp_path, "0::/\n", {"cpu.max": "250000 100000\n"})) == 2
    assert default_threads(group(tmp_path, "0::/\n", {"cpu.max": "10000 100000\n"})) == 1
    assert default_threads(group(tmp_path, "0::/\n", {"cpu.max": "9900000 100000\n"})) == 6


def test_default_threads_of_this_machine():
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))

"""How many threads to use by default: what the affinity mask and the control group's quota leave to this process."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads(root: Path = Path("/")) -> int:
    """Processors that this process may use at once, at least 1.

    A quota of 2.5 processors counts as 2: a third thread would be throttled in the middle of a step while others spin.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of this process's control group and those above it, in processors; None for no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
            quotas += [_quota_v2(folder) for folder in _up(base, path)]
        elif "cpu" in controllers.split(","):
            base = root / "sys/fs/cgroup" / "cpu"
            quotas += [_quota_v1(folder) for folder in _up(base, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _up(base: Path, path: str) -> list[Path]:
    """The group's folder and those above; inside a container, groups above its own are not there and read as none."""
    parts = [part for part in path.split("/") if part]
    return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    return _quotient(_words(folder / "cpu.max"))


def _quota_v1(folder: Path) -> float | None:
    return _quotient(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _quotient(words: list[str]) -> float | None:
    if len(words) != 2 or words[0] in ("max", "-1") or int(words[1]) <= 0:
        return None
    return int(words[0]) / int(words[1])

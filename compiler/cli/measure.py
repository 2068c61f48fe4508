"""Measuring a loaded model: latencies of calls, and where the time goes by kernel. Needs no PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ...runtime import sizes
from ...runtime.entry import Entry

WARM_UP_SECONDS = 0.3
MEASURED_SECONDS = 3.0
_FEWEST, _MOST = 20, 2000
_PROFILES, _PROFILED_SECONDS = 200, 2.0


@dataclass(frozen=True)
class Latency:
    """Statistics of the seconds of calls made one after the other."""

    calls: int
    smallest: float
    p50: float
    p90: float
    p99: float
    mean: float


@dataclass
class KernelTime:
    """What one kernel took in one call of the model: medians over profiled calls, summed over the steps that run it."""

    kernel: str
    family: str
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    modules: list[str] = field(default_factory=list)


def latency_of(call: Callable[[], Any], repeat: int | None = None) -> Latency:
    """Call repeatedly and time each call.

    Args:
        call: what to time.
        repeat: how many calls to count, after some that warm up; by default as many as fit three seconds (20 to 2000).
    """
    start = time.perf_counter()
    warm = 0
    while warm < 3 or time.perf_counter() - start < WARM_UP_SECONDS:
        call()
        warm += 1
        if time.perf_counter() - start > MEASURED_SECONDS:
            break
    each = (time.perf_counter() - start) / warm
    count = repeat or min(_MOST, max(_FEWEST, int(MEASURED_SECONDS / each)))
    seconds = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        call()
        seconds.append((time.perf_counter_ns() - begin) / 1e9)
    seconds.sort()
    p50, p90, p99 = (percentile(seconds, share) for share in (0.5, 0.9, 0.99))
    return Latency(count, seconds[0], p50, p90, p99, sum(seconds) / count)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least the share of the (sorted) values does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def profile_kernels(
    entry: Entry, inputs: Mapping[str, Any], values: Mapping[str, int], repeat: int | None = None
) -> list[KernelTime]:
    """Time per kernel of one call, slowest first.

    Args:
        entry: to run.
        inputs: by name.
        values: of the symbols, for the kernels' arithmetic and bytes.
        repeat: how many calls to profile; by default as many as fit two seconds (at most 200).
    """
    runs: list[dict[tuple[int, int], float]] = []
    start = time.perf_counter()
    while len(runs) < (repeat or _PROFILES):
        records = entry.profile(**inputs)
        runs.append({(item.step, item.variant): (item.end_ns - item.begin_ns) / 1e9 for item in records})
        if repeat is None and time.perf_counter() - start > _PROFILED_SECONDS:
            break
    kernels: dict[str, KernelTime] = {}
    for step, variant in runs[0]:
        described = entry.plan.steps[step]
        chosen = described.variants[variant]
        found = kernels.setdefault(chosen.kernel, KernelTime(chosen.kernel, described.family))
        found.calls += 1
        found.seconds += median(run[step, variant] for run in runs)
        found.flops += sizes.evaluate(chosen.flops, values)
        found.bytes += sizes.evaluate(chosen.bytes, values)
        found.modules.append(described.origin.module or ", ".join(described.origin.nodes) or described.name)
    return sorted(kernels.values(), key=lambda item: -item.seconds)

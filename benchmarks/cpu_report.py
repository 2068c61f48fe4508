"""The tables of the CPU benchmark: every system beside the others and beside the processor's limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cpu_goals import goals
from .cpu_losses import describe_losses
from .cpu_ratios import OURS, WITH_NUMPY, Results, bound_ms, fastest_peer, ratio, timed_systems
from .cpu_units import MODELS, PRECISIONS, SYSTEMS, Case
from .state import describe


def report(
    machine: Mapping[str, Any],
    results: Results,
    planned: Sequence[Case],
    skipped: Mapping[str, str],
    matmuls: Sequence[Mapping[str, Any]] = (),
) -> str:
    """All tables as text. What was not measured says so.

    Args:
        machine: processor and versions.
        results: of all stages.
        planned: cases to report on.
        skipped: systems that were left out, and why.
        matmuls: rows of benchmarks.kernels.
    """
    parts = [describe(machine)]
    measured = [case for case in planned if f"time/{case.name}" in results]
    parts += ["\n".join(_case(results, case)) for case in measured]
    parts += ["\n".join(lines) for case in measured if (lines := list(_slower(results, case)))]
    if found := goals(results, planned, matmuls):
        parts.append("\n".join(map(str, found)))
    parts += [f"skipped: {SYSTEMS[name].label}: {reason}" for name, reason in skipped.items()]
    waiting = [case.name for case in planned if case not in measured]
    if waiting:
        parts.append(f"not measured: {len(waiting)} of {len(planned)} cases; run again to go on ({waiting[0]} is next)")
    return "\n\n".join(parts)


def _case(results: Results, case: Case) -> Iterator[str]:
    """One case's table."""
    limits, bound = results[f"time/{case.name}"]["limits"], bound_ms(results, case)
    rates = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in limits.items() if name != "read")
    needs = results[f"build/{case.name}/reference"]
    yield f"{case.model} {case.precision}, batch {case.batch} ({MODELS.get(case.model, 'its example')})"
    yield (
        f"limits: {rates}, read {limits['read'] / 1e9:.1f} GB/s; "
        f"{needs['flops'] / 1e9:.3g} Gop and {needs['weight_bytes'] / 2**20:.3g} MiB of weights: "
        f"{bound:.3g} ms at the limit"
    )
    yield (
        f"{'':15}{'ms':>9}{'10..90 %':>19}{'of limit':>10}{'per second':>12}{'we are':>9}"
        f"{'compile':>10}{'start':>9}{'peak MiB':>10}{'size MiB':>10}"
    )
    found = timed_systems(results, case)
    started = results.get(f"start/{case.name}", {"systems": {}})
    starts = started["systems"]
    for name, item in results[f"time/{case.name}"]["systems"].items():
        if "error" in item:
            yield f"{SYSTEMS[name].label:15}{item['error']}"
            continue
        build, start = results.get(f"build/{case.name}/{name}", {}), starts.get(name, {})
        spread = f"{item['low']:.2f}..{item['high']:.2f}"
        times = f"{ratio(item, found[OURS]):.2f}x" if OURS in found and name != OURS else ""
        yield (
            f"{SYSTEMS[name].label:15}{item['ms']:9.2f}{spread:>19}{bound / item['ms']:>10.0%}"
            f"{1e3 * case.batch / item['ms']:12.1f}{times:>9}"
            + _cell(build.get("seconds"), 10, "{:.1f} s")
            + _cell(start.get("seconds"), 9, "{:.2f} s")
            + _cell(start.get("peak_bytes"), 10, "{:.0f}", 2**20)
            + _cell(build.get("bytes"), 10, "{:.1f}", 2**20)
        )
        if "error" in start:
            yield f"{'':15}start: {start['error']}"
    for name, what in (
        (WITH_NUMPY, "Tilewright with numpy arrays; above without numpy"),
        ("python", "Python and numpy alone"),
    ):
        if "seconds" in started.get(name, {}):
            yield f"{'start':15}{started[name]['seconds']:.2f} s  {what}"


def _cell(value: float | None, width: int, form: str, unit: float = 1) -> str:
    return f"{form.format(value / unit) if value is not None else '-':>{width}}"


def _slower(results: Results, case: Case) -> Iterator[str]:
    """Where a peer is faster: the kernels that lose the time."""
    peer = fastest_peer(results, case)
    if peer is None or peer[1] >= 1:
        return
    found, item = timed_systems(results, case), results[f"time/{case.name}"]
    ours = found[OURS]["ms"]
    gap = ours * (1 - peer[1])
    yield (
        f"{case.model} {case.precision}, batch {case.batch}: {SYSTEMS[peer[0]].label} is faster ({peer[1]:.2f}x); "
        f"{gap:.2f} of {ours:.2f} ms to find"
    )
    yield from describe_losses(item["kernels"], item["limits"], PRECISIONS[case.precision], ours, gap)

"""The tables of the CPU benchmark: every system beside the others and beside the processor's limits."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cpu_losses import describe_losses
from .cpu_units import CONVOLUTIONAL, MODELS, PRECISIONS, SYSTEMS, TRANSFORMERS, Case
from .state import describe

Results = Mapping[str, Mapping[str, Any]]
OURS = "tilewright"


def report(machine: Mapping[str, Any], results: Results, planned: Sequence[Case], skipped: Mapping[str, str]) -> str:
    """All tables as text. What was not measured says so."""
    parts = [describe(machine)]
    measured = [case for case in planned if f"time/{case.name}" in results]
    parts += ["\n".join(_case(results, case)) for case in measured]
    parts += ["\n".join(lines) for case in measured if (lines := list(_slower(results, case)))]
    goals = summary(results, planned)
    if goals:
        parts.append("\n".join(f"{text}: {value:.2f}" for text, value in goals.items()))
    parts += [f"skipped: {SYSTEMS[name].label}: {reason}" for name, reason in skipped.items()]
    waiting = [case.name for case in planned if case not in measured]
    if waiting:
        parts.append(f"not measured: {len(waiting)} of {len(planned)} cases; run again to go on ({waiting[0]} is next)")
    return "\n\n".join(parts)


def bound_ms(results: Results, case: Case) -> float:
    """What a call would take at the limits: all multiply-adds at their rate, or all weights read once."""
    limits = results[f"time/{case.name}"]["limits"]
    needs = results[f"build/{case.name}/reference"]
    size = needs["weight_bytes"] / (2 if case.precision == "bf16" else 1)
    rate = limits.get(PRECISIONS[case.precision], limits["float32"])
    return 1e3 * float(max(needs["flops"] / rate, size / limits["read"]))


def timed_systems(results: Results, case: Case) -> dict[str, Mapping[str, Any]]:
    """The systems that were timed."""
    found = results.get(f"time/{case.name}", {"systems": {}})["systems"]
    return {name: item for name, item in found.items() if "error" not in item}


def ratio(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    """How many times faster we are: the median over turns, each compared with the same round's, as machines drift."""
    pairs = zip(theirs["turns"], ours["turns"], strict=False)
    return statistics.median(their / our for their, our in pairs)


def fastest_peer(results: Results, case: Case) -> tuple[str, float] | None:
    """The peer with the least ratio, and that ratio; ``None`` where we or all peers are missing."""
    found = timed_systems(results, case)
    if OURS not in found or len(found) < 2:
        return None
    ratios = {name: ratio(item, found[OURS]) for name, item in found.items() if name != OURS}
    name = min(ratios, key=lambda name: ratios[name])
    return name, ratios[name]


def summary(results: Results, planned: Sequence[Case]) -> dict[str, float]:
    """The numbers that goals are stated in; only those that can be had from the results."""
    found: dict[str, float] = {}
    for precision in dict.fromkeys(case.precision for case in planned):
        ratios = {
            case: peer[1]
            for case in planned
            if case.precision == precision and (peer := fastest_peer(results, case)) is not None
        }
        for what, latency in (("latency", True), ("throughput", False)):
            chosen = {case.model: value for case, value in ratios.items() if case.latency == latency}
            least = {model: chosen[model] for model in TRANSFORMERS if model in chosen}
            if least:
                worst = min(least, key=lambda model: least[model])
                found[f"{precision} {what}, least of the transformers ({worst}), to the fastest peer"] = least[worst]
            images = [chosen[model] for model in CONVOLUTIONAL if model in chosen]
            if images:
                text = f"{precision} {what}, mean of {len(images)} convolutional networks, to the fastest peer"
                found[text] = statistics.geometric_mean(images)
        latencies = [case for case in planned if case.precision == precision and case.latency]
        found |= {f"{precision} {text}": value for text, value in _shares(results, latencies).items()}
    return found


def _shares(results: Results, latencies: Sequence[Case]) -> dict[str, float]:
    """Compile time, start-up and memory as shares of a peer's: the largest over the models."""
    shares: dict[str, list[float]] = {}
    for case in latencies:
        builds = [results.get(f"build/{case.name}/{name}", {}).get("seconds") for name in (OURS, "aotinductor")]
        if all(builds):
            shares.setdefault("compile time as a share of AOTInductor's, at most", []).append(builds[0] / builds[1])
        starts = results.get(f"start/{case.name}", {"systems": {}})["systems"]
        good = {name: item for name, item in starts.items() if "error" not in item}
        if OURS not in good or len(good) < 2:
            continue
        for text, key in (
            ("start-up as a share of the fastest", "seconds"),
            ("memory as a share of the leanest", "peak_bytes"),
        ):
            least = min(item[key] for name, item in good.items() if name != OURS)
            shares.setdefault(f"{text} peer's, at most", []).append(good[OURS][key] / least)
    return {text: max(values) for text, values in shares.items()}


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
    starts = results.get(f"start/{case.name}", {"systems": {}})["systems"]
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

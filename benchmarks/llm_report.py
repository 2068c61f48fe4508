"""The tables of the benchmark of language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .cpu_losses import describe_losses
from .llm_goals import goals
from .llm_ratios import Results, speed
from .llm_units import CONTENDERS, MODELS, WORKLOADS, Workload
from .state import describe


def report(
    machine: Mapping[str, Any], results: Results, model: str, names: Sequence[str], skipped: Mapping[str, str]
) -> str:
    """All tables as text. What was not measured says so.

    Args:
        machine: processor and versions.
        results: of all stages.
        model: to report on.
        names: of contenders, in order.
        skipped: systems that were left out, and why.
    """
    dimensions = MODELS[model]
    weights = dimensions.layer_weights + 2 * dimensions.head_weights
    parts = [f"{describe(machine)}\n{model}: {weights / 1e9:.3g} billion weights, {dimensions}"]
    measured = [workload for workload in WORKLOADS.values() if _measured(results, model, workload)]
    parts += ["\n".join(_speeds(results, model, workload, names)) for workload in measured]
    parts += ["\n".join(lines) for workload in measured if (lines := list(_kernels(results, model, workload, names)))]
    parts.append("\n".join(_artifacts(results, model, names)))
    if lines := list(_errors(results, model, names)):
        parts.append("\n".join(lines))
    if found := goals(results, model):
        parts.append("\n".join(map(str, found)))
    parts += [f"skipped: {system}: {reason}" for system, reason in skipped.items()]
    waiting = [workload.name for workload in WORKLOADS.values() if workload not in measured]
    if waiting:
        parts.append(f"not measured: {', '.join(waiting)}")
    return "\n\n".join(parts)


def _measured(results: Results, model: str, workload: Workload) -> bool:
    return workload.name in results.get(f"time/{model}/{workload.kind}", {"limits": {}})["limits"]


def _speeds(results: Results, model: str, workload: Workload, names: Sequence[str]) -> Iterator[str]:
    """One workload's table."""
    limits = results[f"time/{model}/{workload.kind}"]["limits"][workload.name]
    rates = ", ".join(f"{name} {rate / 1e9:.0f} Gop/s" for name, rate in limits.items() if name != "read")
    yield f"{TITLES[workload.kind].format(workload.size)}; limits: read {limits['read'] / 1e9:.1f} GB/s, {rates}"
    yield (
        f"{'':22}{'tokens/s':>9}{'ms a step':>11}{'10..90 %':>19}{'GB/s':>8}{'of reading':>11}"
        f"{'Gop/s':>8}{'of limit':>9}{'error':>9}"
    )
    for name in names:
        item = speed(results, model, name, workload.name)
        if item is None:
            continue
        seconds = item.ms / 1e3
        share = "-" if item.arithmetic_share is None else f"{item.arithmetic_share:.0%}"
        deviation = results[f"time/{model}/{workload.kind}"]["systems"][name]["deviation"]
        yield (
            f"{name:22}{item.rate:>9.1f}{item.ms:>11.2f}{f'{item.low:.2f}..{item.high:.2f}':>19}"
            f"{item.bytes / seconds / 1e9:>8.1f}{item.read_share:>11.0%}"
            f"{item.operations / seconds / 1e9:>8.0f}{share:>9}{deviation:>9.2g}"
        )


def _kernels(results: Results, model: str, workload: Workload, names: Sequence[str]) -> Iterator[str]:
    """Where each contender whose kernels are known spends a step."""
    stage = results[f"time/{model}/{workload.kind}"]
    limits = stage["limits"][workload.name]
    for name in names:
        item = stage["systems"].get(name, {}).get("workloads", {}).get(workload.name, {})
        if item.get("kernels"):
            dtype = next((dtype for dtype in CONTENDERS[name].arithmetic if dtype in limits), "float32")
            yield f"{name}, {workload.name}: where {item['ms']:.2f} ms go"
            yield from describe_losses(item["kernels"], limits, dtype, item["ms"], item["ms"])


TITLES = {"decode": "decoding {} at once, behind prompts", "prompt": "a prompt of {}"}


def _artifacts(results: Results, model: str, names: Sequence[str]) -> Iterator[str]:
    """Sizes, times of building and starting, memory."""
    dimensions = MODELS[model]
    weights = dimensions.layer_weights + 2 * dimensions.head_weights
    heading = f"{'':22}{'size MiB':>9}{'bits':>7}{'build s':>9}"
    yield heading + f"{'first token s':>15}{'low..high':>14}{'peak MiB':>10}{'beside MB':>11}"
    starts = results.get(f"start/{model}", {"systems": {}})["systems"]
    for name in names:
        built = results.get(f"build/{model}/{name}", {"error": ""})
        if "error" in built:
            continue
        line = f"{name:22}{built['bytes'] / 2**20:>9.0f}{8 * built['bytes'] / weights:>7.2f}{built['seconds']:>9.1f}"
        if "error" not in (start := starts.get(name, {"error": ""})):
            beside = (start["peak_bytes"] - built["bytes"] - start["cache_total"]) / 1e6
            spread = f"{start['low']:.2f}..{start['high']:.2f}"
            line += f"{start['seconds']:>15.2f}{spread:>14}{start['peak_bytes'] / 2**20:>10.0f}{beside:>11.0f}"
        yield line


def _errors(results: Results, model: str, names: Sequence[str]) -> Iterator[str]:
    """What went wrong, once for every contender and reason."""
    stages = [
        results.get(f"{stage}", {"systems": {}})
        for stage in (f"time/{model}/decode", f"time/{model}/prompt", f"start/{model}")
    ]
    found = [
        (name, stage["systems"][name]["error"])
        for name in names
        for stage in stages
        if "error" in stage["systems"].get(name, {})
    ]
    yield from dict.fromkeys(f"{name}: {error}" for name, error in found)


def has_errors(results: Results, model: str) -> bool:
    """Whether any contender failed in any stage."""
    return any(True for _ in _errors(results, model, list(CONTENDERS)))

"""The tables of the GPU benchmark: ratios, fractions of what was measured as the ceiling, geometric means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .gpu_units import RIVALS, Unit
from .state import describe

Results = Mapping[str, Mapping[str, Any]]


def report(machine: Mapping[str, Any], results: Results, planned: Sequence[Unit]) -> str:
    """All tables as text. What was not measured says so."""
    parts = [describe(machine)]
    parts += ["\n".join(lines) for lines in (
        list(_ceilings(results)), list(_templates(results, planned)), list(_models(results, planned)),
        list(_rates(results, planned, "matmul", "torch.matmul", "matmul rate")),
        list(_rates(results, planned, "attention", "scaled_dot_product_attention", "matmul rate")),
        list(_rates(results, planned, "matvec", "torch.matmul", "copy bandwidth")),
        list(_single(results, planned, "overhead")), list(_single(results, planned, "startup")),
    ) if lines]  # fmt: skip
    missing = [unit.name for unit in planned if unit.name not in results]
    if missing:
        parts.append(f"not measured: {len(missing)} of {len(planned)} units; run again to go on ({missing[0]} is next)")
    failed = [name for name, result in results.items() if "error" in result]
    parts += [f"failed: {name}: {results[name]['error']}" for name in failed]
    return "\n\n".join(parts)


def summary(results: Results) -> dict[str, float]:
    """The numbers that goals are stated in; only those that can be had from the results."""
    found: dict[str, float] = {}
    for batch in (1, 8, 64):
        for rival in RIVALS:
            ratios = [ratio for *_, ratio in _ratios(results, batch, rival)]
            if ratios:
                found[f"models/{batch}/{rival}"] = geometric_mean(ratios)
    for group in ("matmul", "attention", "matvec"):
        ratios = [item["torch_us"] / item["us"] for item in _good(results, group)]
        if ratios:
            found[f"{group}/ratio/least"] = min(ratios)
            found[f"{group}/ratio/mean"] = geometric_mean(ratios)
    copy = _ceiling(results, "copy")
    if copy:
        rates = [item["bytes"] / item["us"] * 1e6 / copy for item in _good(results, "matvec")]
        found |= {"matvec/bandwidth/least": min(rates)} if rates else {}
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def _good(results: Results, group: str) -> list[Mapping[str, Any]]:
    return [item for name, item in results.items() if name.startswith(f"{group}/") and "error" not in item]


def _ceiling(results: Results, name: str) -> float:
    return float(results.get(f"ceiling/{name}", {}).get("rate", 0.0))


def _ratios(results: Results, batch: int, rival: str) -> Iterator[tuple[str, float, float, float]]:
    """(model and dtype, our milliseconds, theirs, theirs over ours)."""
    for name, item in results.items():
        parts = name.split("/")
        if parts[0] != "model" or parts[3] != str(batch) or parts[4] != "tilewright" or "error" in item:
            continue
        other = results.get("/".join([*parts[:4], rival]), {"error": ""})
        if "error" not in other:
            yield f"{parts[1]} {parts[2]}", item["ms"], other["ms"], other["ms"] / item["ms"]


def _ceilings(results: Results) -> Iterator[str]:
    copy, rate = _ceiling(results, "copy"), _ceiling(results, "matmul")
    yield f"copy bandwidth {copy / 1e12:.2f} TB/s" if copy else "copy bandwidth not measured"
    yield f"matmul rate {rate / 1e12:.0f} TFLOP/s (bfloat16)" if rate else "matmul rate not measured"


def _templates(results: Results, planned: Sequence[Unit]) -> Iterator[str]:
    names = [unit.name for unit in planned if unit.group == "template"]
    done = [results[name] for name in names if name in results]
    good = [item for item in done if item.get("good")]
    if names:
        yield f"templates against float64: {len(good)} of {len(names)} right, {len(names) - len(done)} not run"
    for name in names:
        item = results.get(name, {"good": True})
        if not item.get("good") and "error" not in item:
            yield f"  {name}: error {item['deviation']:.2g}, tolerance {item['tolerance']:g}"


def _models(results: Results, planned: Sequence[Unit]) -> Iterator[str]:
    if not any(unit.group == "model" for unit in planned):
        return
    yield f"{'model':24}{'batch':>6}{'tilewright':>13}" + "".join(f"{rival:>22}" for rival in RIVALS)
    labels = dict.fromkeys(tuple(unit.name.split("/")[1:4]) for unit in planned if unit.group == "model")
    for model, dtype, batch in labels:
        cells = [results.get(f"model/{model}/{dtype}/{batch}/{who}", {}) for who in ("tilewright", *RIVALS)]
        ours = cells[0].get("ms")
        line = f"{model + ' ' + dtype:24}{batch:>6}" + (f"{ours:10.3f} ms" if ours else f"{'-':>13}")
        for cell in cells[1:]:
            theirs = cell.get("ms")
            ratio = f" ({theirs / ours:5.2f}x)" if theirs and ours else ""
            line += f"{f'{theirs:.3f} ms{ratio}' if theirs else '-':>22}"
        yield line
    for key, value in summary(results).items():
        if key.startswith("models/"):
            _, batch, rival = key.split("/")
            yield f"geometric mean at batch {batch} against {rival}: {value:.2f}x"


def _rates(results: Results, planned: Sequence[Unit], group: str, rival: str, ceiling: str) -> Iterator[str]:
    names = [unit.name for unit in planned if unit.group == group]
    if not names:
        return
    by_bytes = ceiling == "copy bandwidth"
    limit = _ceiling(results, "copy" if by_bytes else "matmul")
    yield f"{group:36}{'tilewright':>14}{rival:>32}{'of the ' + ceiling:>26}"
    for name in names:
        item = results.get(name, {})
        label = name.removeprefix(f"{group}/")
        if "us" not in item:
            yield f"{label:36}{'-':>14}"
            continue
        rate = item["bytes" if by_bytes else "flops"] / item["us"] * 1e6
        share = f"{rate / limit:.0%}" if limit else "-"
        theirs = f"{item['torch_us']:.1f} us ({item['torch_us'] / item['us']:5.2f}x)"
        yield f"{label:36}{item['us']:11.1f} us{theirs:>32}{share:>26}"


def _single(results: Results, planned: Sequence[Unit], group: str) -> Iterator[str]:
    for unit in planned:
        if unit.group == group:
            item = results.get(unit.name, {})
            if "error" in item:
                continue
            text = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in item.items()) or "not measured"
            yield f"{unit.name}: {text}"

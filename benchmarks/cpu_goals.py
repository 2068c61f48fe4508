"""The goals of the CPU benchmark: what was measured beside what it has to reach, line by line."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cpu_ratios import OURS, WITH_NUMPY, Results, fastest_peer
from .cpu_units import CONVOLUTIONAL, TRANSFORMERS, Case

LEAST_TRANSFORMERS = {"fp32": 1.00, "bf16": 0.95}
LEAST_CONVOLUTIONAL = {"fp32": 1.15, "bf16": 0.95}
LEAST_MATMULS = {"float32": 0.92, "bfloat16": 0.85}
MOST_COMPILE, MOST_START, MOST_MEMORY = 0.5, 0.5, 1.0

LARGE_MATMULS = ("bert 128 ", "minilm 8x64 ", "vit 197 ", "square ")
"""How the names of large products' rows in benchmarks.kernels begin, after their dtype."""


@dataclass(frozen=True)
class Goal:
    """One number that has to be reached.

    Attributes:
        text: what it is.
        value: as measured.
        limit: that it has to reach, or with ``at_most`` may reach.
        at_most: whether less is better.
    """

    text: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "at most" if self.at_most else "at least"
        return f"{'reached' if self.reached else 'MISSED':8}{self.value:6.2f}  ({sign} {self.limit:.2f})  {self.text}"


def goals(results: Results, planned: Sequence[Case], matmuls: Sequence[Mapping[str, Any]] = ()) -> list[Goal]:
    """All goals whose numbers can be had.

    Args:
        results: of all stages.
        planned: cases to judge.
        matmuls: rows of benchmarks.kernels: name, dtype, threads, and the share of the limit.
    """
    found: list[Goal] = []
    for precision in dict.fromkeys(case.precision for case in planned):
        cases = [case for case in planned if case.precision == precision]
        for what, latency in (("latency", True), ("throughput", False)):
            chosen = [case for case in cases if case.latency == latency]
            found += _ratios(results, chosen, precision, what)
        found += _shares(results, [case for case in cases if case.latency], precision)
    return found + list(_matmuls(matmuls))


def _ratios(results: Results, cases: Sequence[Case], precision: str, what: str) -> Iterator[Goal]:
    ratios = {case.model: peer for case in cases if (peer := fastest_peer(results, case)) is not None}
    for model in TRANSFORMERS:
        if model in ratios:
            peer, value = ratios[model]
            yield Goal(f"{precision} {what} of {model} to {peer}", value, LEAST_TRANSFORMERS[precision])
    images = {model: ratios[model] for model in CONVOLUTIONAL if model in ratios}
    if images:
        each = ", ".join(f"{model} {value:.2f} to {peer}" for model, (peer, value) in images.items())
        mean = statistics.geometric_mean([value for _, value in images.values()])
        text = f"{precision} {what} of convolutional networks, geometric mean ({each})"
        yield Goal(text, mean, LEAST_CONVOLUTIONAL[precision])


def _shares(results: Results, cases: Sequence[Case], precision: str) -> Iterator[Goal]:
    """Compile time, start-up and memory beside a peer's, for the model where they are worst."""
    compiles: dict[str, float] = {}
    starts: dict[str, float] = {}
    memories: dict[str, float] = {}
    asides: dict[tuple[str, str], str] = {}
    for case in cases:
        builds = [results.get(f"build/{case.name}/{name}", {}).get("seconds") for name in (OURS, "aotinductor")]
        if all(builds):
            compiles[case.model] = builds[0] / builds[1]
        systems = results.get(f"start/{case.name}", {"systems": {}})["systems"]
        good = {name: item for name, item in systems.items() if "error" not in item}
        if OURS in good and len(good) > 1:
            for shares, key in ((starts, "seconds"), (memories, "peak_bytes")):
                best = min(item[key] for name, item in good.items() if name != OURS)
                shares[case.model] = good[OURS][key] / best
                asides[key, case.model] = _aside(results[f"start/{case.name}"], key, best)
    for text, key, shares, limit in (
        ("compile time as a share of AOTInductor's", "compile", compiles, MOST_COMPILE),
        ("start-up as a share of the fastest peer's", "seconds", starts, MOST_START),
        ("peak memory as a share of the leanest peer's", "peak_bytes", memories, MOST_MEMORY),
    ):
        for model, value in shares.items():
            aside = asides.get((key, model), "")
            yield Goal(f"{precision} {text}: {model}{aside}", value, limit, at_most=True)


def _aside(started: Mapping[str, Any], key: str, best: float) -> str:
    """What else was started in the same turns, as shares of a peer's, and whether Tilewright did without numpy."""
    found = []
    if key in started.get(WITH_NUMPY, {}):
        found.append(f"without numpy; with it {started[WITH_NUMPY][key] / best:.2f}")
    if key == "seconds" and key in started.get("python", {}):
        found.append(f"Python and numpy alone {started['python'][key] / best:.2f}")
    return f" ({', '.join(found)})" if found else ""


def _matmuls(rows: Sequence[Mapping[str, Any]]) -> Iterator[Goal]:
    for dtype, limit in LEAST_MATMULS.items():
        large = [row for row in rows if row["dtype"] == dtype and _is_large(row["name"])]
        for threads in sorted({row["threads"] for row in large}):
            shares = {row["name"]: row["share"] for row in large if row["threads"] == threads}
            least = min(shares, key=lambda name: shares[name])
            text = f"{dtype} large products on {threads} threads, share of the limit, geometric mean of {len(shares)}"
            text += f" (least {shares[least]:.2f}: {least}{_of_blas(large, threads)})"
            yield Goal(text, statistics.geometric_mean(list(shares.values())), limit)


def _of_blas(rows: Sequence[Mapping[str, Any]], threads: int) -> str:
    """The share that numpy's BLAS reaches with the same products, where it took part in all of them."""
    rates = [(row.get("blas_rate"), row["limit"]) for row in rows if row["threads"] == threads and "limit" in row]
    if not rates or not all(rate for rate, _ in rates):
        return ""
    return f"; numpy's BLAS {statistics.geometric_mean([rate / limit for rate, limit in rates]):.2f}"


def _is_large(name: str) -> bool:
    return name.removeprefix("bf16 ").startswith(LARGE_MATMULS)

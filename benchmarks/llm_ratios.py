"""What the numbers of the benchmark of language models are compared by: rates, bytes, and the processor's limits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .llm_units import CONTENDERS, MODELS, WORKLOADS

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Speed:
    """One contender at one workload.

    Attributes:
        ms: of a step, the median.
        low: the 10th percentile of that.
        high: the 90th.
        rate: tokens per second.
        bytes: that a step has to read: weights once, and the caches of the positions that it sees.
        operations: multiplications and additions of a step.
        read_share: bytes per second as a share of what the processor reads: the median over turns, each beside the
            same round's limit, as machines drift.
        arithmetic_share: operations per second as a share of the limit for the contender's arithmetic; ``None``
            where the processor has no such limit.
        turns: the median milliseconds of every turn.
    """

    ms: float
    low: float
    high: float
    rate: float
    bytes: float
    operations: float
    read_share: float
    arithmetic_share: float | None
    turns: list[float]


def speed(results: Results, model: str, contender: str, workload: str) -> Speed | None:
    """A contender's speed at a workload; ``None`` where it was not measured."""
    asked, dimensions = WORKLOADS[workload], MODELS[model]
    stage = results.get(f"time/{model}/{asked.kind}")
    item = stage["systems"].get(contender) if stage else None
    if stage is None or item is None or workload not in item.get("workloads", {}):
        return None
    found, limits = item["workloads"][workload], stage["limits"][workload]
    seconds = found["ms"] / 1e3
    positions = found["positions"]
    prompt = asked.kind == "prompt"
    pairs = positions * (positions + 1) / 2 if prompt else positions
    read = item["weight_bytes"] + item["cache_bytes"] * positions
    operations = dimensions.operations(asked.size, 1 if prompt else asked.size, round(pairs))
    limit = next((limits[name] for name in CONTENDERS[contender].arithmetic if name in limits), None)
    return Speed(
        ms=found["ms"],
        low=found["low"],
        high=found["high"],
        rate=asked.tokens / seconds,
        bytes=read,
        operations=operations,
        read_share=statistics.median(
            read / (ms / 1e3) / turn["read"]
            for ms, turn in zip(found["turns"], stage["limit_turns"][workload], strict=False)
        ),
        arithmetic_share=operations / seconds / limit if limit else None,
        turns=found["turns"],
    )


def ratio(results: Results, model: str, workload: str, ours: str, theirs: str) -> float | None:
    """How many times faster ours is: the median over turns, each beside the same round's, as machines drift."""
    found = [speed(results, model, name, workload) for name in (theirs, ours)]
    if found[0] is None or found[1] is None:
        return None
    return statistics.median(their / our for their, our in zip(found[0].turns, found[1].turns, strict=False))


def fastest(results: Results, model: str, workload: str, system: str) -> str | None:
    """The contender of a system with the highest rate at a workload."""
    rates = {
        name: item.rate
        for name, contender in CONTENDERS.items()
        if contender.system == system and (item := speed(results, model, name, workload))
    }
    return max(rates, key=lambda name: rates[name]) if rates else None

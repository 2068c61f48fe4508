"""What the CPU benchmark's numbers are compared by: the processor's limits, and the systems' times turn by turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from .cpu_units import PRECISIONS, Case

Results = Mapping[str, Mapping[str, Any]]
OURS = "tilewright"
WITH_NUMPY = "tilewright_numpy"
"""In a start's results: Tilewright with numpy arrays. Records before it have that as Tilewright's only start."""


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

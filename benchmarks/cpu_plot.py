"""The plot of the CPU benchmark: every system's speed as a share of the processor's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cpu_ratios import Results, bound_ms, timed_systems
from .cpu_units import SYSTEMS, Case

COLOURS = ("#c8432b", "#b9bdc4", "#8f96a1", "#6a7280", "#5b8db8", "#2f5d8a")


def plot(results: Results, planned: Sequence[Case], path: Path) -> bool:
    """Write a PNG with one panel for latency and one for throughput; whether there was anything to show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    measured = [case for case in planned if timed_systems(results, case)]
    panels = [
        (title, chosen)
        for title, latency in (("One request at a time", True), ("Batches of 8", False))
        if (chosen := [case for case in measured if case.latency == latency])
    ]
    if not panels:
        return False
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.2 * len(panels)), squeeze=False)
    for (title, chosen), axis in zip(panels, axes[:, 0], strict=True):
        names = [name for name in SYSTEMS if any(name in timed_systems(results, case) for case in chosen)]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            shares = [
                bound_ms(results, case) / item["ms"] if (item := timed_systems(results, case).get(name)) else 0.0
                for case in chosen
            ]
            left = [position + (index - (len(names) - 1) / 2) * width for position in range(len(chosen))]
            colour = COLOURS[list(SYSTEMS).index(name)]
            axis.bar(left, shares, width * 0.92, label=SYSTEMS[name].label, color=colour)
        several = len({case.precision for case in chosen}) > 1
        names = [case.model.replace("_", "\n", 1) for case in chosen]  # of two lines, so that long ones do not meet
        labels = [f"{name}\n{case.precision}" if several else name for name, case in zip(names, chosen, strict=True)]
        axis.set_xticks(range(len(chosen)), labels, fontsize=8)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylabel("share of the limit")
        axis.set_title(title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4)
        axis.set_axisbelow(True)
    axes[0, 0].legend(ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True

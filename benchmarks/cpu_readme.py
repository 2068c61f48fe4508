"""The README's tables and plots of speed, from records of the CPU benchmark.

    python -m benchmarks.cpu_readme             # the newest record in benchmarks/results of each set of instructions
    python -m benchmarks.cpu_readme benchmarks/results/2026-11-21-cpu-systems.json

Rewrites what lies between two comments in README.md; run it after every run that is to be shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cpu_ratios import OURS, WITH_NUMPY, fastest_peer, timed_systems
from .cpu_units import MODELS, PRECISIONS, SYSTEMS, Case, cases
from .state import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- written by python -m benchmarks.cpu_readme -->"
END = "<!-- up to here -->"


def newest() -> list[Path]:
    """The newest record of all systems for each set of instructions, the widest first."""
    found: dict[str, Path] = {}
    for path in sorted(RESULTS.glob("????-??-??-cpu-systems.json")):
        found[instructions(json.loads(path.read_text()))] = path
    return [found[name] for name in sorted(found, reverse=True)]


def instructions(record: Mapping[str, Any]) -> str:
    """The instruction set of a record's processor, such as ``x86-64-v4+vnni+bf16``."""
    return str(record["machine"]["instructions"])


def sections(records: Sequence[Path]) -> str:
    """What records show, one after another."""
    paths = [path.resolve() for path in records]
    return "\n\n".join(section(json.loads(path.read_text()), path.relative_to(ROOT).as_posix()) for path in paths)


def section(record: Mapping[str, Any], path: str) -> str:
    """Tables, plot and goals of a record as Markdown.

    Args:
        record: what benchmarks.cpu wrote.
        path: of the record, as the README links it.
    """
    results = record["results"]
    planned = [case for case in cases(list(MODELS), list(PRECISIONS)) if OURS in timed_systems(results, case)]
    parts = [f"**{instructions(record)}**"]
    for title, latency in (("One request at a time", True), ("Batches of 8", False)):
        if chosen := [case for case in planned if case.latency == latency]:
            parts.append("\n".join(_table(results, chosen, title)))
    parts.append(f"![Every system's speed as a share of the processor's limit]({Path(path).with_suffix('.png')})")
    both = any(WITH_NUMPY in results.get(f"start/{case.name}", {}) for case in planned)
    missed = [goal for goal in record["goals"] if not goal["reached"]]
    parts.append(
        f"{describe(record['machine'])}: medians of interleaved runs on {record['date']} ([the record]({path})), "
        "times faster as the median over turns, which drift less than whole runs do. "
        + (
            "Start-up and memory are those of a process without numpy; in parentheses with numpy arrays. "
            if both
            else ""
        )
        + f"Of {len(record['goals'])} goals {len(record['goals']) - len(missed)} are reached."
    )
    return "\n\n".join(parts)


def _digits(number: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _table(results: Mapping[str, Any], chosen: Sequence[Case], title: str) -> Iterator[str]:
    latency = chosen[0].latency
    heads = [title, "precision", "Tilewright, ms", "fastest other, ms", "times faster"]
    heads += ["start-up, s", "memory, MiB"] if latency else []
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for case in chosen:
        systems, peer = timed_systems(results, case), fastest_peer(results, case)
        several = f", {case.batch} at once" if latency and case.batch > 1 else ""
        cells = [f"{case.model}{several}", case.precision, _digits(systems[OURS]["ms"])]
        cells.append(f"{_digits(systems[peer[0]]['ms'])} ({SYSTEMS[peer[0]].label})" if peer else "-")
        cells.append(f"{peer[1]:.2f}" if peer else "-")
        if latency:
            started = results.get(f"start/{case.name}", {"systems": {}})
            start, other = started["systems"].get(OURS, {}), started.get(WITH_NUMPY, {})
            aside = f" ({other['seconds']:.2f})" if "seconds" in other else ""
            cells.append(f"{start['seconds']:.2f}{aside}" if "seconds" in start else "-")
            aside = f" ({other['peak_bytes'] / 2**20:.0f})" if "peak_bytes" in other else ""
            cells.append(f"{start['peak_bytes'] / 2**20:.0f}{aside}" if "peak_bytes" in start else "-")
        yield f"| {' | '.join(cells)} |"


def replaced(readme: str, text: str) -> str:
    """The README with another text between the comments.

    Raises:
        ValueError: it does not have them, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="*", help="JSON that benchmarks.cpu wrote")
    options = parser.parse_args()
    records = options.record or newest()
    if not records:
        print("there is no record: run python -m benchmarks.cpu first", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(), sections(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run of the passes leaves to read: per pass the graph before and after, a diff, the report, the time.

D/passes.json                  one entry per pass: name, label, seconds, nodes, changes, refusals, error
D/03_fold_batch_norm/before.txt, after.txt, diff, report.txt
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Note, Report

if TYPE_CHECKING:
    from .manager import PassRecord


def write_pass(directory: Path, record: PassRecord, before: str, after: str | None, failure: str = "") -> None:
    """Write one pass's folder; ``after`` is None when the pass raised, and then ``failure`` says why."""
    folder = directory / record.label
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "before.txt").write_text(before)
    if after is not None:
        (folder / "after.txt").write_text(after)
        (folder / "diff").write_text(readable_diff(before, after))
    (folder / "report.txt").write_text(readable_report(record, failure))


def write_summary(directory: Path, records: Sequence[PassRecord]) -> None:
    """Write ``passes.json`` for machines: a list in the order of the passes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "passes.json").write_text(json.dumps([_as_json(record) for record in records], indent=1) + "\n")


def readable_diff(before: str, after: str) -> str:
    """A unified diff of two printed graphs; empty when they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", n=2, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def changed_nodes(before: str, after: str) -> list[str]:
    """The names of the nodes that are new or different in ``after``, in order."""
    old = set(before.splitlines())
    lines = (line.strip() for line in after.splitlines() if line not in old)
    return [line.split()[0] for line in lines if line.startswith("%")]


def readable_report(record: PassRecord, failure: str = "") -> str:
    """The report in words: the time, what was rewritten, what was refused and why."""
    lines = [f"{record.label}: {record.seconds * 1e3:.1f} ms, {record.nodes_before} -> {record.nodes_after} nodes"]
    if record.error is not None:
        lines.append(f"largest error of an output against the graph before all passes: {record.error:.3g}")
    if failure:
        lines += ["", "FAILED", f"  {failure}"]
    lines += _notes("rewritten", record.report.changes) + _notes("refused", record.report.refusals)
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """One line: how much was rewritten and refused."""
    return f"{len(report.changes)} rewritten, {len(report.refusals)} refused"


def _notes(title: str, notes: Sequence[Note]) -> list[str]:
    return ["", f"{title} ({len(notes)})", *(f"  %{note.node}: {note.text}" for note in notes)]


def _as_json(record: PassRecord) -> dict[str, Any]:
    return {
        "label": record.label,
        "name": record.name,
        "seconds": round(record.seconds, 6),
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "error": record.error,
        "changes": [{"node": note.node, "text": note.text} for note in record.report.changes],
        "refusals": [{"node": note.node, "text": note.text} for note in record.report.refusals],
    }

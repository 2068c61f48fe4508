"""Runs passes in order and does the chores around them: timing, checks, dumps, verification, switching passes off.

Each pass has a name (its file's) and a label (its place and name, ``03_fold_batch_norm``). Where a name is asked for, a
label is taken as well, so that one of two runs of the same pass can be meant.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from ..runtime.errors import CompileError, NumericsError, TilewrightError, UsageError
from .base import Pass, Report
from .dump import changed_nodes, summary, write_pass, write_summary
from .graph.printer import show, show_operator
from .graph.program import Program
from .verify import (
    beyond_tolerance,
    check_outputs,
    check_shapes,
    check_structure,
    compare,
    fixed_symbols,
    interface_of,
    run_eager,
    tolerances_of,
)

_LISTED = 12


@dataclass
class PassRecord:
    """What one pass did: its report, how long it took, the size of the graph around it.

    ``error`` is the largest error of an output against the program before all passes, where passes are verified.
    """

    name: str
    label: str
    seconds: float = 0.0
    report: Report = field(default_factory=Report)
    nodes_before: int = 0
    nodes_after: int = 0
    error: float | None = None


@dataclass(frozen=True)
class Reference:
    """The outputs before all passes, and how far each may move."""

    values: tuple[Any, ...]
    limits: list[float]


class PassManager:
    """Runs a list of passes over a program.

    Args:
        passes: in order.
        dump_dir: where to write what every pass did (see ``dump.py``); None writes nothing.
        verify: run every intermediate graph in eager PyTorch on the sample inputs and recompute all shapes.
        disabled: names or labels of passes to leave out.
        stop_after: name (the last pass of that name) or label of the pass to stop after.
        precision: what the program was asked to compute in, which sets the tolerances.
        progress: called with a label before that pass runs.
        before_approximate: called with the program before a pass that changes numbers on purpose.

    Raises:
        UsageError: a name that no pass has; close matches are named.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        dump_dir: Path | str | None = None,
        verify: bool = False,
        disabled: Iterable[str] = (),
        stop_after: str | None = None,
        precision: str = "auto",
        progress: Callable[[str], None] | None = None,
        before_approximate: Callable[[Program], None] | None = None,
    ) -> None:
        labelled = [(f"{index:02d}_{one.name}", one) for index, one in enumerate(passes, 1)]
        off = set(disabled)
        for name in sorted(off):
            _require(name, labelled)
        if stop_after is not None:
            _require(stop_after, labelled)
            last = max(i for i, (label, one) in enumerate(labelled) if stop_after in (label, one.name))
            labelled = labelled[: last + 1]
        self.passes = [(label, one) for label, one in labelled if not {label, one.name} & off]
        self.dump_dir = Path(dump_dir) if dump_dir is not None else None
        self.verify = verify
        self.precision = precision
        self.progress = progress
        self.before_approximate = before_approximate

    def run(self, program: Program) -> list[PassRecord]:
        """Rewrite the program in place; one record per pass that ran.

        Raises:
            CompileError: a pass failed or left a malformed graph; names the pass and the node.
            NumericsError: the first pass after which an output is beyond tolerance; only where passes are verified.
        """
        records: list[PassRecord] = []
        reference = Reference(run_eager(program), tolerances_of(program, self.precision)) if self.verify else None
        try:
            for label, one in self.passes:
                if self.progress:
                    self.progress(label)
                records.append(PassRecord(one.name, label))
                if one.approximate and self.before_approximate is not None:
                    self.before_approximate(program)
                self._run_one(program, one, records, reference)
                if one.approximate and reference is not None:
                    reference = Reference(run_eager(program), reference.limits)
        finally:
            if self.dump_dir:
                write_summary(self.dump_dir, records)
        return records

    def _run_one(self, program: Program, one: Pass, records: list[PassRecord], reference: Reference | None) -> None:
        record = records[-1]
        text = self.dump_dir is not None or self.verify
        before = show(program) if text else ""
        interface = interface_of(program)
        record.nodes_before = len(program.graph.nodes)
        started = time.perf_counter()
        try:
            with fixed_symbols(program):
                one.run(program, record.report)
            record.seconds = time.perf_counter() - started
            record.nodes_after = len(program.graph.nodes)
            after = show(program) if text else ""
            if record.report.changed:
                check_structure(program, interface)
            elif before != after:
                raise CompileError("the graph changed but the report has no change")
            if reference is not None:
                self._verify(program, record, reference, before, after, one.approximate)
        except Exception as error:
            record.seconds = record.seconds or time.perf_counter() - started
            failure = _failure(record, error)
            if self.dump_dir:
                write_pass(self.dump_dir, record, before, _show(program), failure)
            kind = type(error) if isinstance(error, TilewrightError) else CompileError
            earlier = [other.label for other in records[:-1] if other.report.changed]
            raise kind(_explain(record, failure, earlier)) from error
        if self.dump_dir:
            write_pass(self.dump_dir, record, before, after)

    def _verify(
        self, program: Program, record: PassRecord, reference: Reference, before: str, after: str, approximate: bool
    ) -> None:
        if before == after:
            return
        check_shapes(program)
        values = run_eager(program)
        errors = compare(reference.values, values)
        record.error = max(errors, default=0.0)
        if not approximate and beyond_tolerance(reference.values, errors, reference.limits):
            changed = changed_nodes(before, after)
            more = f" and {len(changed) - _LISTED} more" if len(changed) > _LISTED else ""
            listed = f"; it changed {', '.join(changed[:_LISTED])}{more}"
            try:
                check_outputs(reference.values, values, "outputs moved beyond tolerance", reference.limits)
            except NumericsError as error:
                raise NumericsError(f"{error}{listed}") from None


def _require(name: str, labelled: Sequence[tuple[str, Pass]]) -> None:
    known = list(dict.fromkeys(one.name for _, one in labelled))
    labels = [label for label, _ in labelled]
    if name in known or name in labels:
        return
    close = difflib.get_close_matches(name, known + labels, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the passes are: {', '.join(known)}"
    raise UsageError(f"no pass is named {name!r}; {hint}")


def _failure(record: PassRecord, error: Exception) -> str:
    """What went wrong, at which node, and which rewrite came before it."""
    if isinstance(error, TilewrightError):
        return str(error)
    at = _node_at(error)
    where = f" at %{at.name} = {show_operator(at.target)}" if at is not None else ""
    noted = record.report.changes[-1:]
    last = f"; the last rewrite before it: %{noted[0].node}: {noted[0].text}" if noted else ""
    return f"{type(error).__name__}{where}: {str(error).strip()}{last}"


def _node_at(error: Exception) -> fx.Node | None:
    """The node that a pass was looking at when it raised: the ``node`` of the innermost function that has one."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        value = trace.tb_frame.f_locals.get("node")
        found = value if isinstance(value, fx.Node) else found
        trace = trace.tb_next
    return found


def _explain(record: PassRecord, failure: str, earlier: Sequence[str]) -> str:
    before = f" Passes that changed the graph before it: {', '.join(earlier)}." if earlier else ""
    return (
        f"pass {record.label}: {failure} ({summary(record.report)}).{before} "
        f"To compile without it: --disable-pass {record.name}; to see what it did: --dump-dir DIR."
    )


def _show(program: Program) -> str:
    """The graph that a failed pass left, if it can be printed."""
    try:
        return show(program)
    except (KeyError, AttributeError, RuntimeError) as error:
        return f"(cannot be printed: {type(error).__name__}: {error})\n"

"""Progress of a compilation on standard error: a bar per phase on a terminal, a line per phase elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_COUNTED = re.compile(r"(\d+) of (\d+)\b")


@contextmanager
def phases(quiet: bool = False) -> Iterator[Callable[[str, str], None]]:
    """A function to call with (phase, what it is at), as the driver does; ``"3 of 8 ..."`` moves the phase's bar."""
    if quiet:
        yield lambda phase, detail: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _Lines()


class _Lines:
    """One line when a phase begins, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phase = ""

    def __call__(self, phase: str, detail: str) -> None:
        if phase != self._phase:
            self._phase = phase
            click.echo(f"[{time.perf_counter() - self._start:6.1f} s] {phase}", err=True)


class _Bars:
    """One rich task per phase; a phase ends when the next begins."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task: Any = None
        self._phase = ""

    def __call__(self, phase: str, detail: str) -> None:
        if phase != self._phase:
            self.finish()
            self._phase = phase
            self._task = self._progress.add_task(phase, total=None, detail="")
        counted = _COUNTED.search(detail)
        numbers = {"completed": int(counted[1]), "total": int(counted[2])} if counted else {}
        self._progress.update(self._task, detail=detail, **numbers)

    def finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1, total=1, detail="")
            self._task = None


@contextmanager
def _bars() -> Iterator[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class Elapsed(ProgressColumn):
        """Seconds of a phase, with one decimal."""

        def render(self, task: Any) -> Text:
            seconds = task.finished_time if task.finished else task.elapsed
            return Text(f"{seconds or 0.0:6.1f} s")

    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=24),
        Elapsed(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = _Bars(progress)
        yield bars
        bars.finish()

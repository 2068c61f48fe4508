"""What commands print: tables, JSON, and numbers for people."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click


def emit_json(data: Any, indent: int | None = 1) -> None:
    """Print a JSON document, on one line if ``indent`` is None.

    Numbers that JSON lacks are the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
    """
    click.echo(json.dumps(_plain(data), indent=indent, allow_nan=False))


def heading(text: str) -> None:
    """Print a heading, with an empty line before it."""
    click.echo()
    click.secho(text, bold=True)


def note(text: str) -> None:
    """A message to the user, on standard error."""
    click.echo(text, err=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> None:
    """Print a table: drawn on a terminal that is wide enough, else as columns of plain text.

    Nothing is cut or folded, so that names can be searched and copied.

    Args:
        columns: headings.
        rows: cells, shown by ``str``.
        align: ``l`` or ``r`` per column.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if sys.stdout.isatty() and sum(widths) + 3 * len(widths) <= shutil.get_terminal_size().columns:
        _draw(columns, cells, align)
        return
    for row in (columns, *cells):
        line = "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        )
        click.echo(line.rstrip())


def _draw(columns: Sequence[str], cells: Sequence[Sequence[str]], align: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, side in zip(columns, align, strict=True):
        drawn.add_column(Text(name), justify="right" if side == "r" else "left", no_wrap=True)
    for row in cells:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def show_bytes(count: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def show_seconds(seconds: float) -> str:
    """``1.23 s``, ``12.3 ms`` or ``45.6 us``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} us"


def show_sizes(sizes: Mapping[str, int]) -> str:
    """``batch=8, seq=64``."""
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data

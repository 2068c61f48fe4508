"""``tilewright tune``: which binaries of GPU kernels are fastest on the GPU at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import options
from .output import emit_json, note, show_seconds, show_sizes, table
from .progress import phases

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...runtime.cuda.tune import Measured
    from ...runtime.plan import Plan

HELP = """Measure the kernels' tiles of the artifact in DIR on a GPU, and record the fastest.

Every kernel that a call runs and that has several binaries is timed with each of them. The choice goes to tuned.json in
DIR, which is bound to the artifact and the kind of GPU; without it a model of the cost chooses. Needs no PyTorch.

\b
Examples:
  tilewright tune resnet50.tw
  tilewright tune encoder.tw --shape batch=8,seq=64 --shape batch=1,seq=16
  tilewright tune resnet50.tw --device cuda:1 --json
"""


@click.command(help=HELP, short_help="Measure the tiles of GPU kernels and record the fastest.")
@click.argument("artifact", metavar="DIR")
@click.option("--device", default="cuda:0", show_default=True, metavar="D", help="The GPU: cuda or cuda:N.")
@options.sizes_option("Sizes to measure at, as in batch=8,seq=64. Repeat for further ones. [default: the sample's]")
@options.entry
@click.option("--repeat", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Launches to time.")
@options.quiet
@options.as_json
def tune(
    artifact: str,
    device: str,
    shapes: tuple[str, ...],
    entry: str | None,
    repeat: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Tune an artifact."""
    from ...runtime.artifact import read_artifact
    from ...runtime.cuda.tune import tune as measure

    plans = read_artifact(artifact).devices.get("cuda", {})
    chosen = [plan for name, plan in plans.items() if entry in (None, name)] or list(plans.values())
    values = [_assignment(text, chosen) for text in shapes if chosen]
    with phases(quiet) as progress:
        done = measure(
            artifact, device=device, values=values or None, entries=[entry] if entry is not None else None,
            repeats=repeat, progress=lambda text: progress("measure", text),
        )  # fmt: skip
    if as_json:
        emit_json({"gpu": vars(done.gpu), "file": str(done.file), "measured": [vars(item) for item in done.measured]})
        return
    click.echo(f"measured on {done.gpu}; recorded in {done.file}")
    columns = ("entry", "step", "kernel", "at", "tiles", "chosen by cost", "time", "fastest", "time", "gain")
    table(columns, [_row(item) for item in done.measured], "lrllrlrlrr")
    if not done.measured:
        note("no kernel has a choice of binaries at these sizes")


def _assignment(text: str, plans: Iterable[Plan]) -> dict[str, int]:
    """Values by symbol, of the first entry point that has all the symbols that are named."""
    from ...runtime.errors import UsageError

    problem: UsageError | None = None
    for plan in plans:
        try:
            return options.parse_sizes((text,), plan)
        except UsageError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _row(item: Measured) -> tuple[Any, ...]:
    before, after = item.seconds[item.chosen], item.seconds[item.best]
    gain = f"{before / after:.2f}" if after else ""
    times = (item.chosen, show_seconds(before), item.best, show_seconds(after), gain)
    return (item.entry, item.step, item.kernel, show_sizes(item.values), len(item.seconds), *times)

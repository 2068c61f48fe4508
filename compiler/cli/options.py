"""Options that several commands share."""

from __future__ import annotations

from typing import Any

import click

from ...runtime.errors import UsageError
from ...runtime.plan import Plan

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
threads = click.option(
    "--threads", type=click.IntRange(1, 512), metavar="N", help="Threads per call. [default: all this process may use]"
)
device = click.option(
    "--device", default="auto", show_default=True, metavar="D",
    help="Where to run: cpu, cuda, cuda:N (the GPU's number), interpreter (GPU kernels, interpreted on the CPU), auto.",
)  # fmt: skip
entry = click.option("--entry", metavar="NAME", help="Entry point. [default: the artifact's first]")
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
source_shapes = click.option(
    "--shape", "shapes", multiple=True, metavar="NAME=DIMS",
    help="Dimensions of an input, as in 'input_ids=batch:1..64,seq:1..512'. Repeat for further inputs.",
)  # fmt: skip
sample_inputs = click.option(
    "--inputs", "inputs", metavar="FILE.npz", help="Sample inputs by name, instead of the source's own."
)


def sizes_option(text: str) -> Any:
    """``--shape SYMBOL=VALUE`` with a help text of the command's own."""
    return click.option("--shape", "shapes", multiple=True, metavar="SYMBOL=VALUE", help=text)


def parse_sizes(texts: tuple[str, ...], plan: Plan) -> dict[str, int]:
    """Values for all symbols of a plan: those given, as in ``batch=8,seq=64``, and the sample's for the rest.

    Raises:
        UsageError: no such symbol, no number, or outside of the symbol's range.
    """
    values = {symbol.name: symbol.sample for symbol in plan.symbols}
    ranges = plan.ranges()
    for text in (part for option in texts for part in option.split(",") if part.strip()):
        name, equals, number = (part.strip() for part in text.partition("="))
        if not equals or not number.isdecimal():
            raise UsageError(f"--shape {text.strip()!r}: expected SYMBOL=VALUE, such as batch=8")
        if name not in ranges:
            known = f"its symbols are {', '.join(ranges)}" if ranges else "all its sizes are fixed"
            raise UsageError(f"--shape {text.strip()!r}: entry point {plan.entry!r} has no symbol {name!r}; {known}")
        low, high = ranges[name]
        if not low <= int(number) <= high:
            raise UsageError(f"--shape {text.strip()!r}: {name} was compiled for {low} to {high}")
        values[name] = int(number)
    return values

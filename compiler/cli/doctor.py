"""``tilewright doctor``: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import options
from .output import emit_json, heading, show_bytes, table

if TYPE_CHECKING:
    from .machine import Finding

HELP = """Show what Tilewright finds on this machine, and what is wrong with it.

Versions, C compilers, the targets that fit the processor, GPUs and their driver, threads, the kernel cache and every
environment variable that Tilewright reads. Needs no PyTorch. With --build, a small library is also compiled with each
compiler and loaded.

\b
Examples:
  tilewright doctor
  tilewright doctor --build
  tilewright doctor --json

The exit code is 0 unless artifacts cannot run here (or --build fails for the compiler that would be used).
"""


@click.command(help=HELP, short_help="What this machine has, and what is wrong with it.")
@click.option("--build", is_flag=True, help="Compile and load a small library with each compiler.")
@options.as_json
def doctor(build: bool, as_json: bool) -> None:
    """Examine the machine."""
    from .machine import examine, problems_of

    found = examine(build)
    problems = problems_of(found)
    if as_json:
        emit_json(found | {"problems": [vars(item) for item in problems]})
    else:
        _show(found, problems)
    if any(item.serious for item in problems):
        raise click.exceptions.Exit(1)


def _show(found: dict[str, Any], problems: list[Finding]) -> None:
    click.echo(f"tilewright {found['tilewright']} on {found['platform']}, Python {found['python']}")
    heading("Packages")
    rows: list[tuple[str, ...]] = [
        (item["name"], item["version"] or "not installed", item["needs"], item["for"]) for item in found["packages"]
    ]
    table(("package", "version", "needed", "for"), rows, "llll")
    heading("Targets (--target)")
    rows = [(item["name"], _fits(item), " ".join(item["missing"])) for item in found["targets"]]
    table(("target", "", "this processor lacks"), rows, "lll")
    heading("GPUs")
    gpus = found["gpus"]
    if gpus["error"] is not None:
        click.echo(f"none can be used: {gpus['error']}")
    else:
        click.echo(f"NVIDIA's driver supports CUDA {gpus['driver']}")
    if gpus["devices"]:
        rows = [
            (item["device"], item["name"], item["capability"], show_bytes(item["memory"]), item["target"] or "none")
            for item in gpus["devices"]
        ]
        table(("device", "name", "capability", "memory", "target"), rows, "lllrl")
    click.echo(f"targets, which need no GPU to compile for: {', '.join(gpus['targets'])}")
    heading("C compilers (the first is used)")
    rows = [(item["kind"], item["version"], item["command"], item.get("build", "")) for item in found["compilers"]]
    table(("kind", "version", "command", "build"), rows, "llll")
    heading("Threads")
    threads = found["threads"]
    quota = "none" if threads["quota"] is None else f"{threads['quota']:g} processors"
    click.echo(
        f"{threads['default']} by default: {threads['processors']} processors, {threads['allowed']} allowed by the "
        f"affinity mask, quota {quota}"
    )
    heading("Kernel cache")
    cache = found["cache"]
    if cache["directory"] is None:
        click.echo("off" if cache["error"] is None else "cannot be used")
    else:
        click.echo(
            f"{cache['directory']}: {cache['entries']} objects, {show_bytes(cache['bytes'])} of at most "
            f"{show_bytes(cache['limit'])}"
        )
    heading("Environment variables")
    rows = [(item["name"], item["value"] or "", item["default"], item["meaning"]) for item in found["environment"]]
    table(("variable", "value", "without it", "meaning"), rows, "llll")
    heading("Problems" if problems else "No problems found")
    for item in problems:
        click.echo(f"- {item.what}\n  {item.remedy}")


def _fits(target: dict[str, Any]) -> str:
    if target["chosen"]:
        return "fits, and is what 'cpu' means here"
    return "fits" if target["fits"] else ""

"""``tilewright inspect``: what is in an artifact, without PyTorch and without executing anything of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from . import options
from .output import emit_json

if TYPE_CHECKING:
    from ...runtime.artifact import Artifact

SECTIONS = ("overview", "graph", "passes", "plan", "kernels", "memory", "weights", "quantization")

HELP = """Show what is inside the artifact in DIR. Nothing of it is executed, and no PyTorch is needed.

\b
Sections:
  overview  entry points, inputs and outputs, targets, sizes (the default)
  graph     the fused graph: every step with its operands and where it comes from
  passes    what each pass of the compiler rewrote and refused
  plan      symbols, checks, and every step with its kernels, guards and sources
  kernels   the kernels, what uses them, and their arithmetic; for GPUs also the registers, shared memory and spills
            of every tile, and which tiles were rejected
  memory    scratch memory against its lower bound, and the largest buffers
  weights   packed constants and the tensors that they were made of
  quantization  for every quantized weight what was asked for and applied, its size and its error
  kernel NAME  the source of one kernel

\b
Examples:
  tilewright inspect resnet50.tw
  tilewright inspect resnet50.tw memory --shape batch=16
  tilewright inspect resnet50.tw kernels --device cuda
  tilewright inspect resnet50.tw kernel conv_k3s1_64x64 | less
"""


@click.command(help=HELP, short_help="What is inside an artifact; executes nothing.")
@click.argument("artifact", metavar="DIR")
@click.argument("section", default="overview", metavar="[SECTION]")
@click.argument("name", required=False, metavar="[NAME]")
@options.entry
@options.sizes_option("Value of a size that varies, for amounts of memory and arithmetic. [default: the sample's]")
@click.option("--target", metavar="T", help="Whose kernel source to show. [default: the artifact's first]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Restrict it to one kind of device.")
@options.as_json
def inspect(
    artifact: str,
    section: str,
    name: str | None,
    entry: str | None,
    shapes: tuple[str, ...],
    target: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Inspect an artifact."""
    from ...runtime.artifact import read_artifact
    from ...runtime.errors import UsageError
    from . import facts
    from .sections import SHOW, describe, kernel_source

    if section not in (*SECTIONS, "kernel"):
        raise UsageError(f"there is no section {section!r}; the sections are {', '.join(SECTIONS)} and kernel NAME")
    if (name is not None) != (section == "kernel"):
        hint = f"'{section}' takes no name" if name else "name the kernel; 'tilewright inspect DIR kernels' lists them"
        raise UsageError(f"inspect {section}: {hint}")
    opened = read_artifact(artifact)
    if name is not None:
        found = kernel_source(opened, name, target)
        if as_json:
            emit_json(found)
        else:
            click.echo(found["source"], nl=False)
        return
    plans = facts.plans_of(opened)
    values = {one: options.parse_sizes(shapes, plans[one]) for one in _plans(opened, entry, device)}
    asked = values if shapes else None
    if as_json:
        emit_json(describe(section, opened, values, asked))
    else:
        SHOW[section](opened, values, asked)


def _plans(opened: Artifact, entry: str | None, device: str | None) -> list[str]:
    """Names of the plans that were asked for."""
    from ...codegen.artifact import plan_name
    from ...runtime.errors import UsageError

    if entry is not None and entry not in opened.plans:
        raise UsageError(f"there is no entry point {entry!r}; the artifact has {', '.join(opened.plans)}")
    if device is not None and device not in opened.devices:
        raise UsageError(f"the artifact has nothing for {device}, only for {', '.join(opened.devices)}")
    return [
        plan_name(one, kind)
        for kind, plans in opened.devices.items()
        for one in plans
        if entry in (None, one) and device in (None, kind)
    ]

"""``tilewright verify``: an artifact against eager PyTorch, kernel by kernel on request, or against its digests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from . import options
from .output import emit_json, heading, note, show_bytes, show_sizes, table
from .progress import phases

if TYPE_CHECKING:
    from ...passes.graph.program import Program
    from ...runtime.artifact import Artifact
    from ...runtime.plan import Plan, Port
    from ..options import CompileOptions, Task

PREPARES = "quantize"
"""The family of kernels that only prepare what a later one reads, and are compared as its part."""

HELP = """Check the artifact in DIR.

Given the SOURCE it was compiled from, the outputs are compared with eager PyTorch at several sizes: error =
max|a-b| / max|reference| per output, with one tolerance per dtype. A model of the registry need not be named again.
With --kernels, the result of every kernel is compared with its part of the graph as well, and the first that diverges
is named.

With --integrity, every file is compared with its digest, the weights too; this needs neither PyTorch nor SOURCE.

\b
Examples:
  tilewright verify resnet50.tw
  tilewright verify minilm.tw path/to/minilm --kernels
  tilewright verify net.tw net.onnx --inputs sample.npz
  tilewright verify net.tw --integrity
  tilewright verify small.tw net.onnx --device interpreter --kernels

GPU kernels can be verified without a GPU: --device interpreter runs them in Triton's interpreter, which is slow
(minutes for a large model).

\b
Exit codes: 4 when a result is beyond its tolerance, 5 when a file is damaged.
"""


@click.command(help=HELP, short_help="Compare an artifact with PyTorch, or check its files.")
@click.argument("artifact", metavar="DIR")
@click.argument("source", required=False, metavar="[SOURCE]")
@click.option("--kernels", is_flag=True, help="Compare the result of every kernel, too.")
@click.option("--integrity", is_flag=True, help="Compare all files with their digests.")
@options.source_shapes
@options.sample_inputs
@options.device
@options.threads
@options.quiet
@options.as_json
def verify(
    artifact: str,
    source: str | None,
    kernels: bool,
    integrity: bool,
    shapes: tuple[str, ...],
    inputs: str | None,
    device: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Verify an artifact."""
    from ...runtime.artifact import read_artifact, verify_integrity

    found: dict[str, Any] = {}
    opened = verify_integrity(artifact) if integrity else read_artifact(artifact)
    if integrity:
        count, size = len(opened.manifest.files), sum(record.size for record in opened.manifest.files)
        found["integrity"] = {"files": count, "bytes": size, "ok": True}
        if not as_json:
            click.echo(f"{artifact}: {count} files, {show_bytes(size)}: all digests match")
    if not integrity or source is not None or kernels:
        outputs, steps, others = _compare(opened, source, shapes, inputs, kernels, device, threads, quiet)
        found["outputs"] = [_plain(item) for item in outputs]
        if kernels or steps:
            together, missing = _counts(others)
            found |= {"kernels": [_plain(item) for item in steps]}
            found |= {"kernels_compared_with_later_ones": together, "kernels_not_compared": missing}
        if as_json:
            emit_json(found)
        else:
            _show(outputs, steps, others, kernels or bool(steps))
        _require(outputs, steps)
    elif as_json:
        emit_json(found)


def _compare(
    opened: Artifact, source: str | None, shapes: tuple[str, ...], inputs: str | None, kernels: bool, device: str,
    threads: int | None, quiet: bool,
) -> tuple[list[Any], list[Any], list[str]]:  # fmt: skip
    """Errors per output, errors per kernel, and the families of the steps without one."""
    from ...runtime.errors import UsageError
    from ...runtime.model import load

    source = source or _recorded_source(opened)
    with phases(quiet) as progress, redirect_stdout(sys.stderr):
        progress("import", "PyTorch and the compiler")
        from ..driver import Compilation
        from ..kernel_verification import verify_kernels
        from ..shapes import parse_options
        from ..verification import verify_outputs

        with load(opened.path, threads=threads, device=device) as model:
            kind = "cpu" if model.device == "cpu" else "cuda"
            chosen = _options(opened, kind)
            compilation = Compilation(chosen, progress)
            dimensions = parse_options(shapes)
            if not dimensions and chosen.task.name != "generate":
                dimensions = compiled_shapes(next(iter(opened.plans.values())))
            try:
                programs = compilation.capture(source, shapes=dimensions or None, inputs=inputs)
            except UsageError as error:
                if shapes:
                    raise
                raise UsageError(f"{source} does not fit what the artifact was compiled for: {error}") from error
            for program in programs:
                if program.name not in opened.plans:
                    raise UsageError(
                        f"{source} has the entry point {program.name!r}, the artifact {', '.join(opened.plans)}; an "
                        "artifact with entry points of its own is verified when it is compiled (from Python)"
                    )
                _require_same_inputs(program, opened.plans[program.name], source)
            quantized = chosen.quantize is not None
            lowered = compilation.rewrite(programs)[0][kind] if kernels or quantized else programs
            progress("PyTorch", kind)
            expected = compilation.expect(kind, programs, lowered)
            compilation.release()
            outputs: list[Any] = []
            steps: list[Any] = []
            others: list[str] = []
            for one in expected:
                name = one.lowered.name
                progress("outputs", name)
                entry = model.entry(name)
                found, results = verify_outputs(entry, one)
                outputs += found
                if kernels and not results:
                    progress("kernel results", name)
                    results = verify_kernels(entry, one.lowered, one.precision)
                if results:
                    compared = {item.step for item in results}
                    others += [step.family for at, step in enumerate(entry.plan.steps) if at not in compared]
                steps += results
    return outputs, steps, others


def _counts(families: Sequence[str]) -> tuple[int, int]:
    """Of steps without an error of their own: those that are a part of what a later one is compared as, and others."""
    together = families.count(PREPARES)
    return together, len(families) - together


def _options(opened: Artifact, kind: str) -> CompileOptions:
    """How the artifact was compiled, as far as it decides what the passes make of the model for a kind of device."""
    from ...runtime.errors import ArtifactError, UsageError
    from ..options import CompileOptions

    targets = tuple(item.name for item in opened.manifest.targets if item.name.startswith(f"{kind}:"))
    info = opened.manifest.info
    try:
        return CompileOptions(
            target=targets or (_ANY_TARGET[kind],),
            precision=info.get("precision", {}).get("requested", "auto"),
            disable_passes=frozenset(info.get("disabled_passes", ())),
            task=_task(info.get("generation")),
            quantize=info.get("quantization", {}).get("asked"),
            activations=info.get("quantization", {}).get("activations", "auto"),
        )
    except (UsageError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{opened.path}: does not say how it was compiled: {error}") from None


def _task(generation: dict[str, Any] | None) -> Task:
    """What an artifact was made for, as its manifest describes generation (None where it does not generate)."""
    from ..options import Task

    if generation is None:
        return Task("forward")
    cache = {"float32": "fp32", "bfloat16": "bf16"}.get(generation.get("cache_dtype", ""), "auto")
    limits = (generation.get("context"), generation.get("max_tokens", 2), generation.get("max_sequences", 2))
    return Task("generate", cache, *limits)


_ANY_TARGET = {"cpu": "cpu", "cuda": "cuda:sm_80"}


def compiled_shapes(plan: Plan) -> dict[str, str]:
    """The dimensions that an entry point was compiled for, in the dimension language.

    Raises:
        UsageError: an input has a size that the language cannot say.
    """
    from ...runtime.errors import UsageError

    ranges = plan.ranges()
    named: set[str] = set()

    def axis(port: Port, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        scaled, offset = size, 0
        if not isinstance(size, str) and size.op == "add" and len(size.args) == 2:
            scaled, offset = size.args
        symbol, factor = scaled, 1
        if not isinstance(scaled, str) and scaled.op == "mul" and len(scaled.args) == 2:
            symbol, factor = scaled.args
        if not isinstance(symbol, str) or not isinstance(factor, int) or not isinstance(offset, int) or offset < 0:
            raise UsageError(f"input {port.name!r} has sizes that depend on others; give its dimensions with --shape")
        text = (symbol if factor == 1 else f"{factor}*{symbol}") + (f"+{offset}" if offset else "")
        if symbol in named:
            return text
        named.add(symbol)
        low, high = ranges[symbol]
        return f"{text}:{low}..{high}"

    if not plan.symbols:
        return {}
    return {port.name: ",".join(axis(port, size) for size in port.shape) for port in plan.inputs if port.shape}


def _recorded_source(opened: Artifact) -> str:
    """The registry's model that an artifact says it was made of."""
    from ...models import registry
    from ...runtime.errors import UsageError

    recorded = opened.manifest.info.get("source")
    if recorded in registry.names():
        return str(recorded)
    raise UsageError(
        f"name the SOURCE to compare with, as in 'tilewright verify {opened.path} SOURCE' (the artifact was made of "
        f"{recorded or 'something it does not name'}), or check the files alone with --integrity"
    )


def _require_same_inputs(program: Program, plan: Plan, source: str) -> None:
    from ...runtime.errors import UsageError

    pairs = zip(program.inputs, program.sample, strict=True)
    captured = [(item.name, str(tensor.dtype).removeprefix("torch.")) for item, tensor in pairs]
    compiled = [(port.name, port.dtype) for port in plan.inputs]
    if captured != compiled:
        shown = (", ".join(f"{name}: {dtype}" for name, dtype in ports) for ports in (captured, compiled))
        raise UsageError("{} takes {}; the artifact was compiled from a model that takes {}".format(source, *shown))


def _show(outputs: Sequence[Any], steps: Sequence[Any], others: Sequence[str], kernels: bool) -> None:
    heading("Outputs against eager PyTorch")
    rows = [
        (item.entry, item.output, show_sizes(item.sizes), f"{item.error:.2e}", f"{item.tolerance:.0e}", _verdict(item))
        for item in outputs
    ]
    table(("entry", "output", "at", "error", "allowed", ""), rows, "lllrrl")
    if not kernels:
        return
    heading("Kernels against their part of the graph")
    rows = [
        (str(item.step), item.kernel, item.node, f"{item.error:.2e}", f"{item.tolerance:.0e}", _verdict(item))
        for item in steps
    ]
    table(("step", "kernel", "node", "error", "allowed", ""), rows, "rllrrl")
    together, missing = _counts(others)
    if together:
        note(f"{together} steps quantize the rows that a later kernel reads; they were compared as its part")
    if missing:
        note(f"{missing} steps write nothing that has a name in the graph; they were not compared one by one")


def _require(outputs: Sequence[Any], steps: Sequence[Any]) -> None:
    from ...runtime.errors import NumericsError

    bad_outputs = [item for item in outputs if not item.ok]
    bad_steps = [item for item in steps if not item.ok]
    if not bad_outputs and not bad_steps:
        return
    parts = []
    if bad_outputs:
        parts.append(f"{len(bad_outputs)} of {len(outputs)} outputs")
    if bad_steps:
        parts.append(f"{len(bad_steps)} of {len(steps)} kernel results")
    first = min(bad_steps, key=lambda item: item.step, default=None)
    hint = (
        f"; the first is step {first.step} ({first.kernel}, node {first.node})"
        if first is not None
        else "; --kernels compares the kernels one by one"
        if not steps
        else ""
    )
    raise NumericsError(f"{' and '.join(parts)} differ from eager PyTorch beyond tolerance{hint}")


def _verdict(item: Any) -> str:
    return "ok" if item.ok else "DIFFERS"


def _plain(item: Any) -> dict[str, Any]:
    return {**vars(item), "ok": item.ok}

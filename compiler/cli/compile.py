"""``tilewright compile``: a model in, an artifact out."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .output import emit_json, heading, note, show_bytes, show_seconds, show_sizes, table
from .progress import phases

if TYPE_CHECKING:
    from ...passes.manager import PassRecord
    from ..driver import Artifact, Compilation

HELP = """Compile SOURCE into the artifact directory given with -o.

\b
SOURCE is one of:
  path/to/checkpoint     a Hugging Face folder (config.json, *.safetensors)
  model.onnx             an ONNX file
  model.pt2              a program saved by torch.export.save
  path/to/file.py:build  a function that returns a module, or (module, args[, kwargs[, shapes]])
  resnet50               a model of the registry

\b
Sizes that vary are named per input, one entry per axis:
  --shape "input_ids=batch:1..64,seq:1..512"   two symbols and their ranges
  --shape "attention_mask=batch,seq"           the same symbols again
  --shape "image=batch:1..16,3,224,224"        fixed sizes are numbers
  --shape "x=1,16*h:2..32"                     multiples of 16, from 32 to 512

\b
Examples:
  tilewright compile path/to/minilm -o minilm.tw
  tilewright compile resnet50 -o resnet50.tw --target cpu:x86-64-v3,cpu:x86-64-v4
  tilewright compile vit_b16 -o vit.tw --target cuda:sm_90,cpu --precision bf16
  tilewright compile path/to/minilm -o minilm.tw --tune
  tilewright compile path/to/qwen3 -o qwen3.tw --context 8192 --cache bf16
  tilewright compile net.onnx -o net.tw --shape "image=1,3,224,224" --inputs sample.npz
  tilewright compile file.py:build --check
  tilewright compile resnet50 -o r.tw --dump-dir passes --verify passes

A directory that exists is replaced only if it holds an artifact, and only when the new one is complete. The outputs are
compared with eager PyTorch at several sizes before the command succeeds (--verify).
"""


@click.command("compile", help=HELP, short_help="Compile a model into an artifact.")
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", metavar="DIR", help="The artifact directory to write.")
@click.option(
    "--target", default="cpu", show_default=True, metavar="T[,T...]",
    help="Machines to compile for; 'cpu' is this one, 'tilewright doctor' lists all.",
)  # fmt: skip
@options.source_shapes
@options.sample_inputs
@click.option(
    "--precision", default="auto", show_default=True, metavar="P",
    help="What to compute in: auto, fp32 or bf16; on GPUs also tf32, fp16.",
)  # fmt: skip
@click.option(
    "--task", default="auto", show_default=True, metavar="T",
    help="What to compile: generate (text, from a decoder language model), forward, auto.",
)  # fmt: skip
@click.option("--context", type=int, metavar="N", help="Generation: longest sequence. [default: the model's]")
@click.option("--chunk", type=int, default=512, show_default=True, metavar="N", help="Generation: tokens per step.")
@click.option(
    "--sequences", type=int, default=64, show_default=True, metavar="N", help="Generation: sequences per step."
)
@click.option(
    "--cache", default="auto", show_default=True, metavar="P",
    help="Generation: type of cached keys and values: auto (what is computed in), fp32, bf16.",
)  # fmt: skip
@click.option("--ptx", is_flag=True, help="Also store PTX, which GPUs newer than the targets can compile.")
@click.option("--tune", is_flag=True, help="Measure ways of computing CPU kernels on this machine; keep the fastest.")
@click.option(
    "--quantize", metavar="RECIPE",
    help="Store weights as int8, int4-g32, int4-g64 or int4-g128 (-z: zero points), or by a JSON file of patterns.",
)  # fmt: skip
@click.option(
    "--activations", default="auto", show_default=True, metavar="A",
    help="With --quantize, what to multiply: int8, quantized on the fly, or float.",
)  # fmt: skip
@click.option("--dump-dir", metavar="D", help="Write the graphs before and after every pass, diffs and reasons.")
@click.option(
    "--verify", type=click.Choice(["off", "final", "passes"]), default="final", show_default=True,
    help="Compare with eager PyTorch: nothing, the final outputs, or every intermediate graph too.",
)  # fmt: skip
@click.option("--check", is_flag=True, help="List what is not supported, and build nothing.")
@click.option("--disable-pass", "disabled", multiple=True, metavar="NAME", help="Leave a pass out. Repeatable.")
@click.option("--stop-after", metavar="NAME", help="Stop after a pass, and build nothing.")
@options.quiet
@options.as_json
def compile_source(
    source: str,
    output: str | None,
    target: str,
    shapes: tuple[str, ...],
    inputs: str | None,
    precision: str,
    task: str,
    context: int | None,
    chunk: int,
    sequences: int,
    cache: str,
    ptx: bool,
    tune: bool,
    quantize: str | None,
    activations: str,
    dump_dir: str | None,
    verify: str,
    check: bool,
    disabled: tuple[str, ...],
    stop_after: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile a model."""
    from ...runtime.errors import UsageError

    if output is None and not check and stop_after is None:
        raise UsageError("no output directory: add -o DIR (or --check, to list what is not supported)")
    if check and stop_after is not None:
        raise UsageError("--check needs all passes; leave --stop-after out")
    with phases(quiet) as progress, redirect_stdout(sys.stderr):  # what a model's own code prints is no result
        progress("import", "PyTorch and the compiler")
        from ..driver import Compilation
        from ..options import CompileOptions, Task
        from ..shapes import parse_options

        chosen = CompileOptions(
            target=tuple(target.split(",")),
            precision=precision,
            quantize=quantize,
            activations=activations,
            verify=verify,  # type: ignore[arg-type]
            dump_dir=Path(dump_dir) if dump_dir else None,
            disable_passes=frozenset(disabled),
            stop_after=stop_after,
            ptx=ptx,
            tune=tune,
            task=Task(task, cache, context, chunk, sequences),
        )
        dimensions = parse_options(shapes) or None
        compilation = Compilation(chosen, progress)
        if check or output is None:
            captured = compilation.capture(source, shapes=dimensions, inputs=inputs)
            programs, records = compilation.rewrite(captured)
            unsupported = compilation.check(programs) if check else []
        else:
            done = compilation.run(source, (), None, Path(output), dimensions, inputs=inputs)
            records = done.passes
    if check:
        _report_check(source, unsupported, as_json)
    elif stop_after is not None:
        _report_passes(compilation, records, stop_after, dump_dir, as_json)
    else:
        _report(done, chosen, as_json)


def _report_check(source: str, unsupported: list[Any], as_json: bool) -> None:
    from ...runtime.errors import UnsupportedOperator

    if as_json:
        emit_json({"source": source, "supported": not unsupported, "unsupported": [vars(item) for item in unsupported]})
    elif unsupported:
        rows = [(item.operator, item.device, item.node, item.module, item.source) for item in unsupported]
        table(("operator", "for", "node", "module", "source"), rows, "lllll")
    else:
        click.echo(f"{source}: every operator is supported")
    if unsupported:
        count = f"{len(unsupported)} operator{'s are' if len(unsupported) > 1 else ' is'} not supported"
        raise UnsupportedOperator(
            f"{count}; rewrite these lines of the model with supported operators (docs/operators.md lists them), or "
            "leave the part out with an entry point that starts after it"
        )


def _report_passes(
    compilation: Compilation, records: dict[str, list[PassRecord]], last: str, dump_dir: str | None, as_json: bool
) -> None:
    if as_json:
        emit_json({"stopped_after": last, "seconds": compilation.seconds, "passes": _passes(records)})
        return
    for name, items in records.items():
        heading(f"Passes of {name}")
        table(("pass", "time", "rewritten", "refused", "nodes", "error"), [_pass_row(item) for item in items], "lrrrrr")
    seen = f"; graphs are in {dump_dir}" if dump_dir else "; add --dump-dir DIR to see the graphs"
    note(f"stopped after {last}, no artifact was written{seen}")


def _report(done: Artifact, chosen: Any, as_json: bool) -> None:
    from ...runtime.artifact import read_artifact
    from .facts import artifact_bytes, memory_of, plans_of

    opened = read_artifact(done.path)
    plans = plans_of(opened)
    info = opened.manifest.info
    kernels = len(
        {
            (device, variant.kernel)
            for device, each in opened.devices.items()
            for plan in each.values()
            for step in plan.steps
            for variant in step.variants
        }
    )
    size, weights = artifact_bytes(opened), opened.manifest.weights.size
    memory = {name: memory_of(plan) for name, plan in plans.items()}
    differs = _not_applied(info, chosen)
    if as_json:
        found = {
            "path": str(done.path), "seconds": done.seconds, "bytes": size, "weights_bytes": weights,
            "targets": [target.name for target in opened.manifest.targets], "kernels": kernels,
            "steps": {name: len(plan.steps) for name, plan in plans.items()}, "memory": memory,
            "precision": info.get("precision"), "verification": info.get("verification", {}),
            "errors": [{**vars(item), "ok": item.ok} for item in done.errors],
            "passes": _passes(done.passes), "not_applied": differs,
        }  # fmt: skip
        found |= {name: info[name] for name in ("tuned", "quantization") if name in info}
        emit_json(found)
        return
    targets = ", ".join(target.name for target in opened.manifest.targets)
    click.echo(f"{done.path}: {show_bytes(size)} (weights {show_bytes(weights)}), {kernels} kernels for {targets}")
    click.echo(f"computes in {info.get('precision', {}).get('applied')} (--precision {chosen.precision})")
    phases_text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in done.seconds.items())
    click.echo(f"time: {sum(done.seconds.values()):.1f} s ({phases_text})")
    for name, cases in memory.items():
        for case in cases:
            at = f"{case['at']} ({show_sizes(case['sizes'])})" if case["sizes"] else "every call"
            amounts = f"{show_bytes(case['peak'])} (all buffers {show_bytes(case['total'])}"
            click.echo(f"scratch of {name}, {at}: {amounts}, lower bound {show_bytes(case['bound'])})")
    if "quantization" in info:
        _show_quantization(info["quantization"])
    _show_errors(done, chosen, info)
    if "tuned" in info:
        ways = [(item["chosen"], item["best"]) for item in info["tuned"]["measured"]]
        faster = sum(chosen != best for chosen, best in ways)
        click.echo(
            f"measured {len(ways)} kernels on {info['tuned']['processor']}: for {faster} another way than the model's "
            "was faster ('tilewright inspect DIR kernels')"
        )
    for line in differs:
        click.echo(f"not as asked: {line}")


def _show_errors(done: Artifact, chosen: Any, info: dict[str, Any]) -> None:
    if chosen.verify == "off":
        click.echo("outputs were not compared with PyTorch (--verify off)")
    elif not done.errors:
        click.echo("the model returns no tensor, so there was nothing to compare with PyTorch")
    worst: dict[tuple[str, str, str], Any] = {}
    for item in done.errors:
        key = (item.device, item.entry, item.output)
        if key not in worst or item.error > worst[key].error:
            worst[key] = item
    for key, item in worst.items():
        count = sum((other.device, other.entry, other.output) == key for other in done.errors)
        sizes = f" over {count} assignments of sizes" if count > 1 else ""
        where = "" if item.device == "cpu" else f" ({item.device})"
        click.echo(
            f"{item.entry}{where}: {item.output} differs from PyTorch by {item.error:.1e} of its largest value{sizes} "
            f"(allowed {item.tolerance:.0e})"
        )
    if not info.get("verification", {}).get("cuda", {}).get("device_run", True):
        click.echo(
            "GPU kernels were not run, as no GPU for them is here: what was compared is the program after the passes"
        )


def _not_applied(info: dict[str, Any], chosen: Any) -> list[str]:
    """What was asked for and is not in the artifact."""
    found = []
    applied = info.get("precision", {}).get("applied")
    if chosen.precision not in ("auto", applied):
        found.append(f"precision {chosen.precision}: the artifact computes in {applied}")
    layers = info.get("quantization", {}).get("layers", ())
    found += [f"{item['layer']} in {item['asked']}: {item['why']}" for item in layers if item["applied"] is None]
    if chosen.quantize is not None and not any(item["applied"] for item in layers):
        found.append(f"quantization {chosen.quantize}: no weight is stored in it")
    return found


def _show_quantization(quantization: dict[str, Any]) -> None:
    done = [item for item in quantization["layers"] if item["applied"]]
    if not done:
        return
    size, worst = sum(item["bytes"] for item in done), max(done, key=lambda item: item["error"] or 0.0)
    click.echo(
        f"quantized {len(done)} weights to {show_bytes(size)}; the largest relative error is {worst['error']:.1%}, of "
        f"{worst['layer']} in {worst['applied']} ('tilewright inspect DIR quantization')"
    )
    for entry, outputs in quantization["deviation"].items():
        for name, error in outputs.items():
            click.echo(f"{entry}: quantization moves {name} by {error:.1e} of its largest value on the sample")


def _passes(records: dict[str, list[PassRecord]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {
                "pass": item.label, "seconds": item.seconds, "rewrites": len(item.report.changes),
                "refusals": len(item.report.refusals), "nodes_before": item.nodes_before,
                "nodes_after": item.nodes_after, "error": item.error,
            }
            for item in items
        ]
        for name, items in records.items()
    }  # fmt: skip


def _pass_row(item: PassRecord) -> tuple[str, ...]:
    error = "" if item.error is None else f"{item.error:.1e}"
    counts = (str(len(item.report.changes)), str(len(item.report.refusals)))
    return (item.label, show_seconds(item.seconds), *counts, f"{item.nodes_before} -> {item.nodes_after}", error)

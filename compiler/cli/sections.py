"""The sections of ``tilewright inspect``: each as data (``describe``) and as text (``SHOW``)."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import click

from ...runtime import sizes
from ...runtime.artifact import Artifact
from ...runtime.errors import ArtifactError, UsageError
from ...runtime.plan import Constant, Plan, Step, to_json
from ...runtime.state_sizes import total_bytes
from . import facts, gpu
from .output import heading, show_bytes, show_seconds, show_sizes, table

Values = Mapping[str, Mapping[str, int]]  # plan → symbol → value
Show = Callable[[Artifact, Values, Values | None], None]
_LARGEST = 12


def describe(section: str, artifact: Artifact, values: Values, asked: Values | None) -> dict[str, Any]:
    """A section as JSON data; ``graph`` and ``plan`` give the plan as it is stored."""
    if section == "passes":
        return {"passes": artifact.manifest.info.get("passes", {})}
    if section == "quantization":
        return {"quantization": artifact.manifest.info.get("quantization")}
    if section == "weights":
        return {
            "file": artifact.manifest.weights.file,
            "bytes": artifact.manifest.weights.size,
            "tensors": _weights(artifact),
        }
    entries: dict[str, Any] = {}
    plans = facts.plans_of(artifact)
    for name, at in values.items():
        plan = plans[name]
        if section in ("graph", "plan"):
            entries[name] = to_json(plan)
        elif section == "kernels":
            entries[name] = {"sizes": at, "kernels": [vars(use) for use in facts.kernels_of(plan, at)]}
        elif section == "memory":
            scratch = facts.memory_of(plan, asked[name] if asked else None)
            entries[name] = {"scratch": scratch, "states": total_bytes({name: plan}, at)}
        else:
            entries[name] = _entry(plan)
    if section == "overview":
        return _overview(artifact) | {"entries": entries}
    found: dict[str, Any] = {"entries": entries}
    if section == "kernels" and "cuda" in artifact.devices:
        found["tiles"] = gpu.tiles_of(artifact)
    if section == "kernels" and "tuned" in artifact.manifest.info:
        found["tuned"] = artifact.manifest.info["tuned"]
    return found


def kernel_source(artifact: Artifact, name: str, target: str | None) -> dict[str, Any]:
    """The source of a kernel, whose it is and which steps run it.

    Raises:
        UsageError: no such kernel or target.
        ArtifactError: the file cannot be read.
    """
    folders = _source_folders(artifact)
    if target is not None and target not in folders:
        raise UsageError(f"the artifact has no target {target!r}; it has {', '.join(folders)}")
    if not folders:
        raise UsageError("the artifact has no kernels")
    listed: dict[str, tuple[str, str]] = {}  # kernel -> (target, path)
    for one in [target] if target is not None else folders:
        for record in artifact.manifest.files:
            place = PurePosixPath(record.path)
            if place.parent == folders[one] and place.suffix in (".c", ".py"):
                listed.setdefault(place.stem, (one, record.path))
    if name not in listed:
        raise UsageError(f"there is no kernel {name!r}; there are {', '.join(sorted(listed)) or 'no sources'}")
    chosen, path = listed[name]
    try:
        source = (artifact.path / path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{artifact.path / path}: cannot be read: {error}") from None
    steps = [
        {"entry": entry, "step": index, "module": facts.where(step), "source": step.origin.source}
        for entry, plan in facts.plans_of(artifact).items()
        for index, step in enumerate(plan.steps)
        if any(variant.kernel == name for variant in step.variants)
    ]
    return {"kernel": name, "target": chosen, "file": path, "steps": steps, "source": source}


def _source_folders(artifact: Artifact) -> dict[str, PurePosixPath]:
    """Target → the folder of its kernels' sources; all GPU targets have the same one, named even without a binary."""
    folders = {}
    for target in artifact.manifest.targets:
        folder = gpu.SOURCES if target.name.startswith("cuda:") else PurePosixPath(target.library).parent
        folders[target.name] = PurePosixPath(folder)
    if "cuda" in artifact.devices and not any(name.startswith("cuda:") for name in folders):
        folders["cuda"] = PurePosixPath(gpu.SOURCES)
    return folders


def _overview(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "path": str(artifact.path),
        "producer": manifest.producer,
        "format": manifest.format,
        "info": {key: value for key, value in manifest.info.items() if key not in ("passes", "memory")},
        "bytes": facts.artifact_bytes(artifact),
        "weights_bytes": manifest.weights.size,
        "targets": [{"name": target.name, "features": list(target.features)} for target in manifest.targets],
    }


def _entry(plan: Plan) -> dict[str, Any]:
    return {
        "symbols": [to_json(symbol) for symbol in plan.symbols],
        "inputs": [to_json(port) for port in plan.inputs],
        "outputs": [to_json(port) for port in plan.outputs],
        "states": [to_json(state) for state in plan.states],
        "steps": len(plan.steps),
        "kernels": len({variant.kernel for step in plan.steps for variant in step.variants}),
        "memory": facts.memory_of(plan),
    }


def _show_overview(artifact: Artifact, values: Values, asked: Values | None) -> None:
    found = _overview(artifact)
    click.echo(f"{found['path']}: made by {found['producer']} (format {found['format']})")
    for key, value in found["info"].items():
        if key == "verification":
            value = ", ".join(
                f"{name} {'on the device' if how.get('device_run') else 'of the passes alone (the device was not run)'}"
                for name, how in value.items()
            )
        elif key == "quantization":
            count = sum(item["applied"] is not None for item in value["layers"])
            value = (
                f"{value['asked']}, activations {value['activations']}, {count} weights; "
                f"`tilewright inspect {found['path']} quantization` lists them"
            )
        elif isinstance(value, Mapping):
            value = ", ".join(f"{name} {setting}" for name, setting in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        click.echo(f"{key.replace('_', ' ')}: {value}")
    click.echo(f"size: {show_bytes(found['bytes'])}, of which weights {show_bytes(found['weights_bytes'])}")
    tables = {f"cuda:{item.architecture}": item for item in gpu.tables_of(artifact)}
    for target in found["targets"]:
        if item := tables.get(target["name"]):
            count = sum(len(kernel.binaries) for kernel in item.kernels)
            click.echo(f"target {target['name']}: {count} binaries of {len(item.kernels)} kernels, by {item.compiler}")
        else:
            click.echo(f"target {target['name']}: needs {' '.join(target['features']) or 'no features'}")
    plans = facts.plans_of(artifact)
    for name in values:
        plan = plans[name]
        heading(f"Entry {name}")
        for kind, ports in (("input ", plan.inputs), ("output", plan.outputs)):
            for port in ports:
                click.echo(f"  {kind}  {facts.show_port(port)}")
        for state in plan.states:
            click.echo(f"  state   {state.name}: {facts.show_type(state.dtype, state.shape)}")
        click.echo(f"  sizes   {facts.show_ranges(plan) or 'all fixed'}")
        kernels = {variant.kernel for step in plan.steps for variant in step.variants}
        click.echo(f"  steps   {len(plan.steps)}, of {len(kernels)} kernels")
        sample = next(item for item in facts.memory_of(plan) if item["at"] == "sample")
        click.echo(f"  scratch {show_bytes(sample['peak'])} at the sample's sizes")


def _show_graph(artifact: Artifact, values: Values, asked: Values | None) -> None:
    plans = facts.plans_of(artifact)
    for name in values:
        plan = plans[name]
        click.echo(f"{name}({', '.join(map(facts.show_port, plan.inputs))}):")
        for step in plan.steps:
            click.echo(f"    {_statement(plan, step)}")
        click.echo(f"    return {', '.join(map(facts.show_port, plan.outputs))}")


def _statement(plan: Plan, step: Step) -> str:
    """``t: float32[batch, 256] = linear_relu(x, weight)  # layers.0 at models/mlp.py:25``."""
    operands = step.variants[0].operands
    written = []
    for position in step.writes:
        ref = operands[position]
        holder: Any = {"output": plan.outputs, "buffer": plan.buffers, "state": plan.states}[ref.kind][ref.index]
        written.append(f"{holder.name}: {facts.show_type(holder.dtype, holder.shape)}")
    read = ", ".join(facts.name_of(plan, ref) for index, ref in enumerate(operands) if index not in step.writes)
    origin = " at ".join(part for part in (facts.where(step), step.origin.source) if part)
    return f"{', '.join(written)} = {step.name}({read})" + (f"  # {origin}" if origin else "")


def _show_passes(artifact: Artifact, values: Values, asked: Values | None) -> None:
    recorded = artifact.manifest.info.get("passes", {})
    if not recorded:
        click.echo("this artifact does not say which passes made it")
    for name in values:
        if name in recorded:
            heading(f"Passes of {name}")
            rows = [(item["pass"], item["rewrites"], item["refusals"]) for item in recorded[name]]
            table(("pass", "rewritten", "refused"), rows, "lrr")
    if recorded:
        click.echo("compile with --dump-dir DIR to see every rewrite, refusal and graph")


def _show_quantization(artifact: Artifact, values: Values, asked: Values | None) -> None:
    found = artifact.manifest.info.get("quantization")
    if not found:
        click.echo("no weight of this artifact is quantized")
        return
    heading(f"Weights, quantized by {found['asked']}, activations {found['activations']}")
    rows = [
        (
            item["layer"], item["kind"], "x".join(map(str, item["shape"])), item["asked"], item["applied"] or "-",
            item.get("activations", ""), show_bytes(item["bytes"]) if item["applied"] else "",
            f"{item['error']:.2%}" if item.get("error") is not None else "",
        )
        for item in found["layers"]
    ]  # fmt: skip
    table(("weight", "of", "shape", "asked", "applied", "activations", "size", "error"), rows, "llrlllrr")
    for item in found["layers"]:
        if item["applied"] is None:
            click.echo(f"{item['layer']}: {item['why']}")
    for entry, outputs in found["deviation"].items():
        for name, error in outputs.items():
            click.echo(f"{entry}: quantization moves {name} by {error:.1e} of its largest value on the sample")


def _show_plan(artifact: Artifact, values: Values, asked: Values | None) -> None:
    plans = facts.plans_of(artifact)
    for name in values:
        plan = plans[name]
        heading(f"Entry {name}")
        for symbol in plan.symbols:
            source = plan.states[symbol.state] if symbol.state != -1 else plan.inputs[symbol.input]
            read = f"axis {symbol.axis} of {source.name}" + (f" - {symbol.offset}" if symbol.offset else "")
            if symbol.factor > 1:
                read = f"({read}) // {symbol.factor}" if symbol.offset else f"{read} // {symbol.factor}"
            click.echo(f"  {symbol.name} = {read}, {symbol.minimum}..{symbol.maximum}")
        for check in plan.checks:
            click.echo(f"  requires {sizes.show(check.condition)}  ({check.message})")
        rows = []
        for index, step in enumerate(plan.steps):
            for position, variant in enumerate(step.variants):
                guard = (
                    "" if len(step.variants) == 1 else sizes.show(variant.guard) if variant.guard != 1 else "otherwise"
                )
                first = (str(index), step.family) if position == 0 else ("", "")
                origin = (facts.where(step), step.origin.source) if position == 0 else ("", "")
                rows.append((*first, variant.kernel, guard, sizes.show(variant.units), *origin))
        table(("step", "family", "kernel", "when", "units", "module", "source"), rows, "rllllll")


def _show_kernels(artifact: Artifact, values: Values, asked: Values | None) -> None:
    plans = facts.plans_of(artifact)
    for name, at in values.items():
        uses = facts.kernels_of(plans[name], at)
        heading(f"Kernels of {name}" + (f" at {show_sizes(at)}" if at else ""))
        rows = []
        for use in uses:
            more = f" and {len(use.modules) - 1} more" if len(use.modules) > 1 else ""
            amounts = (f"{use.flops / 1e6:.2f}", show_bytes(use.bytes))
            origin = (f"{use.modules[0]}{more}", use.sources[0] if use.sources else "")
            rows.append((use.kernel, use.family, len(use.steps), ", ".join(use.guards), *amounts, *origin))
        table(("kernel", "family", "steps", "when", "MFLOP", "bytes", "module", "source"), rows, "llrlrrll")
    if "tuned" in artifact.manifest.info:
        _show_tuned(artifact.manifest.info["tuned"])
    if any(name.endswith(".cuda") for name in values):
        _show_tiles(artifact)
    click.echo("'tilewright inspect DIR kernel NAME' shows a kernel's source")


def _show_tuned(tuned: dict[str, Any]) -> None:
    """What was measured while compiling."""
    heading(f"Measured on {tuned['processor']} with {tuned['threads']} threads, for {tuned['target']}")
    rows = []
    for item in tuned["measured"]:
        before, after = (item["nanoseconds"][item[way]] * 1e-9 for way in ("chosen", "best"))
        gain = f"{before / after:.2f}" if after else ""
        times = (item["chosen"], show_seconds(before), item["best"], show_seconds(after), gain)
        rows.append((item["kernel"], show_sizes(item["values"]), len(item["nanoseconds"]), *times))
    table(("kernel", "at", "ways", "chosen by the model", "time", "fastest", "time", "gain"), rows, "llrlrlrr")


def _show_tiles(artifact: Artifact) -> None:
    """The binaries of GPU kernels, then what was rejected and why."""
    tiles = gpu.tiles_of(artifact)
    if not tiles:
        click.echo("this artifact has no GPU binaries: only the interpreter can run its GPU kernels")
        return
    heading("Tiles of GPU kernels (the first of a kernel is the default)")
    columns = ("kernel", "tile", "architecture", "warps", "registers", "shared memory", "spills")
    rows = [
        (
            item["kernel"], item["tile"], item["architecture"], item["warps"], item["registers"],
            show_bytes(item["shared"]), show_bytes(item["spills"]),
        )
        for item in tiles
        if not item["rejected"]
    ]  # fmt: skip
    table(columns, rows, "lllrrrr")
    if rejected := [item for item in tiles if item["rejected"]]:
        heading("Rejected tiles")
        reasons = [(item["kernel"], item["tile"], item["architecture"], item["rejected"]) for item in rejected]
        table(("kernel", "tile", "architecture", "reason"), reasons, "llll")


def _show_memory(artifact: Artifact, values: Values, asked: Values | None) -> None:
    plans = facts.plans_of(artifact)
    for name, at in values.items():
        plan = plans[name]
        heading(f"Scratch memory of {name}")
        rows = []
        for case in facts.memory_of(plan, asked[name] if asked else None):
            ratio = f"{case['peak'] / case['bound']:.3f}" if case["bound"] else ""
            amounts = (show_bytes(case[key]) for key in ("peak", "total", "bound"))
            rows.append((case["at"], show_sizes(case["sizes"]), *amounts, ratio))
        table(("at", "sizes", "peak", "all buffers", "lower bound", "peak/bound"), rows, "llrrrr")
        if plan.states:
            chosen = {symbol.name: at[symbol.name] for symbol in plan.symbols if symbol.state != -1}
            where = f" at {show_sizes(chosen)}" if chosen else ""
            click.echo(f"state that a session keeps: {show_bytes(total_bytes({name: plan}, at))}{where}")
        if not plan.buffers:
            continue
        heading(f"Largest buffers of {name}" + (f" at {show_sizes(at)}" if at else ""))
        ordered = sorted(plan.buffers, key=lambda buffer: -sizes.evaluate(buffer.bytes, at))
        rows = [
            (
                buffer.name, facts.show_type(buffer.dtype, buffer.shape), buffer.layout,
                show_bytes(sizes.evaluate(buffer.bytes, at)), f"{buffer.first}..{buffer.last}",
            )
            for buffer in ordered[:_LARGEST]
        ]  # fmt: skip
        table(("buffer", "type", "layout", "bytes", "steps"), rows, "lllrr")
        if len(ordered) > _LARGEST:
            click.echo(f"({len(ordered) - _LARGEST} smaller ones)")


def _show_weights(artifact: Artifact, values: Values, asked: Values | None) -> None:
    click.echo(f"{artifact.manifest.weights.file}: {show_bytes(artifact.manifest.weights.size)}")
    rows = []
    for item in _weights(artifact):
        kind = f"{item['dtype']}[{', '.join(map(str, item['shape']))}]"
        more = f" and {len(item['kernels']) - 1} more" if len(item["kernels"]) > 1 else ""
        kernel = item["kernels"][0] + more if item["kernels"] else ""
        rows.append((item["key"], kind, show_bytes(item["bytes"]), ", ".join(item["sources"]), kernel))
    table(("constant", "packed as", "bytes", "made of", "read by"), rows, "llrll")


def _weights(artifact: Artifact) -> list[dict[str, Any]]:
    """The tensors of the weight file with what they were made of and which kernels read them."""
    readers: dict[str, dict[str, None]] = collections.defaultdict(dict)
    constants: dict[str, Constant] = {}
    for plan in facts.plans_of(artifact).values():
        constants |= {constant.key: constant for constant in plan.constants}
        for step in plan.steps:
            for variant in step.variants:
                for ref in variant.operands:
                    if ref.kind == "constant":
                        readers[plan.constants[ref.index].key][variant.kernel] = None
    return [
        {
            "key": key, "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.end - tensor.begin,
            "sources": list(constants[key].sources) if key in constants else [], "kernels": list(readers[key]),
        }
        for key, tensor in artifact.weights.tensors.items()
    ]  # fmt: skip


SHOW: dict[str, Show] = {
    "overview": _show_overview,
    "graph": _show_graph,
    "passes": _show_passes,
    "plan": _show_plan,
    "kernels": _show_kernels,
    "memory": _show_memory,
    "weights": _show_weights,
    "quantization": _show_quantization,
}

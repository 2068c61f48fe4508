"""``tilewright bench``: how fast an artifact is, and which kernels take the time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import options
from .output import emit_json, heading, note, show_seconds, show_sizes, table

if TYPE_CHECKING:
    from .measure import KernelTime, Latency

HELP = """Time the artifact in DIR: latency of a call, and the share of every kernel.

Sizes that vary take the values that the model was compiled with as its sample; --shape sets others. Inputs are made up
(what they hold is shown) unless --inputs gives an .npz file. Needs no PyTorch.

\b
Examples:
  tilewright bench resnet50.tw
  tilewright bench encoder.tw --shape batch=8,seq=64 --threads 2
  tilewright bench encoder.tw --inputs real.npz --json > now.json

GFLOP/s and GB/s count the arithmetic and the bytes that each operation needs at the least.
"""
SHOWN = 20


@click.command(help=HELP, short_help="Latency, and time per kernel.")
@click.argument("artifact", metavar="DIR")
@options.sizes_option("Value of a size that varies, as in batch=8.")
@click.option("--inputs", metavar="FILE.npz", help="Inputs by name, instead of made-up ones.")
@options.entry
@options.device
@options.threads
@click.option("--repeat", type=click.IntRange(1), metavar="N", help="Calls to time. [default: 3 seconds of them]")
@click.option("--all", "show_all", is_flag=True, help=f"List every kernel, not just the {SHOWN} slowest.")
@options.as_json
def bench(
    artifact: str,
    shapes: tuple[str, ...],
    inputs: str | None,
    entry: str | None,
    device: str,
    threads: int | None,
    repeat: int | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Benchmark an artifact."""
    from ...runtime.binding import bind_symbols
    from ...runtime.errors import UsageError
    from ...runtime.model import load
    from .arrays import made_up_inputs, read_inputs
    from .measure import latency_of, profile_kernels

    if inputs is not None and shapes:
        raise UsageError("--inputs has sizes of its own; leave --shape out")
    with load(artifact, threads=threads, entry=entry, device=device) as model:
        called = model.entry(entry or model.entries[0])
        if inputs is not None:
            arrays, origin = read_inputs((inputs,), called.plan), inputs
            shape = tuple(arrays[port.name].shape for port in called.plan.inputs)
            values = bind_symbols(called.plan, shape)
        else:
            values = options.parse_sizes(shapes, called.plan)
            chosen = {symbol.name: values[symbol.name] for symbol in called.plan.symbols if symbol.state != -1}
            if chosen:  # a session has states of these sizes; plain calls have those of the sample
                called = model.session(chosen).entry(called.name)
            arrays, origin = made_up_inputs(called, values)
        ordered = [arrays[port.name] for port in called.plan.inputs]
        latency = latency_of(lambda: called(*ordered), repeat)
        kernels = profile_kernels(called, arrays, values, repeat)
        setting = {
            "entry": called.name,
            "device": model.device,
            "target": model.target,
            "threads": model.threads,
            "sizes": values,
            "inputs": origin,
        }
    if as_json:
        emit_json(setting | {"latency": _latency(latency), "kernels": [_kernel(item, latency.p50) for item in kernels]})
        return
    _show(setting, latency, kernels if show_all else kernels[:SHOWN], kernels)


def _show(setting: dict[str, Any], latency: Latency, shown: list[KernelTime], kernels: list[KernelTime]) -> None:
    sizes = show_sizes(setting["sizes"]) or "all sizes fixed"
    where = f"{setting['threads']} threads" if setting["device"] == "cpu" else setting["device"]
    click.echo(f"{setting['entry']} on {setting['target']}, {where}, {sizes}; {latency.calls} calls")
    note(f"inputs: {setting['inputs']}")
    heading("Latency of a call")
    columns = ("min", "p50", "p90", "p99", "calls/s")
    times = (latency.smallest, latency.p50, latency.p90, latency.p99)
    table(columns, [(*map(show_seconds, times), f"{1 / latency.mean:.1f}")], "rrrrr")
    heading("Time by kernel (medians of profiled calls)")
    inside = sum(item.seconds for item in kernels)
    rows = [_row(item, inside) for item in shown]
    if rest := kernels[len(shown) :]:
        taken = sum(item.seconds for item in rest)
        calls = sum(item.calls for item in rest)
        rows.append((f"({len(rest)} more; --all)", "", str(calls), show_seconds(taken), _share(taken, inside), "", ""))
    table(("kernel", "family", "calls", "time", "share", "GFLOP/s", "GB/s"), rows, "llrrrrr")
    click.echo(f"all kernels {show_seconds(inside)} of a call's {show_seconds(latency.p50)}")


def _row(item: KernelTime, inside: float) -> tuple[str, ...]:
    share = _share(item.seconds, inside)
    rates = (_rate(item.flops, item.seconds), _rate(item.bytes, item.seconds))
    return (item.kernel, item.family, str(item.calls), show_seconds(item.seconds), share, *rates)


def _share(seconds: float, total: float) -> str:
    return f"{100 * seconds / total:.1f} %" if total else ""


def _rate(amount: int, seconds: float) -> str:
    return f"{amount / seconds / 1e9:.1f}" if amount and seconds else ""


def _latency(latency: Latency) -> dict[str, Any]:
    return {**vars(latency), "calls_per_second": 1 / latency.mean}


def _kernel(item: KernelTime, call: float) -> dict[str, Any]:
    rates = {
        "gflops": item.flops / item.seconds / 1e9 if item.seconds else None,
        "gbytes": item.bytes / item.seconds / 1e9 if item.seconds else None,
    }
    return {**vars(item), "share_of_call": item.seconds / call, **rates}

"""``tilewright run``: an artifact on inputs from files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .output import emit_json, note, show_seconds, table

if TYPE_CHECKING:
    import numpy as np

HELP = """Run the artifact in DIR on INPUTS and show or save its outputs.

INPUTS are NAME=FILE.npy for single inputs, or FILE.npz with arrays by input name. The dtypes must be the model's own
('tilewright inspect DIR' lists them). Needs no PyTorch.

\b
Examples:
  tilewright run resnet50.tw image=cat.npy -o logits.npy
  tilewright run encoder.tw batch.npz -o vectors.npz
  tilewright run encoder.tw --input input_ids=ids.npy --input attention_mask=mask.npy
"""


@click.command(help=HELP, short_help="Run an artifact on .npy or .npz files.")
@click.argument("artifact", metavar="DIR")
@click.argument("files", metavar="[INPUTS]...", nargs=-1)
@click.option("-i", "--input", "inputs", multiple=True, metavar="NAME=FILE", help="One more input; as an argument.")
@click.option("-o", "--output", metavar="FILE", help="Save the outputs: .npz, or .npy where there is one.")
@options.entry
@options.device
@options.threads
@options.as_json
def run(
    artifact: str,
    files: tuple[str, ...],
    inputs: tuple[str, ...],
    output: str | None,
    entry: str | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run an artifact."""
    from ...runtime.model import load
    from .arrays import check_output_file, flatten_results, read_inputs, write_outputs

    with load(artifact, threads=threads, entry=entry, device=device) as model:
        called = model.entry(entry or model.entries[0])
        ports = called.plan.outputs
        if output is not None:
            check_output_file(Path(output), ports)
        arrays = read_inputs((*files, *inputs), called.plan)
        start = time.perf_counter()
        returned = called(**arrays)
        seconds = time.perf_counter() - start
        results: dict[str, np.ndarray] = {}
        values: dict[str, Any] = {}
        for where, index, value in flatten_results(called.plan.results, returned):
            if index is None:
                values[where] = value
            else:
                results[ports[index].name] = value
    if output is not None:
        write_outputs(Path(output), results)
    described = [{"name": name, **_describe(array)} for name, array in results.items()]
    if as_json:
        emit_json({"outputs": described, "values": values, "seconds": seconds, "saved": output})
        return
    columns = ("output", "dtype", "shape", "smallest", "largest", "mean")
    table(columns, [_cells(item) for item in described], "lllrrr")
    for where, value in values.items():
        click.echo(f"{where} = {value!r}")
    note(f"ran in {show_seconds(seconds)} (first call)" + (f"; saved {output}" if output else ""))


def _describe(array: np.ndarray) -> dict[str, Any]:
    """Name of the dtype, shape, and the range of the values."""
    import numpy as np

    found: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.size and array.dtype.kind != "b":
        wide = array.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities have no mean, which then reads nan
            found |= {"smallest": float(wide.min()), "largest": float(wide.max()), "mean": float(wide.mean())}
    return found


def _cells(item: dict[str, Any]) -> tuple[str, ...]:
    numbers = (f"{item[key]:.6g}" if key in item else "" for key in ("smallest", "largest", "mean"))
    return (item["name"], item["dtype"], str(item["shape"]), *numbers)

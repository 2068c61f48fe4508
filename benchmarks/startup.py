"""From a new process to the first output of ResNet-50, with the artifact in the page cache (target: 0.30 s at most).

    python benchmarks/startup.py [--artifact DIR] [--runs N] [--threads N] [--json]

Each run is a process of its own, by turns one that gives the model plain buffers and imports no numpy, and one that
imports numpy and gives it arrays. Times are read from the system's monotonic clock, which all processes share, so the
interpreter's own start counts. Without --artifact, ResNet-50 is compiled first (not counted).

Modules are compiled to bytecode before, as they are where a package is installed. numpy's BLAS, which no model uses,
has one thread: more of them would spin for a while after numpy's import, on processors that the first call needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TARGET_SECONDS = 0.30
STAGES = ("start Python", "import numpy", "import tilewright", "load", "first call", "second call")
WAYS = ("buffers", "numpy")

CHILD = """
import sys, time
marks = [time.monotonic()]
with_numpy = sys.argv[3] == "numpy"
if with_numpy:
    import numpy
marks.append(time.monotonic())
import tilewright
tilewright.load
marks.append(time.monotonic())
threads = int(sys.argv[2]) or None
model = tilewright.load(sys.argv[1], threads=threads)
marks.append(time.monotonic())
plan = model.entry(model.entries[0]).plan
sample = {symbol.name: symbol.minimum for symbol in plan.symbols}
from tilewright.runtime.sizes import evaluate
shapes = [tuple(evaluate(size, sample) for size in port.shape) for port in plan.inputs]
if with_numpy:
    inputs = [numpy.ones(shape, port.dtype) for port, shape in zip(plan.inputs, shapes)]
else:
    from math import prod
    from struct import pack
    from tilewright.runtime.buffers import FORMATS
    forms = [FORMATS[port.dtype] for port in plan.inputs]
    inputs = [memoryview(pack(form, form != "H") * prod(shape)).cast(form, shape) for form, shape in zip(forms, shapes)]
model(*inputs)
marks.append(time.monotonic())
model(*inputs)
marks.append(time.monotonic())
assert "torch" not in sys.modules and with_numpy == ("numpy" in sys.modules)
print(*marks)
"""


def one_run(artifact: Path, threads: int, way: str) -> list[float]:
    """Seconds of every stage."""
    begin = time.monotonic()
    command = [sys.executable, "-c", CHILD, str(artifact), str(threads), way]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    marks = [begin, *map(float, done.stdout.split())]
    return [after - before for before, after in zip(marks[:-1], marks[1:], strict=True)]


def compiled(folder: str) -> Path:
    output = Path(folder) / "resnet50.tw"
    command = [sys.executable, "-m", "tilewright", "compile", "resnet50", "-o", str(output), "--verify", "off"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return output


def summary(runs: list[list[float]]) -> dict[str, Any]:
    """Medians of the stages, and of the time to the first output with its least."""
    totals = [sum(run[:-1]) for run in runs]
    stages = {name: median(run[index] for run in runs) for index, name in enumerate(STAGES)}
    return {"stages": stages, "first_output": median(totals), "fastest": min(totals)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, help="an artifact to start, instead of compiling ResNet-50")
    parser.add_argument("--runs", type=int, default=15, help="processes of each way")
    parser.add_argument("--threads", type=int, default=0, help="0: all that the process may use")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        artifact = arguments.artifact or compiled(folder)
        for way in WAYS:
            one_run(artifact, arguments.threads, way)  # fills the page cache
        for _ in range(arguments.runs):
            for way in WAYS:
                runs[way].append(one_run(artifact, arguments.threads, way))
    found = {way: summary(runs[way]) for way in WAYS}
    if arguments.json:
        print(json.dumps(found | {"target": TARGET_SECONDS, "runs": arguments.runs}, indent=1))
        return
    print(f"{'ms':20}{'no numpy':>10}{'numpy':>10}")
    for name in STAGES:
        print(f"{name:20}" + "".join(f"{found[way]['stages'][name] * 1e3:10.1f}" for way in WAYS))
    for name, key in (("to the first output", "first_output"), ("the fastest of them", "fastest")):
        print(f"{name:20}" + "".join(f"{found[way][key] * 1e3:10.1f}" for way in WAYS))
    print(f"medians of {arguments.runs} processes each; target {TARGET_SECONDS * 1e3:.0f} ms")


if __name__ == "__main__":
    main()

"""From a new process to the first output of ResNet-50, with the artifact in the page cache (target: 0.30 s at most).

    python benchmarks/startup.py [--artifact DIR] [--runs N] [--threads N] [--json]

Each run is a process of its own. Times are read from the system's monotonic clock, which all processes share, so the
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

TARGET_SECONDS = 0.30
STAGES = ("start Python", "import numpy", "import tilewright", "load", "first call", "second call")

CHILD = """
import time
marks = [time.monotonic()]
import numpy
marks.append(time.monotonic())
import sys, tilewright
tilewright.load
marks.append(time.monotonic())
threads = int(sys.argv[2]) or None
model = tilewright.load(sys.argv[1], threads=threads)
marks.append(time.monotonic())
plan = model.entry(model.entries[0]).plan
sample = {symbol.name: symbol.minimum for symbol in plan.symbols}
from tilewright.runtime.sizes import evaluate
inputs = [numpy.ones([evaluate(size, sample) for size in port.shape], port.dtype) for port in plan.inputs]
model(*inputs)
marks.append(time.monotonic())
model(*inputs)
marks.append(time.monotonic())
assert "torch" not in sys.modules
print(*marks)
"""


def one_run(artifact: Path, threads: int) -> list[float]:
    """Seconds of every stage."""
    begin = time.monotonic()
    command = [sys.executable, "-c", CHILD, str(artifact), str(threads)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    marks = [begin, *map(float, done.stdout.split())]
    return [after - before for before, after in zip(marks[:-1], marks[1:], strict=True)]


def compiled(folder: str) -> Path:
    output = Path(folder) / "resnet50.tw"
    command = [sys.executable, "-m", "tilewright", "compile", "resnet50", "-o", str(output), "--verify", "off"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, help="an artifact to start, instead of compiling ResNet-50")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: all that the process may use")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = arguments.artifact or compiled(folder)
        for _ in range(2):
            one_run(artifact, arguments.threads)  # fills the page cache
        runs = [one_run(artifact, arguments.threads) for _ in range(arguments.runs)]
    stages = {name: median(run[index] for run in runs) for index, name in enumerate(STAGES)}
    totals = [sum(run[:-1]) for run in runs]
    total = median(totals)
    if arguments.json:
        found = {"stages": stages, "first_output": total, "fastest": min(totals), "target": TARGET_SECONDS}
        print(json.dumps(found | {"runs": arguments.runs}, indent=1))
        return
    for name, seconds in stages.items():
        print(f"{name:20}{seconds * 1e3:8.1f} ms")
    aside = f"(fastest {min(totals) * 1e3:.1f}; target {TARGET_SECONDS * 1e3:.0f})"
    print(f"{'to the first output':20}{total * 1e3:8.1f} ms  {aside}")
    print(f"medians of {arguments.runs} processes")


if __name__ == "__main__":
    main()

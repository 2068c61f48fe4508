"""Tilewright on a GPU beside PyTorch: every kernel template checked, operators and whole models timed.

    python -m benchmarks.gpu                          # all units, for at most ten minutes; run again to go on
    python -m benchmarks.gpu --only 'matmul|model/'   # some of them
    python -m benchmarks.gpu --report                 # tables of what was measured so far, without a GPU

Run it from the repository's folder, with the package importable. What was measured is kept in a state file after every
unit, so a run that ends early loses one unit. Results with the GPU and versions are written to benchmarks/results.
Ratios compare numbers of one machine. Exit codes: 0, 1 where a unit failed, 2 wrong usage, 3 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .gpu_report import report, summary
from .gpu_units import Unit, units
from .process import Process
from .state import OtherMachine, State

OK, FAILED, USAGE, NO_GPU = 0, 1, 2, 3
RESULTS = Path(__file__).parent / "results"


class Worker:
    """A process that measures one unit after the other; started again when one of them ends it or hangs."""

    def __init__(self) -> None:
        self.process: Process | None = None

    def run(self, unit: Unit, limit: float) -> dict[str, Any]:
        """The unit's numbers, or ``{"error": text}``."""
        if self.process is None or self.process.ended:
            self.process = Process("benchmarks.gpu_worker")
        return self.process.ask([unit.kind, unit.parameters], limit)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()
            self.process = None


def machine() -> dict[str, Any] | None:
    """The GPU and the versions; ``None`` where there is no GPU, or no PyTorch that could use it."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    found = {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "python": platform.python_version()}
    for package in ("torch", "triton", "cuda-bindings", "nvidia-cudnn-cu13"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def measure(state: State, planned: list[Unit], seconds: float, *, retry: bool) -> None:
    """Measure what is not done yet while there is time."""
    deadline = time.monotonic() + seconds
    worker = Worker()
    try:
        for unit in planned:
            left = deadline - time.monotonic()
            if state.has(unit.name, retry=retry) or unit.seconds > left:
                continue
            print(f"{unit.name} ...", file=sys.stderr, flush=True)
            result = worker.run(unit, limit=min(left, max(60.0, 6 * unit.seconds)))
            if "error" in result and time.monotonic() > deadline:
                break  # cut off by the budget: the next run measures it
            state.record(unit.name, result)
    finally:
        worker.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("gpu-benchmark.json"), help="what was measured so far")
    parser.add_argument("--seconds", type=float, default=570.0, help="time for this run; units that would not fit wait")
    parser.add_argument("--only", default="", help="regular expression on the names of units")
    parser.add_argument("--dtypes", default="", help="dtypes to measure models in, separated by commas")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--list", action="store_true", help="name the units and end")
    parser.add_argument("--report", action="store_true", help="print the tables of the state file and end")
    options = parser.parse_args()
    dtypes = tuple(filter(None, options.dtypes.split(",")))
    planned = [unit for unit in units(dtypes) if re.search(options.only, unit.name)]
    if options.list:
        print("\n".join(f"{unit.name:60}{unit.seconds:5.0f} s" for unit in planned))
        return OK
    if options.report:
        if not options.state.exists():
            print(f"nothing was measured: there is no {options.state}", file=sys.stderr)
            return USAGE
        data = json.loads(options.state.read_text())
        print(report(data["machine"], data["results"], planned))
        return OK
    present = machine()
    if present is None:
        print("no GPU at hand: nothing is measured (a CUDA GPU and a PyTorch that sees it are needed)", file=sys.stderr)
        return NO_GPU
    try:
        state = State.open(options.state, present)
    except OtherMachine as error:
        print(error, file=sys.stderr)
        return USAGE
    measure(state, planned, options.seconds, retry=options.retry)
    print(report(state.machine, state.results, planned))
    RESULTS.mkdir(exist_ok=True)
    today = datetime.date.today().isoformat()
    name = f"{today}-{re.sub(r'[^a-z0-9]+', '-', present['gpu'].lower()).strip('-')}.json"
    record = {"date": today, "machine": state.machine, "summary": summary(state.results), "results": state.results}
    (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {RESULTS / name}", file=sys.stderr)
    return FAILED if any("error" in state.results.get(unit.name, {}) for unit in planned) else OK


if __name__ == "__main__":
    sys.exit(main())

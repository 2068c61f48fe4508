"""Decoder language models on a CPU: Tilewright beside llama.cpp, in turns, in one run.

    python -m benchmarks.llm                                    # everything; run again to go on where it ended
    python -m benchmarks.llm --contenders tilewright/int4-g32,llama.cpp/Q4_0 --workloads decode-1
    python -m benchmarks.llm --model tiny --rounds 2 --turn 0.1 --starts 1       # tries everything out in a minute
    python -m benchmarks.llm --build                            # only the artifacts, which are kept
    python -m benchmarks.llm --report                           # tables of what was measured so far

Run it from the repository's folder. llama.cpp takes part where the extra ``bench-llm`` is installed, which compiles it
for this processor; the program that does so has to be there (a C++ compiler). All weights come from one checkpoint of
random numbers. A contender is a process of its own on the same processors with the same threads; they take turns, and
those that wait are stopped. Every contender's logits are compared with float32 PyTorch's before it is timed.

Decoding begins behind a prompt of 128 tokens in every sequence. A step has to read all weights (of the embedding only
the tokens' rows) and the caches of the positions that it sees (of bfloat16 beside quantized weights, of float16 in
llama.cpp); that and its arithmetic stand beside the processor's limits, which are measured in turns of their own.
``llama-1b`` needs 17 GB of disk and 16 GB of memory; building takes 10 minutes, timing 8. Exit codes: 0, 1 where
something failed or was cut off by ``--seconds``, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tilewright.codegen.c.tuning import processor_name

from .cpu import FAILED, OK, RESULTS, USAGE, chosen
from .cpu_measure import Failed, OutOfTime, say
from .llm_goals import goals
from .llm_measure import Bench
from .llm_report import has_errors, report
from .llm_units import CONTENDERS, MODELS, WORKLOADS, missing
from .state import OtherMachine, State

PACKAGES = ("llama-cpp-python", "torch", "numpy")


def machine(threads: int) -> dict[str, Any]:
    """The processor and the versions: what makes numbers comparable."""
    found: dict[str, Any] = {"cpu": processor_name(), "threads": threads, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def forget(state: State, model: str) -> None:
    """Drop what was timed; artifacts stay."""
    for name in [name for name in state.results if name.startswith((f"time/{model}/", f"start/{model}"))]:
        del state.results[name]


def measure(bench: Bench, names: Sequence[str], workloads: Sequence[str], *, only_build: bool) -> bool:
    """All stages while there is time; whether none failed and none is left."""
    try:
        if only_build:
            return bench.build(names) == list(names)
        bench.run(names, [WORKLOADS[name] for name in workloads])
    except Failed as error:
        say(str(error))
        return False
    except OutOfTime:
        say("the next stage does not fit into --seconds: run again to go on")
        return False
    return not has_errors(bench.state.results, bench.model)


def write(state: State, model: str, skipped: dict[str, str], folder: Path) -> dict[str, Any]:
    """JSON in the folder, and what it holds."""
    today = datetime.date.today().isoformat()
    record: dict[str, Any] = {"date": today, "machine": state.machine, "model": {"name": model} | asdict(MODELS[model])}
    record["goals"] = [asdict(goal) | {"reached": goal.reached} for goal in goals(state.results, model)]
    record |= {"skipped": skipped, "results": state.results}
    folder.mkdir(exist_ok=True)
    path = folder / f"{today}-llm{'' if model == next(iter(MODELS)) else f'-{model}'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    say(f"written to {path}")
    return record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=next(iter(MODELS)), choices=MODELS)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="separated by commas")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3600.0, help="time for this run; stages that do not fit wait")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every contender at every workload")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of a turn; one step at least")
    parser.add_argument("--starts", type=int, default=5, help="new processes per contender; 0 for none")
    parser.add_argument("--state", type=Path, default=Path("build/llm-benchmark.json"), help="what was measured so far")
    parser.add_argument("--work", type=Path, help="folder for artifacts, which stay (default: temporary)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    parser.add_argument("--again", action="store_true", help="time all again; artifacts are kept")
    parser.add_argument("--build", action="store_true", help="build the artifacts that are not there, and end")
    parser.add_argument("--report", action="store_true", help="tables and JSON of the state file, and end")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    names = chosen(options.contenders, list(CONTENDERS), "contender")
    workloads = chosen(options.workloads, list(WORKLOADS), "workload")
    systems = dict.fromkeys(CONTENDERS[name].system for name in names)
    skipped = {system: reason for system in systems if (reason := missing(system))}
    names = [name for name in names if CONTENDERS[name].system not in skipped]
    good = True
    if options.report:
        if not options.state.exists():
            say(f"nothing was measured: there is no {options.state}")
            return USAGE
        data = json.loads(options.state.read_text())
        state = State(options.state, data["machine"], data["results"])
    else:
        try:
            state = State.open(options.state, machine(options.threads))
        except OtherMachine as error:
            say(str(error))
            return USAGE
        options.state.parent.mkdir(parents=True, exist_ok=True)
        work = (options.work or Path(tempfile.gettempdir()) / "tilewright-llm").resolve() / options.model
        if options.again:
            forget(state, options.model)
        deadline = time.monotonic() + options.seconds
        bench = Bench(
            state, options.model, work, options.threads, options.turn, options.rounds, options.starts, deadline
        )
        good = measure(bench, names, workloads, only_build=options.build)
    record = write(state, options.model, skipped, options.output)
    text = report(state.machine, state.results, options.model, names, skipped)
    print(json.dumps(record, indent=1) if options.json else text)
    return OK if good else FAILED


if __name__ == "__main__":
    sys.exit(main())

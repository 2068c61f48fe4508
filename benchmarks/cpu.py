"""Tilewright on a CPU beside PyTorch eager, torch.compile, AOTInductor, ONNX Runtime and OpenVINO, in one run.

    python -m benchmarks.cpu                                     # all models; run again to go on where it ended
    python -m benchmarks.cpu --models resnet50,unet --systems tilewright,onnxruntime
    python -m benchmarks.cpu --precisions fp32,bf16 --seconds 3600   # everything: about 40 minutes
    python -m benchmarks.cpu --models unet --systems tilewright,openvino --rounds 4 --turn 0.2 --starts 2   # quick
    python -m benchmarks.cpu --target cpu:x86-64-v3              # Tilewright alone, beside the limits of that target
    python -m benchmarks.cpu --report                            # tables and plot of what was measured so far

Run it from the repository's folder, with the package and its extra ``bench`` installed. A system is a process of its
own on the same processors with the same threads, and all take turns; those that wait are stopped. Every system's
outputs are compared with eager float32 PyTorch's before it is timed. Results are kept in a state file after every
stage; tables, JSON and plot go to benchmarks/results. Ratios compare numbers of one run only: machines drift.
Exit codes: 0, 1 where something failed or was cut off by ``--seconds``, 2 wrong usage.

Where the time goes: every case is built (10 to 20 s for most systems), loaded, timed for 45 s at most, and the cases of
batch 1 are started anew, 10 to 40 s. Fewer ``--rounds`` and shorter ``--turn`` make ratios noisier, not wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tilewright.codegen.c.tuning import processor_name
from tilewright.codegen.targets import parse
from tilewright.models import names
from tilewright.runtime.cpu import features

from .cpu_goals import goals
from .cpu_measure import Bench, Failed, OutOfTime, say
from .cpu_plot import plot
from .cpu_report import report
from .cpu_units import BATCHED, MODELS, PRECISIONS, SYSTEMS, Case, cases, missing
from .state import OtherMachine, State

OK, FAILED, USAGE = 0, 1, 2
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")


def machine(threads: int, target: str = "") -> dict[str, Any]:
    """The processor and what it has, versions, and a target other than its own: what makes numbers comparable."""
    found: dict[str, Any] = {"cpu": processor_name()}
    found["instructions"] = parse("cpu", features()).name.removeprefix("cpu:")
    found |= {"threads": threads, "python": platform.python_version()}
    if target:
        found["target"] = target
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    """The names of a list with commas.

    Raises:
        SystemExit: one is not known.
    """
    found = [name for name in text.split(",") if name]
    for name in found:
        if name not in known:
            say(f"there is no {what} {name!r}: choose of {', '.join(dict.fromkeys(known))}")
            raise SystemExit(USAGE)
    return found


def skips(systems: Sequence[str], precisions: Sequence[str]) -> dict[str, str]:
    """System → why it is left out in any of the precisions."""
    found: dict[str, str] = {}
    for precision in precisions:
        for system in systems:
            reason = missing(system, precision)
            if reason is not None:
                found.setdefault(system, reason if "installed" in reason else f"in {precision}: {reason}")
    return found


def taking_part(case: Case, systems: Sequence[str], batched: Sequence[str]) -> list[str]:
    """The systems that a case is measured with."""
    chosen = systems if case.latency else [system for system in systems if system in batched]
    return [system for system in chosen if missing(system, case.precision) is None]


def forget(state: State, planned: Sequence[Case], work: Path) -> None:
    """Drop what was measured of these cases, and their artifacts."""
    for case in planned:
        shutil.rmtree(work / case.name, ignore_errors=True)
        for name in [name for name in state.results if f"{name}/".split("/", 1)[1].startswith(f"{case.name}/")]:
            del state.results[name]


def measure(bench: Bench, planned: Sequence[Case], systems: Sequence[str], batched: Sequence[str]) -> bool:
    """All cases while there is time; whether none failed and none is left."""
    good = True
    for case in planned:
        try:
            bench.run(case, taking_part(case, systems, batched))
        except Failed as error:
            say(str(error))
            good = False
        except OutOfTime:
            say(f"the next stage of {case.name} does not fit into --seconds: run again to go on")
            return False
    return good


def has_errors(state: State, planned: Sequence[Case]) -> bool:
    """Whether any system failed in these cases."""
    items = [
        state.results.get(f"{stage}/{case.name}", {"systems": {}}) for case in planned for stage in ("time", "start")
    ]
    return any("error" in system for item in items for system in item["systems"].values())


def write(
    state: State, planned: Sequence[Case], skipped: dict[str, str], matmuls: Sequence[Any], folder: Path
) -> dict[str, Any]:
    """JSON and plot in the folder, and what the JSON holds."""
    today = datetime.date.today().isoformat()
    target = state.machine.get("target", "").partition(":")[2]
    path = folder / f"{today}-cpu-systems{f'-{target}' if target else ''}.json"
    record = {"date": today, "machine": state.machine}
    record["goals"] = [asdict(goal) | {"reached": goal.reached} for goal in goals(state.results, planned, matmuls)]
    record |= {"skipped": skipped, "results": state.results}
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    try:
        drawn = plot(state.results, planned, path.with_suffix(".png"))
    except ImportError:
        say("no plot: matplotlib is not installed (pip install 'tilewright[bench]')")
        drawn = False
    say(f"written to {path}" + (f" and {path.with_suffix('.png').name}" if drawn else ""))
    return record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of the model registry, separated by commas")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas")
    parser.add_argument("--throughput-systems", default=",".join(BATCHED), help="those measured at larger batches, too")
    parser.add_argument("--precisions", default="fp32", help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--target", default="", help="for Tilewright, such as cpu:x86-64-v3; measures no other system")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=570.0, help="time for this run; stages that do not fit wait")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every system; fewer where calls are long")
    parser.add_argument("--turn", type=float, default=0.3, help="seconds of a turn; one call at least")
    parser.add_argument("--starts", type=int, default=7, help="new processes per system; fewer where they are slow")
    parser.add_argument("--state", type=Path, default=Path("build/cpu-benchmark.json"), help="what was measured so far")
    parser.add_argument("--work", type=Path, help="folder for artifacts (default: temporary, by the state's name)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")
    parser.add_argument("--kernels", type=Path, help="JSON of benchmarks.kernels, for the share of large products")
    parser.add_argument("--keep", action="store_true", help="leave artifacts in the work folder")
    parser.add_argument("--again", action="store_true", help="measure these models again")
    parser.add_argument("--report", action="store_true", help="tables, JSON and plot of the state file, and end")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    systems = chosen(options.systems, list(SYSTEMS), "system")
    batched = chosen(options.throughput_systems, list(SYSTEMS), "system")
    if options.target and systems == list(SYSTEMS):
        systems = ["tilewright"]
    if options.target and systems != ["tilewright"]:
        say("--target restricts Tilewright only: no other system can be compared with it")
        return USAGE
    matmuls = json.loads(options.kernels.read_text())["rows"] if options.kernels else []
    precisions = chosen(options.precisions, list(PRECISIONS), "precision")
    planned = cases(chosen(options.models, [*MODELS, *names()], "model"), precisions)
    skipped = skips(systems, precisions)
    good = True
    if options.report:
        if not options.state.exists():
            say(f"nothing was measured: there is no {options.state}")
            return USAGE
        data = json.loads(options.state.read_text())
        state = State(options.state, data["machine"], data["results"])
    else:
        try:
            state = State.open(options.state, machine(options.threads, options.target))
        except OtherMachine as error:
            say(str(error))
            return USAGE
        options.state.parent.mkdir(parents=True, exist_ok=True)
        work = options.work or Path(tempfile.gettempdir()) / f"tilewright-{options.state.stem}"
        work = work.resolve()
        if options.again:
            forget(state, planned, work)
        deadline = time.monotonic() + options.seconds
        bench = Bench(
            state, work, options.threads, options.turn, options.rounds, options.starts, deadline, options.keep,
            options.target,
        )  # fmt: skip
        try:
            good = measure(bench, planned, systems, batched) and not has_errors(state, planned)
        finally:
            bench.close()
    record = write(state, planned, skipped, matmuls, options.output)
    text = report(state.machine, state.results, planned, skipped, matmuls)
    print(json.dumps(record, indent=1) if options.json else text)
    return OK if good else FAILED


if __name__ == "__main__":
    sys.exit(main())

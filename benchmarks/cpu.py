"""Tilewright on a CPU beside PyTorch eager, torch.compile, AOTInductor, ONNX Runtime and OpenVINO, in one run.

    python -m benchmarks.cpu                                     # all models; run again to go on where it ended
    python -m benchmarks.cpu --models resnet50,unet --systems tilewright,onnxruntime
    python -m benchmarks.cpu --precisions fp32,bf16 --seconds 3000
    python -m benchmarks.cpu --report                            # tables and plot of what was measured so far

Run it from the repository's folder, with the package and its extra ``bench`` installed. A system is a process of its
own on the same processors with the same threads, and all take turns; those that wait are stopped. Every system's
outputs are compared with eager float32 PyTorch's before it is timed. Results are kept in a state file after every
stage; tables, JSON and plot go to benchmarks/results. Ratios compare numbers of one run only: machines drift.
Exit codes: 0, 1 where something failed or was cut off by ``--seconds``, 2 wrong usage.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tilewright.models import names

from .cpu_measure import Bench, Failed, OutOfTime, say
from .cpu_plot import plot
from .cpu_report import report, summary
from .cpu_units import MODELS, PRECISIONS, SYSTEMS, Case, cases, missing
from .state import OtherMachine, State

OK, FAILED, USAGE = 0, 1, 2
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")


def machine(threads: int) -> dict[str, Any]:
    """The processor and the versions."""
    found: dict[str, Any] = {"cpu": processor(), "threads": threads, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name."""
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


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


def forget(state: State, planned: Sequence[Case], work: Path) -> None:
    """Drop what was measured of these cases, and their artifacts."""
    for case in planned:
        shutil.rmtree(work / case.name, ignore_errors=True)
        for name in [name for name in state.results if f"{name}/".split("/", 1)[1].startswith(f"{case.name}/")]:
            del state.results[name]


def measure(bench: Bench, planned: Sequence[Case], systems: Sequence[str]) -> bool:
    """All cases while there is time; whether none failed and none is left."""
    good = True
    for case in planned:
        try:
            bench.run(case, [system for system in systems if missing(system, case.precision) is None])
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


def write(state: State, planned: Sequence[Case], skipped: dict[str, str], folder: Path) -> dict[str, Any]:
    """JSON and plot in the folder, and what the JSON holds."""
    today = datetime.date.today().isoformat()
    path = folder / f"{today}-cpu-systems.json"
    record = {"date": today, "machine": state.machine, "summary": summary(state.results, planned)}
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
    parser.add_argument("--precisions", default="fp32", help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=570.0, help="time for this run; stages that do not fit wait")
    parser.add_argument("--rounds", type=int, default=10, help="turns of every system")
    parser.add_argument("--turn", type=float, default=0.4, help="seconds of a turn; one call at least")
    parser.add_argument("--starts", type=int, default=7, help="new processes per system for start-up and memory")
    parser.add_argument("--state", type=Path, default=Path("build/cpu-benchmark.json"), help="what was measured so far")
    parser.add_argument("--work", type=Path, help="folder for artifacts (default: temporary, by the state's name)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and plot")
    parser.add_argument("--keep", action="store_true", help="leave artifacts in the work folder")
    parser.add_argument("--again", action="store_true", help="measure these models again")
    parser.add_argument("--report", action="store_true", help="tables, JSON and plot of the state file, and end")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    systems = chosen(options.systems, list(SYSTEMS), "system")
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
            state = State.open(options.state, machine(options.threads))
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
            state, work, options.threads, options.turn, options.rounds, options.starts, deadline, options.keep
        )
        good = measure(bench, planned, systems) and not has_errors(state, planned)
    record = write(state, planned, skipped, options.output)
    print(json.dumps(record, indent=1) if options.json else report(state.machine, state.results, planned, skipped))
    return OK if good else FAILED


if __name__ == "__main__":
    sys.exit(main())

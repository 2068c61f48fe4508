"""The stages of the benchmark of language models: build all artifacts, time steps in turns, start processes anew."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cpu_measure import LOAD_LIMIT, START_LIMIT, Failed, OutOfTime, covers, judged, say
from .cpu_worker import LIMITS
from .llm_units import CONTENDERS, Workload
from .process import Process
from .state import State

BUILD_LIMIT, TURN_LIMIT = 1800.0, 300.0

PROFILED = "tilewright"
"""The system whose kernels are timed one by one, after its turns."""

BUILD_SECONDS, LOAD_SECONDS, STEP_SECONDS, START_SECONDS = 60.0, 15.0, 1.0, 3.0
"""About what a build, a load, the last step of a turn and a start take, for keeping to a budget."""


@dataclass
class Bench:
    """What a run measures with.

    Attributes:
        state: where results go.
        model: whose artifacts are measured.
        folder: where they are.
        threads: of every contender.
        turn: seconds of a contender's turn; one step at least.
        rounds: turns of every contender at every workload.
        starts: new processes per contender, besides one that fills the page cache; 0 for none at all.
        deadline: when to stop, by the monotonic clock.
    """

    state: State
    model: str
    folder: Path
    threads: int
    turn: float
    rounds: int
    starts: int
    deadline: float

    def require_time(self, seconds: float) -> None:
        """Raise :class:`OutOfTime` unless so much is left."""
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTime

    def name(self, stage: str, what: str = "") -> str:
        """Of a result in the state."""
        return "/".join(part for part in (stage, self.model, what) if part)

    def run(self, names: Sequence[str], workloads: Sequence[Workload]) -> None:
        """All that is not in the state yet.

        Raises:
            OutOfTime: before a stage that the budget does not hold.
            Failed: there is no checkpoint or no reference, or the processor's limits cannot be measured.
        """
        built = self.build(names)
        for kind in dict.fromkeys(workload.kind for workload in workloads):
            asked = [workload for workload in workloads if workload.kind == kind]
            if not self.done(kind, names, asked):
                self.require_time(self.about(len(built), len(asked)))
                self.state.record(self.name("time", kind), self.time(names, built, asked))
        if self.starts and not covers(self.state.results.get(self.name("start")), names):
            self.require_time(START_SECONDS * len(built) * (self.starts + 1))
            self.state.record(self.name("start"), self.start(names, built))

    def done(self, kind: str, names: Sequence[str], workloads: Sequence[Workload]) -> bool:
        """Whether the state holds all of these; numbers of several runs are not mixed."""
        found = self.state.results.get(self.name("time", kind))
        return covers(found, names) and {workload.name for workload in workloads} <= set(found["limits"])

    def about(self, contenders: int, workloads: int) -> float:
        """Roughly the seconds of timing."""
        return contenders * (LOAD_SECONDS + workloads * self.rounds * (self.turn + STEP_SECONDS))

    def build(self, names: Sequence[str]) -> list[str]:
        """Build what is not there yet, each in a process of its own; the contenders that can be run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        built, builder = [], None
        environment = {"TILEWRIGHT_CACHE": str(self.folder / "cache"), **self.environment()}
        try:
            for what in ("checkpoint", "reference", *names):
                marker, name = self.folder / f"{what.replace('/', '.')}.built", self.name("build", what)
                if not marker.exists():
                    self.require_time(BUILD_SECONDS)
                    say(f"building {what}")
                    builder = builder or Process("benchmarks.llm_build", environment)
                    request = {"what": what, "model": self.model, "threads": self.threads, "folder": str(self.folder)}
                    answer = builder.ask(request, BUILD_LIMIT)
                    error = answer.get("failed") or answer.get("error")
                    builder = None if builder.ended else builder
                    self.state.record(name, {"error": error} if error else answer)
                    if not error:
                        marker.write_text(json.dumps(answer))
                elif name not in self.state.results:  # built for another state file
                    self.state.record(name, json.loads(marker.read_text()))
                if marker.exists():
                    built.append(what)
                elif what not in CONTENDERS:
                    raise Failed(f"{what}: {self.state.results[name]['error']}")
        finally:
            if builder is not None:
                builder.close()
        return built[2:]

    def environment(self) -> dict[str, str]:
        """Variables of all processes: threads, and none for numpy's BLAS, which nobody uses."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", **threads}

    def not_built(self, name: str) -> dict[str, Any]:
        """A contender's result where its build failed."""
        return {"error": f"not built: {self.state.results[self.name('build', name)]['error']}"}

    def time(self, names: Sequence[str], built: Sequence[str], workloads: Sequence[Workload]) -> dict[str, Any]:
        """Every contender in turns at every workload, and the processor's limits between them."""
        workers: dict[str, Process] = {}
        found = {name: self.not_built(name) for name in names if name not in built}
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
        rates: dict[str, list[dict[str, float]]] = {}
        kernels: dict[tuple[str, str], list[dict[str, Any]]] = {}
        scratch = tempfile.TemporaryDirectory()  # for the limits' loops
        decoding = [workload.size for workload in workloads if workload.kind == "decode"]
        try:
            for name in (LIMITS, *built):
                say(f"loading {name}")
                workers[name] = worker = Process("benchmarks.llm_worker", self.environment())
                folder = scratch.name if name == LIMITS else str(self.folder)
                request = {"contender": name, "folder": folder, "threads": self.threads}
                if name != LIMITS:
                    request |= {"model": self.model, "sequences": max(decoding, default=1)}
                answer = worker.ask({"load": request}, LOAD_LIMIT)
                found[name] = judged(answer, CONTENDERS[name].tolerance if name != LIMITS else 0.0)
                worker.stop()
            for workload in workloads:
                say(f"{workload.name}: {self.rounds} rounds")
                for index in range(self.rounds):
                    order = [name for name in workers if "error" not in found[name]]
                    for name in order[index % len(order) :] + order[: index % len(order)]:
                        workers[name].resume()
                        request = {"turn": {"workload": workload.name, "seconds": self.turn}}
                        answer = workers[name].ask(request, TURN_LIMIT)
                        workers[name].stop()
                        if "error" in answer:
                            found[name] = answer
                        elif name == LIMITS:
                            rates.setdefault(workload.name, []).append(answer["rates"])
                        else:
                            turns.setdefault((name, workload.name), []).append(answer)
                for name in [name for name, _ in turns if CONTENDERS[name].system == PROFILED]:
                    if "error" not in found[name] and (name, workload.name) not in kernels:
                        workers[name].resume()
                        answer = workers[name].ask({"profile": {"workload": workload.name, "calls": 5}}, TURN_LIMIT)
                        workers[name].stop()
                        kernels[name, workload.name] = answer.get("kernels", [])
        finally:
            for worker in workers.values():
                worker.close()
            scratch.cleanup()
        limits = found.pop(LIMITS)
        if "error" in limits:
            raise Failed(f"the processor's limits cannot be measured: {limits['error']}")
        for (name, workload_name), answers in turns.items():
            if "error" not in found[name]:
                measured = statistics_of(answers) | {"kernels": kernels.get((name, workload_name), [])}
                found[name].setdefault("workloads", {})[workload_name] = measured
        middle = {name: median_of(items) for name, items in rates.items()}
        return {"systems": found, "limits": middle, "limit_turns": rates}

    def start(self, names: Sequence[str], built: Sequence[str]) -> dict[str, Any]:
        """New processes up to their first token, in turns; the first of each only fills the page cache."""
        runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in built}
        found = {name: self.not_built(name) for name in names if name not in built}
        say(f"starting each {self.starts + 1} times")
        for _ in range(self.starts + 1):
            for name, record in runs.items():
                if name not in found:
                    result = self.start_one(name)
                    if isinstance(result, str):
                        found[name] = {"error": result}
                    else:
                        record.append(result)
        for name, record in runs.items():
            if name not in found:
                seconds, peaks, caches = zip(*record[1:], strict=True)
                found[name] = {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
                found[name] |= {"peak_bytes": statistics.median(peaks), "cache_total": caches[0]}
        return {"systems": found}

    def start_one(self, name: str) -> tuple[float, int, int] | str:
        """Seconds to the first token, bytes of the peak and of the cache; or what went wrong."""
        command = [sys.executable, "-m", "benchmarks.llm_worker", name, self.model, str(self.folder)]
        environment = os.environ | self.environment()
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [*command, str(self.threads)], capture_output=True, text=True, env=environment, timeout=START_LIMIT
            )
        except subprocess.TimeoutExpired:
            return f"no token in {START_LIMIT:.0f} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        moment, peak, cache = done.stdout.split()[-3:]
        return float(moment) - begin, int(peak), int(cache)


def statistics_of(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all turns: milliseconds of a step (median, 10th and 90th percentile) and positions that a step saw."""
    times = sorted(1e3 * seconds for answer in answers for seconds in answer["times"])
    seen = [positions for answer in answers for positions in answer["positions"]]
    last = len(times) - 1
    return {
        "ms": statistics.median(times),
        "low": times[round(0.1 * last)],
        "high": times[round(0.9 * last)],
        "steps": len(times),
        "positions": statistics.mean(seen),
        "turns": [1e3 * statistics.median(answer["times"]) for answer in answers],
    }


def median_of(rates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every limit."""
    return {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}

"""The CPU benchmark's stages for one case: build all systems' artifacts, time them in turns, start them anew."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cpu_ratios import OURS, WITH_NUMPY
from .cpu_units import SYSTEMS, TOLERANCES, Case
from .cpu_worker import BUFFERS, LIMITS, PYTHON
from .process import Process
from .state import State

BUILD_LIMIT, LOAD_LIMIT, TURN_LIMIT, START_LIMIT = 900.0, 600.0, 120.0, 300.0
BUILD_SECONDS, LOAD_SECONDS, START_SECONDS = 30.0, 6.0, 40.0
"""About what a build, loading a system and the starts of a case take, for keeping to a budget."""
USUAL_RATES = {"fp32": 150e9, "bf16": 220e9}
"""Operations per second of a system, for the same."""

CASE_SECONDS, FEWEST_ROUNDS = 45.0, 4
"""All turns of a case take about so long at most: where calls are long there are fewer rounds, but at least so many."""

STARTS_SECONDS = 5.0
"""A system is started no more once its starts took so long."""


class Failed(Exception):
    """A case cannot be measured at all."""


class OutOfTime(Exception):
    """The budget does not hold the next stage; the next run goes on with it."""


@dataclass
class Bench:
    """What a run measures with.

    Attributes:
        state: where results go.
        work: the folder for artifacts.
        threads: of every system.
        turn: seconds of a system's turn.
        rounds: turns of every system, at most.
        starts: new processes per system.
        deadline: when to stop, by the monotonic clock.
        keep: whether artifacts stay after their case.
        target: that Tilewright compiles for and the limits are measured with; empty for this machine's.
        builder: the process that builds, once there is one.
    """

    state: State
    work: Path
    threads: int
    turn: float
    rounds: int
    starts: int
    deadline: float
    keep: bool = False
    target: str = ""
    builder: Process | None = None

    def run(self, case: Case, systems: Sequence[str]) -> None:
        """All stages of a case that are not in the state yet, with those of these systems that could be built.

        Raises:
            OutOfTime: before a stage that the budget does not hold.
            Failed: there is no reference, or the processor's limits cannot be measured.
        """
        folder = self.work / case.name
        if not self.done(case, systems):
            built = self.build(case, systems, folder)
            if not covers(self.state.results.get(f"time/{case.name}"), systems):
                self.require_time(self.about(case, len(built)))
                self.state.record(f"time/{case.name}", self.time(case, systems, built, folder))
            if case.latency and not covers(self.state.results.get(f"start/{case.name}"), systems):
                self.require_time(START_SECONDS)
                self.state.record(f"start/{case.name}", self.start(case, systems, built, folder))
        if not self.keep:
            shutil.rmtree(folder, ignore_errors=True)

    def done(self, case: Case, systems: Sequence[str]) -> bool:
        """Whether the state holds all of a case."""
        stages = ("time", "start") if case.latency else ("time",)
        return all(covers(self.state.results.get(f"{stage}/{case.name}"), systems) for stage in stages)

    def about(self, case: Case, systems: int) -> float:
        """Roughly the seconds of timing a case."""
        return systems * LOAD_SECONDS + self.rounds_of(case, systems) * systems * self.turn_of(case)

    def turn_of(self, case: Case) -> float:
        """Roughly the seconds of a turn, which holds one call at least."""
        flops = self.state.results[f"build/{case.name}/reference"]["flops"]
        return self.turn + 1.5 * float(flops) / USUAL_RATES[case.precision]

    def rounds_of(self, case: Case, systems: int) -> int:
        """Turns of every system in a case."""
        fitting = int(CASE_SECONDS / (systems * self.turn_of(case)))
        return min(self.rounds, max(FEWEST_ROUNDS, fitting))

    def require_time(self, seconds: float) -> None:
        """Raise :class:`OutOfTime` unless so much is left."""
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTime

    def build(self, case: Case, systems: Sequence[str], folder: Path) -> list[str]:
        """Build what is not there yet, each in a process and a folder of its own; the systems that can be run."""
        folder.mkdir(parents=True, exist_ok=True)
        built = []
        for what in ("reference", *systems):
            marker, name = folder / f"{what}.built", f"build/{case.name}/{what}"
            if not marker.exists():
                self.require_time(BUILD_SECONDS)
                say(f"{case.name}: building {what}")
                result = self._build(case, what, folder)
                self.state.record(name, result)
                if "error" not in result:
                    marker.write_text(json.dumps(result))
            elif name not in self.state.results:  # built for another state file
                self.state.record(name, json.loads(marker.read_text()))
            if marker.exists():
                built.append(what)
            elif what == "reference":
                raise Failed(f"{case.name}: {self.state.results[name]['error']}")
        return built[1:]

    def _build(self, case: Case, what: str, folder: Path) -> dict[str, Any]:
        if what in SYSTEMS and not SYSTEMS[what].builds:
            return {}
        shutil.rmtree(folder / f"cache.{what}", ignore_errors=True)  # compile times are those of empty caches
        if self.builder is None or self.builder.ended:
            self.builder = Process("benchmarks.cpu_build", self.environment(folder, what))
        request = {"what": what, "model": case.model, "batch": case.batch, "precision": case.precision}
        request |= {"threads": self.threads, "folder": str(folder), "target": self.target}
        answer = self.builder.ask(request | {"environment": self.environment(folder, what)}, BUILD_LIMIT)
        return {"error": answer["failed"]} if "failed" in answer else answer

    def close(self) -> None:
        """End the process that builds."""
        if self.builder is not None:
            self.builder.close()

    def not_built(self, case: Case, system: str) -> dict[str, Any]:
        """A system's result where its build failed."""
        return {"error": f"not built: {self.state.results[f'build/{case.name}/{system}']['error']}"}

    def environment(self, folder: Path, system: str) -> dict[str, str]:
        """Variables of a system's processes: threads, and caches that lie with the case.

        No system uses numpy's BLAS, whose threads would spin for a while in every new process. Python keeps what it
        compiled of its modules, as an installed package has it.
        """
        inductor = "aotinductor" if system == "aotinductor" else "inductor"
        caches = {
            "TILEWRIGHT_CACHE": str(folder / "cache.tilewright"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache.{inductor}"),
        }
        common = {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
        return caches | common | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))

    def time(self, case: Case, systems: Sequence[str], built: Sequence[str], folder: Path) -> dict[str, Any]:
        """Every system in turns, and the processor's limits between them; then Tilewright's kernels."""
        workers: dict[str, Process] = {}
        found = {name: self.not_built(case, name) for name in systems if name not in built}
        turns: dict[str, list[list[float]]] = {}
        rates: list[dict[str, float]] = []
        kernels: dict[str, Any] = {"kernels": []}
        try:
            for name in (LIMITS, *built):
                say(f"{case.name}: loading {name}")
                workers[name] = worker = Process("benchmarks.cpu_worker", self.environment(folder, name))
                request = {"system": name, "folder": str(folder), "threads": self.threads}
                request |= {"target": self.target} if name == LIMITS else {"precision": case.precision}
                answer = worker.ask({"load": request}, LOAD_LIMIT)
                found[name] = judged(answer, TOLERANCES[case.precision])
                worker.stop()
            rounds = self.rounds_of(case, len(built))
            say(f"{case.name}: {rounds} rounds")
            for index in range(rounds):
                names = [name for name in workers if "error" not in found[name]]
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    workers[name].resume()
                    answer = workers[name].ask({"turn": self.turn}, TURN_LIMIT)
                    workers[name].stop()
                    if "error" in answer:
                        found[name] = answer
                    elif name == LIMITS:
                        rates.append(answer["rates"])
                    else:
                        turns.setdefault(name, []).append(answer["times"])
            if "error" not in found.get("tilewright", {"error": ""}):
                workers["tilewright"].resume()
                kernels = workers["tilewright"].ask({"profile": 20}, TURN_LIMIT)
        finally:
            for worker in workers.values():
                worker.close()
        limits = found.pop(LIMITS)
        if "error" in limits:
            raise Failed(f"the processor's limits cannot be measured: {limits['error']}")
        for name, times in turns.items():
            if "error" not in found[name]:
                found[name] |= statistics_of(times)
        middle = {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}
        return {"systems": found, "limits": middle, **kernels}

    def start(self, case: Case, systems: Sequence[str], built: Sequence[str], folder: Path) -> dict[str, Any]:
        """New processes up to their first output, in turns; the first, which fills the page cache, counts if alone.

        Among them processes that do nothing but start Python, import numpy and read the inputs. Tilewright starts in
        two ways: without numpy, which is what counts for it, and with numpy arrays, as the others.
        """
        ours = (BUFFERS,) if OURS in built else ()
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in (*built, *ours, PYTHON)}
        found = {name: self.not_built(case, name) for name in systems if name not in built}
        say(f"{case.name}: starting each {self.starts + 1} times")
        for _ in range(self.starts + 1):
            for name, record in runs.items():
                spent = sum(seconds for seconds, _ in record)
                if name in found or spent > STARTS_SECONDS:
                    continue
                result = self.start_one(case, name, folder)
                if isinstance(result, str):
                    found[name] = {"error": result}
                else:
                    record.append(result)
        for name, record in runs.items():
            if name not in found:
                seconds, peaks = zip(*(record[1:] or record), strict=True)
                low, high = min(seconds), max(seconds)
                middle = statistics.median(seconds)
                found[name] = {"seconds": middle, "low": low, "high": high, "peak_bytes": statistics.median(peaks)}
        alone = found.pop(PYTHON)
        if not ours:
            return {"python": alone, "systems": found}
        with_numpy, found[OURS] = found[OURS], found.pop(BUFFERS)
        return {"python": alone, WITH_NUMPY: with_numpy, "systems": found}

    def start_one(self, case: Case, system: str, folder: Path) -> tuple[float, int] | str:
        """Seconds and bytes of one start, or what went wrong."""
        command = [sys.executable, "-m", "benchmarks.cpu_worker", system, str(folder), str(self.threads)]
        environment = os.environ | self.environment(folder, system)
        begin = time.monotonic()
        try:
            done = subprocess.run(
                [*command, case.precision], capture_output=True, text=True, env=environment, timeout=START_LIMIT
            )
        except subprocess.TimeoutExpired:
            return f"no output in {START_LIMIT:.0f} s"
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        moment, peak = done.stdout.split()[-2:]
        return float(moment) - begin, int(peak)


def covers(result: dict[str, Any] | None, systems: Sequence[str]) -> bool:
    """Whether a stage was measured with all of these systems at once; numbers of several runs are not mixed."""
    return result is not None and set(systems) <= set(result["systems"])


def judged(answer: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """A loaded system's answer; an error where its outputs are not the reference's."""
    if "error" in answer or answer["deviation"] <= tolerance:
        return answer
    return {"error": f"its outputs differ from eager PyTorch's by {answer['deviation']:.2g}, allowed is {tolerance:g}"}


def statistics_of(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Milliseconds of one call: median, the 10th and 90th percentile, the least, and every turn's median."""
    times = sorted(1e3 * seconds for turn in turns for seconds in turn)
    last = len(times) - 1
    return {
        "ms": statistics.median(times),
        "low": times[round(0.1 * last)],
        "high": times[round(0.9 * last)],
        "least": times[0],
        "calls": len(times),
        "turns": [1e3 * statistics.median(turn) for turn in turns],
    }


def say(text: str) -> None:
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)

"""The process of the CPU benchmark in which one system runs one case.

    python -m benchmarks.cpu_worker                                            # asked in lines of JSON
    python -m benchmarks.cpu_worker SYSTEM FOLDER THREADS PRECISION            # up to the first output, once
    python -m benchmarks.cpu_worker buffers FOLDER THREADS PRECISION           # Tilewright without numpy
    python -m benchmarks.cpu_worker python FOLDER THREADS PRECISION            # up to the inputs, without any system

Requests: ``{"load": {"system", "folder", "threads", "precision"}}`` loads, runs and compares with the reference;
``{"turn": seconds}`` gives the seconds of calls that follow each other; ``{"profile": calls}`` gives Tilewright's
kernels. The system ``limits`` measures the processor's limits in its turns. Imports as little as it can.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .cpu_systems import INPUTS, LOADERS, OUTPUTS, load_tilewright
from .values import deviation, load_arrays, load_raw

LIMITS = "limits"
BUFFERS = "buffers"
"""What stands for a new process in which Tilewright takes plain bytes, so that nothing imports numpy."""
PYTHON = "python"
"""What stands for a process that starts Python, imports numpy and reads the inputs: no start is faster."""

LONG_CALL = 0.25
"""Seconds of a call beside which finding the caches full of others' data is nothing."""


def bind_to_processors(threads: int) -> None:
    """Keep to as many processors as there are threads, the same ones in every process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Runner:
    """A loaded system and its inputs."""

    def __init__(self, system: str, folder: str, threads: int, precision: str) -> None:
        self.system, self.folder, self.threads = system, Path(folder), threads
        self.inputs = load_arrays(self.folder / INPUTS)
        self.call = LOADERS[system](self.folder, threads, precision)

    def check(self) -> dict[str, Any]:
        """How far the outputs are from the reference's."""
        outputs = self.call(self.inputs)
        start = time.perf_counter()
        self.call(self.inputs)
        self.last = time.perf_counter() - start
        return {"deviation": deviation(load_arrays(self.folder / OUTPUTS), outputs)}

    def turn(self, seconds: float) -> dict[str, Any]:
        """Seconds of calls; a short first one, which finds the caches full of others' data, is not counted."""
        if self.last < LONG_CALL:
            self.call(self.inputs)
        times: list[float] = []
        deadline = time.perf_counter() + seconds
        while not times or time.perf_counter() < deadline:
            start = time.perf_counter()
            self.call(self.inputs)
            times.append(time.perf_counter() - start)
        self.last = times[-1]
        return {"times": times}

    def profile(self, calls: int) -> dict[str, Any]:
        """What Tilewright's kernels took in one call, slowest first."""
        from dataclasses import asdict

        from tilewright.compiler.cli.measure import profile_kernels

        with load_tilewright(self.folder, self.threads) as model:
            entry = model.entry(model.entries[0])
            inputs = dict(zip((port.name for port in entry.inputs), self.inputs, strict=True))
            return {"kernels": [asdict(item) for item in profile_kernels(entry, inputs, {}, calls)]}


class LimitsRunner:
    """The processor's limits in place of a system."""

    def __init__(self, folder: str, threads: int, target: str) -> None:
        from .limits import loops, target_of

        self.threads = threads
        self.loops = loops(target_of(target), Path(folder))

    def check(self) -> dict[str, Any]:
        """Nothing to compare."""
        return {"deviation": 0.0}

    def turn(self, seconds: float) -> dict[str, Any]:
        """The best rate of each loop."""
        share = seconds / len(self.loops)
        best = dict.fromkeys(self.loops, 0.0)
        for name, loop in self.loops.items():
            deadline = time.perf_counter() + share
            while not best[name] or time.perf_counter() < deadline:
                best[name] = max(best[name], loop.rate(self.threads))
        return {"rates": best}


class Handler:
    """Answers requests; the first has to load."""

    runner: Any

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request."""
        ((what, argument),) = request.items()
        if what == "load":
            bind_to_processors(argument["threads"])
            if argument["system"] == LIMITS:
                self.runner = LimitsRunner(argument["folder"], argument["threads"], argument.get("target", ""))
            else:
                self.runner = Runner(**argument)
            answer: dict[str, Any] = self.runner.check()
            return answer
        chosen = {"turn": self.runner.turn, "profile": getattr(self.runner, "profile", None)}[what]
        done: dict[str, Any] = chosen(argument)
        return done


def start_once(system: str, folder: str, threads: str, precision: str) -> None:
    """Print when the first output was there, by the clock that all processes share, and the peak of memory in bytes."""
    bind_to_processors(int(threads))
    if system == PYTHON:
        load_arrays(Path(folder) / INPUTS)
        print(time.monotonic(), peak_bytes())
        return
    if system == BUFFERS:
        call = call_with_buffers(Path(folder), int(threads))
    else:
        runner = Runner(system, folder, int(threads), precision)
        call = partial(runner.call, runner.inputs)
    call()
    moment = time.monotonic()
    for _ in range(2):
        call()
    if system == BUFFERS and "numpy" in sys.modules:
        raise RuntimeError("numpy was imported in the process that is to do without")
    print(moment, peak_bytes())


def call_with_buffers(folder: Path, threads: int) -> Callable[[], Any]:
    """A call of Tilewright on the bytes of the inputs, whose shapes are fixed."""
    model = load_tilewright(folder, threads)
    return partial(model, *load_raw(folder, len(model.inputs)))


def peak_bytes() -> int:
    """The most memory that this process had at once, with the pages of mapped files that it touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not tell a process its peak of memory")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        start_once(*sys.argv[1:])
    else:
        from .process import serve

        serve(Handler())

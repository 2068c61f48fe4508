"""The process of the benchmark of language models in which one contender runs.

    python -m benchmarks.llm_worker                                       # asked in lines of JSON
    python -m benchmarks.llm_worker CONTENDER MODEL FOLDER THREADS        # up to the first answer to a prompt, once

Requests: ``{"load": {"contender", "model", "folder", "threads", "sequences"}}`` loads and compares logits with the
reference's; ``{"turn": {"workload", "seconds"}}`` gives the seconds of steps and the positions that they saw;
``{"profile": {"workload", "calls"}}`` gives the kernels of a step of Tilewright. The contender ``limits`` measures the
processor's limits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .cpu_worker import LIMITS, LimitsRunner, bind_to_processors, peak_bytes
from .llm_systems import open_decoder
from .llm_units import CHECK_PROMPT, CONTENDERS, FIRST_PROMPT, MODELS, PROMPT, ROOM, WORKLOADS, tokens

REFERENCE = "reference.npy"


class Runner:
    """A loaded contender and the tokens that it is given."""

    def __init__(self, contender: str, model: str, folder: str, threads: int, sequences: int) -> None:
        self.folder, self.dimensions = Path(folder), MODELS[model]
        self.decoder = open_decoder(CONTENDERS[contender], self.dimensions, self.folder, threads, sequences)
        self.text = tokens(self.dimensions, PROMPT + ROOM).tolist()
        self.prompted = False  # whether sequence 0 has the prompt

    def check(self) -> dict[str, Any]:
        """How far logits are from the reference's, both of a prompt at once and of one whose last token comes alone."""
        want = np.load(self.folder / REFERENCE)
        at_once = self.decoder.append([self.text[:CHECK_PROMPT]], 0)[0].copy()
        self.decoder.rewind(1, CHECK_PROMPT - 1)
        alone = self.decoder.append([self.text[CHECK_PROMPT - 1 : CHECK_PROMPT]], CHECK_PROMPT - 1)[0]
        largest = float(np.abs(want).max())
        errors = [float(np.abs(got - want).max()) / largest for got in (at_once, alone)]
        return {"deviation": float(np.max(errors)), **self.decoder.facts()}

    def turn(self, workload: str, seconds: float) -> dict[str, Any]:
        """Seconds of steps, and positions that each saw in all sequences; the first step of decoding is not counted."""
        asked = WORKLOADS[workload]
        steps = self.prompts() if asked.kind == "prompt" else self.decoding(asked.size)
        times: list[float] = []
        seen: list[int] = []
        deadline = time.perf_counter() + seconds
        for spent, positions in steps:
            times.append(spent)
            seen.append(positions)
            if time.perf_counter() >= deadline:
                break
        return {"times": times, "positions": seen}

    def prompts(self) -> Any:
        """A prompt again and again."""
        while True:
            self.decoder.rewind(1, 0)
            start = time.perf_counter()
            self.decoder.append([self.text[:PROMPT]], 0)
            yield time.perf_counter() - start, PROMPT
            self.prompted = True

    def begin_decoding(self, batch: int) -> None:
        """Give all sequences the prompt and nothing else."""
        if not self.prompted:
            self.decoder.rewind(1, 0)
            self.decoder.append([self.text[:PROMPT]], 0)
            self.prompted = True
        self.decoder.rewind(batch, PROMPT)

    def decoding(self, batch: int) -> Any:
        """A token of each sequence, from the end of the prompt on; from there again where there is no more room."""
        self.begin_decoding(batch)
        counted = False
        while True:
            for at in range(PROMPT, PROMPT + ROOM):
                start = time.perf_counter()
                self.decoder.append([self.text[at : at + 1]] * batch, at)
                if counted:
                    yield time.perf_counter() - start, batch * (at + 1)
                counted = True
            self.decoder.rewind(batch, PROMPT)

    def profile(self, workload: str, calls: int) -> dict[str, Any]:
        """The kernels of a step; none where a system does not tell."""
        asked = WORKLOADS[workload]
        if not hasattr(self.decoder, "profile"):
            return {"kernels": []}
        if asked.kind == "prompt":
            return {"kernels": self.decoder.profile([self.text[:PROMPT]], 0, calls)}
        self.begin_decoding(asked.size)
        return {"kernels": self.decoder.profile([self.text[PROMPT : PROMPT + 1]] * asked.size, PROMPT, calls)}


class Handler:
    """Answers requests; the first has to load."""

    runner: Any

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request."""
        ((what, argument),) = request.items()
        if what == "load":
            bind_to_processors(argument["threads"])
            if argument["contender"] == LIMITS:
                self.runner = LimitsRunner(argument["folder"], argument["threads"], "")
            else:
                self.runner = Runner(**argument)
            answer: dict[str, Any] = self.runner.check()
            return answer
        if isinstance(self.runner, LimitsRunner):
            return self.runner.turn(argument["seconds"])
        done: dict[str, Any] = {"turn": self.runner.turn, "profile": self.runner.profile}[what](**argument)
        return done


def start_once(contender: str, model: str, folder: str, threads: str) -> None:
    """Print when the first token was known, by the clock that all processes share, and the peak of memory in bytes."""
    bind_to_processors(int(threads))
    dimensions = MODELS[model]
    decoder = open_decoder(CONTENDERS[contender], dimensions, Path(folder), int(threads), 1)
    token = int(decoder.append([tokens(dimensions, FIRST_PROMPT).tolist()], 0)[0].argmax())
    moment = time.monotonic()
    for place in range(4):
        token = int(decoder.append([[token]], FIRST_PROMPT + place)[0].argmax())
    print(moment, peak_bytes(), decoder.facts()["cache_total"])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        start_once(*sys.argv[1:])
    else:
        from .process import serve

        serve(Handler())

"""Single steps of builds of one language model and the limit's loop, in a random order: what decoding reaches of it.

    python -m benchmarks.llm_turns build/llm/llama-1b other/llama-1b --format int4-g32 --seconds 20

Folders are those of ``benchmarks.llm``, with ``model.FORMAT.tw``; one is enough. Where the memory's speed changes from
moment to moment, a step can only be compared with the readings of the limit, and the steps of other builds, right
beside it. The first build is what the others are compared with.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .cpu_worker import bind_to_processors
from .limits import Loop, loops, target_of
from .llm_systems import Decoder, open_decoder
from .llm_units import CONTENDERS, MODELS, PROMPT, ROOM, Dimensions, tokens


@dataclass
class Build:
    """A loaded build and the seconds of its steps."""

    name: str
    decoder: Decoder
    times: list[float] = field(default_factory=list)

    def step(self, text: Sequence[int], sequences: int, at: int) -> None:
        """Time a token of each sequence."""
        start = time.perf_counter()
        self.decoder.append([text[at : at + 1]] * sequences, at)
        self.times.append(time.perf_counter() - start)


def take_turns(
    builds: Sequence[Build], limit: Loop, threads: int, text: Sequence[int], sequences: int, seconds: float
) -> list[float]:
    """Steps of every build and a reading of the limit per round; the readings, in bytes per second."""
    shuffle = random.Random(7).shuffle
    rates: list[float] = []
    deadline = time.perf_counter() + seconds
    while not rates or time.perf_counter() < deadline:
        order: list[Build | None] = [*builds, None]
        shuffle(order)
        at = PROMPT + len(rates) % ROOM
        for build in order:
            if build is None:
                rates.append(limit.rate(threads))
            else:
                build.step(text, sequences, at)
    return rates


def report(builds: Sequence[Build], rates: Sequence[float], sequences: int) -> str:
    """A line per build."""
    lines = [f"limit: {statistics.median(rates) / 1e9:.1f} GB/s ({min(rates) / 1e9:.1f}..{max(rates) / 1e9:.1f})"]
    for build in builds:
        facts = build.decoder.facts()
        read = [
            facts["weight_bytes"] + facts["cache_bytes"] * sequences * (PROMPT + turn % ROOM + 1)
            for turn in range(len(rates))
        ]
        shares = [count / spent / rate for count, spent, rate in zip(read, build.times, rates, strict=True)]
        ratios = [mine / first for mine, first in zip(build.times, builds[0].times, strict=True)]
        error = statistics.pstdev(ratios) / len(ratios) ** 0.5
        lines.append(
            f"{build.name}: {1e3 * statistics.median(build.times):.2f} ms, {statistics.median(shares):.1%} of the "
            f"limit beside it, {statistics.median(ratios):.3f} (+- {error:.3f}) times the first build's step"
        )
    return "\n".join(lines)


def open_build(folder: str, format: str, dimensions: Dimensions, threads: int, sequences: int) -> Build:
    """Load a build, with the prompt in all its sequences."""
    decoder = open_decoder(CONTENDERS[f"tilewright/{format}"], dimensions, Path(folder), threads, sequences)
    decoder.append([tokens(dimensions, PROMPT).tolist()], 0)
    decoder.rewind(sequences, PROMPT)
    return Build(folder, decoder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="of builds of the same model")
    parser.add_argument("--model", choices=MODELS, default="llama-1b")
    parser.add_argument("--format", default="int4-g32", help="of the weights, as Tilewright calls it")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    bind_to_processors(given.threads)
    dimensions = MODELS[given.model]
    text = tokens(dimensions, PROMPT + ROOM).tolist()
    builds = [open_build(folder, given.format, dimensions, given.threads, given.sequences) for folder in given.folders]
    with tempfile.TemporaryDirectory() as folder:
        limit = loops(target_of(), Path(folder))["read"]
        rates = take_turns(builds, limit, given.threads, text, given.sequences, given.seconds)
    print(report(builds, rates, given.sequences))


if __name__ == "__main__":
    main()

"""The goals of the benchmark of language models: what was measured beside what it has to reach, line by line."""

from __future__ import annotations

from collections.abc import Iterator

from .cpu_goals import Goal
from .llm_ratios import Results, fastest, ratio, speed
from .llm_units import PROMPT

INT4, INT8 = "tilewright/int4-g32", "tilewright/int8"
QUANTIZED = (INT4, INT8)

LEAST_BANDWIDTH = 0.92
LEAST_DECODE = ((INT4, "llama.cpp/Q4_K_M", 1.5), (INT4, "llama.cpp/Q4_0", 0.97), (INT8, "llama.cpp/Q8_0", 1.1))
LEAST_PROMPT_SAME, LEAST_PROMPT_BEST = 2.0, 1.4
LEAST_BATCHED = {INT8: 6.0, INT4: 4.0}
MOST_START, MOST_MEMORY_MB = 0.5, 100.0


def goals(results: Results, model: str) -> list[Goal]:
    """All goals whose numbers can be had."""
    return [*_decoding(results, model), *_prompts(results, model), *_starting(results, model)]


def _decoding(results: Results, model: str) -> Iterator[Goal]:
    for name in QUANTIZED:
        if one := speed(results, model, name, "decode-1"):
            yield Goal(f"decoding, {name}: share of the read bandwidth", one.read_share, LEAST_BANDWIDTH)
    for ours, theirs, least in LEAST_DECODE:
        value = ratio(results, model, "decode-1", ours, theirs)
        if value is not None:
            yield Goal(f"decoding, {ours} to {theirs}{_bound(results, model, ours, value, least)}", value, least)
    for name, least in LEAST_BATCHED.items():
        one, many = (speed(results, model, name, f"decode-{batch}") for batch in (1, 16))
        if one and many:
            yield Goal(f"decoding, {name}: batch 16 to batch 1", many.rate / one.rate, least)


def _bound(results: Results, model: str, ours: str, value: float, least: float) -> str:
    """What a ratio would be if ours read as fast as the processor does, where that is less than the goal."""
    one = speed(results, model, ours, "decode-1")
    most = value / min(1.0, one.read_share) if one else least
    return "" if value >= least or most >= least else f" (at the read limit it would be {most:.2f})"


def _prompts(results: Results, model: str) -> Iterator[Goal]:
    workload = f"prompt-{PROMPT}"
    best = fastest(results, model, workload, "llama.cpp")
    for name in QUANTIZED:
        for theirs, least in (("llama.cpp/Q4_K_M", LEAST_PROMPT_SAME), (best, LEAST_PROMPT_BEST)):
            value = ratio(results, model, workload, name, theirs) if theirs else None
            if value is not None:
                text = f"prompt of {PROMPT}, {name} to {theirs}" + ("" if theirs != best else ", its best format")
                yield Goal(text, value, least)


def _starting(results: Results, model: str) -> Iterator[Goal]:
    started = results.get(f"start/{model}", {"systems": {}})["systems"].get(INT4, {"error": ""})
    if "error" in started:
        return
    yield Goal(f"{INT4}: seconds from a new process to the first token", started["seconds"], MOST_START, at_most=True)
    built = results[f"build/{model}/{INT4}"]
    beside = (started["peak_bytes"] - built["bytes"] - started["cache_total"]) / 1e6
    yield Goal(f"{INT4}: MB of memory beside artifact and cache", beside, MOST_MEMORY_MB, at_most=True)

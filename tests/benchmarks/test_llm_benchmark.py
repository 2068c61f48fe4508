"""The benchmark of language models without timing: its arithmetic, how it goes on, its files, tables and goals."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "Zen 4", "threads": 2}
INT4, INT8 = "tilewright/int4-g32", "tilewright/int8"
Q4_0, Q4_K_M, Q8_0 = "llama.cpp/Q4_0", "llama.cpp/Q4_K_M", "llama.cpp/Q8_0"


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("llm_units")``: a module of the folder, which is no package of ours; run from the repository."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    return lambda name: import_module(f"benchmarks.{name}")


def timed(ms: float, positions: float) -> dict:
    return {"ms": ms, "low": ms, "high": ms, "steps": 9, "positions": positions, "turns": [ms] * 3}


def system(weights: float, **workloads: dict) -> dict:
    named = {name.replace("_", "-"): item for name, item in workloads.items()}
    return {"deviation": 0.01, "weight_bytes": weights, "cache_bytes": 1e4, "workloads": named}


KERNEL = {
    "kernel": "head",
    "family": "quantized",
    "calls": 1,
    "seconds": 0.015,
    "flops": 0,
    "bytes": 600e6,
    "modules": [],
}
LIMITS = {"float32": 200e9, "int8": 800e9, "read": 40e9}
DECODE = {
    INT4: system(600e6, decode_1=timed(16.0, 200) | {"kernels": [KERNEL]}, decode_16=timed(64.0, 3200)),
    INT8: system(1e9, decode_1=timed(25.0, 200)),
    Q4_0: system(600e6, decode_1=timed(20.0, 200)),
    Q4_K_M: system(640e6, decode_1=timed(20.0, 200)),
    Q8_0: {"error": "its outputs differ"},
}
PROMPTS = {
    INT4: system(600e6, prompt_128=timed(500.0, 128)),
    Q4_0: system(600e6, prompt_128=timed(600.0, 128)),
    Q4_K_M: system(640e6, prompt_128=timed(1000.0, 128)),
}
START = {"seconds": 0.4, "low": 0.3, "high": 0.5, "peak_bytes": 800e6, "cache_total": 50e6}
RESULTS = {
    f"build/llama-1b/{INT4}": {"seconds": 60.0, "bytes": 640e6},
    f"build/llama-1b/{Q4_0}": {"error": "no memory"},
    "time/llama-1b/decode": {
        "systems": DECODE,
        "limits": {"decode-1": LIMITS, "decode-16": LIMITS},
        "limit_turns": {"decode-1": [LIMITS] * 3, "decode-16": [LIMITS] * 3},
    },
    "time/llama-1b/prompt": {
        "systems": PROMPTS,
        "limits": {"prompt-128": LIMITS},
        "limit_turns": {"prompt-128": [LIMITS] * 3},
    },
    "start/llama-1b": {"systems": {INT4: START}},
}


def test_arithmetic_and_bytes(benchmark):
    units, ratios = benchmark("llm_units"), benchmark("llm_ratios")
    large = units.MODELS["llama-1b"]
    assert large.layer_weights + 2 * large.head_weights == pytest.approx(1.104e9, rel=1e-3)
    shapes = dict(benchmark("llm_checkpoint").shapes(large))
    products = [np.prod(shape) for name, shape in shapes.items() if "layers" in name and len(shape) == 2]
    assert sum(products) == large.layer_weights
    assert large.operations(1, 1, 0) == 2 * (large.layer_weights + large.head_weights)
    assert large.cache_values(1) == 16 * 2 * 8 * 64
    one = ratios.speed(RESULTS, "llama-1b", INT4, "decode-1")
    assert one.rate == 62.5 and one.bytes == 602e6
    assert one.read_share == pytest.approx(602e6 / 16e-3 / 40e9)
    prompt = ratios.speed(RESULTS, "llama-1b", INT4, "prompt-128")
    assert prompt.rate == 256 and prompt.arithmetic_share == pytest.approx(prompt.operations / 0.5 / 800e9)
    seen = 2 * 2 * 16 * 32 * 64 * 128 * 129 / 2  # every token sees itself and those before
    assert prompt.operations == 2 * (128 * large.layer_weights + large.head_weights) + seen
    assert ratios.speed(RESULTS, "llama-1b", Q8_0, "decode-1") is None
    assert ratios.ratio(RESULTS, "llama-1b", "decode-1", INT4, Q8_0) is None
    assert ratios.fastest(RESULTS, "llama-1b", "prompt-128", "llama.cpp") == Q4_0


def test_shares_are_of_the_limit_of_the_same_round(benchmark):
    """A machine that becomes half as fast and then twice as fast does not change them."""
    stage = RESULTS["time/llama-1b/decode"]
    slower = {"turns": [16.0, 32.0, 8.0, 8.0], "ms": 12.0}
    decode = {INT4: system(600e6, decode_1=timed(16.0, 200) | slower)}
    limits = {"decode-1": [{"read": rate} for rate in (40e9, 20e9, 80e9, 80e9)]}
    drifting = {"time/llama-1b/decode": {**stage, "systems": decode, "limit_turns": limits}}
    before, after = (
        benchmark("llm_ratios").speed(results, "llama-1b", INT4, "decode-1") for results in (RESULTS, drifting)
    )
    assert after.read_share == pytest.approx(before.read_share) and after.rate > before.rate


def test_goals(benchmark):
    found = {
        goal.text: (round(goal.value, 3), goal.limit, goal.reached)
        for goal in benchmark("llm_goals").goals(RESULTS, "llama-1b")
    }
    assert found == {
        f"decoding, {INT4}: share of the read bandwidth": (0.941, 0.92, True),
        f"decoding, {INT8}: share of the read bandwidth": (1.002, 0.92, True),
        f"decoding, {INT4} to {Q4_K_M} (at the read limit it would be 1.33)": (1.25, 1.5, False),
        f"decoding, {INT4} to {Q4_0}": (1.25, 0.97, True),
        f"decoding, {INT4}: batch 16 to batch 1": (4.0, 4.0, True),
        f"prompt of 128, {INT4} to {Q4_K_M}": (2.0, 2.0, True),
        f"prompt of 128, {INT4} to {Q4_0}, its best format": (1.2, 1.4, False),
        f"{INT4}: seconds from a new process to the first token": (0.4, 0.5, True),
        f"{INT4}: MB of memory beside artifact and cache": (110.0, 100.0, False),
    }


def test_report(benchmark):
    names = [INT4, INT8, Q4_0, Q4_K_M, Q8_0]
    text = benchmark("llm_report").report(MACHINE, RESULTS, "llama-1b", names, {"llama.cpp": "not installed"})
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("tile", "llama.cpp/"))}
    assert "limits: read 40.0 GB/s, float32 200 Gop/s, int8 800 Gop/s" in text
    assert f"{INT4:22}{62.5:>9.1f}{16:>11.2f}" in text
    assert rows[INT4] == [INT4, "610", "4.64", "60.0", "0.40", "0.30..0.50", "763", "110"]
    assert f"{INT4}, decode-1: where 16.00 ms go" in text and "100% of the limit" in text
    assert f"{Q8_0}: its outputs differ" in text and "not measured: decode-4" in text
    assert "skipped: llama.cpp: not installed" in text and "MISSED    1.25  (at least 1.50)" in text


def bench_of(benchmark, tmp_path, monkeypatch, seconds=1e6):
    """A benchmark whose processes are replaced, and what it ran."""
    measuring, ran = benchmark("llm_measure"), []

    class Builder:
        ended = False

        def __init__(self, module, environment):
            assert module == "benchmarks.llm_build"

        def ask(self, request, limit):
            ran.append(request["what"])
            return {"failed": "no memory"} if request["what"] == INT8 else {"seconds": 1.0, "bytes": 10}

        def close(self):
            ran.append("closed")

    def time(self, names, built, workloads):
        ran.append([*built, *(workload.name for workload in workloads)])
        return {"systems": dict.fromkeys(names, {}), "limits": {workload.name: {} for workload in workloads}}

    def start(self, names, built):
        ran.append(["start", *built])
        return {"systems": dict.fromkeys(names, {})}

    monkeypatch.setattr(measuring, "Process", Builder)
    monkeypatch.setattr(measuring.Bench, "time", time)
    monkeypatch.setattr(measuring.Bench, "start", start)
    state = benchmark("state").State.open(tmp_path / "state.json", MACHINE)
    deadline = measuring.time.monotonic() + seconds
    return measuring.Bench(state, "tiny", tmp_path / "work", 2, 0.1, 3, 1, deadline), ran


def test_goes_on_where_it_ended(benchmark, tmp_path, monkeypatch):
    workloads = benchmark("llm_units").WORKLOADS
    bench, ran = bench_of(benchmark, tmp_path, monkeypatch)
    bench.run([INT4, INT8], [workloads["decode-1"]])
    assert ran == ["checkpoint", "reference", INT4, INT8, "closed", [INT4, "decode-1"], ["start", INT4]]
    assert bench.not_built(INT8) == {"error": "not built: no memory"}
    again, ran = bench_of(benchmark, tmp_path, monkeypatch)
    again.run([INT4], [workloads["decode-1"]])
    assert ran == []
    again.run([INT4], [workloads["decode-1"], workloads["decode-4"], workloads["prompt-128"]])
    assert ran == [[INT4, "decode-1", "decode-4"], [INT4, "prompt-128"]]  # decoding is of one run
    benchmark("llm").forget(again.state, "tiny")
    assert all(name.startswith("build/") for name in again.state.results)
    late, ran = bench_of(benchmark, tmp_path, monkeypatch, seconds=1.0)
    late.state = again.state
    with pytest.raises(benchmark("cpu_measure").OutOfTime):
        late.run([INT4], [workloads["decode-1"]])
    assert ran == []


def test_statistics(benchmark):
    measuring = benchmark("llm_measure")
    answers = [{"times": [0.001, 0.003], "positions": [1, 2]}, {"times": [0.002], "positions": [3]}]
    found = measuring.statistics_of(answers)
    assert found == {"ms": 2.0, "low": 1.0, "high": 3.0, "steps": 3, "positions": 2, "turns": [2.0, 2.0]}
    assert measuring.median_of([{"read": 1.0}, {"read": 5.0}, {"read": 2.0}]) == {"read": 2.0}


class Counting:
    """A decoder that notes what it is asked."""

    def __init__(self):
        self.calls = []

    def append(self, new, at):
        self.calls.append((len(new), len(new[0]), at))

    def rewind(self, sequences, positions):
        self.calls.append(("rewind", sequences, positions))


def test_turns(benchmark):
    working, units = benchmark("llm_worker"), benchmark("llm_units")
    runner = object.__new__(working.Runner)
    runner.decoder, runner.text, runner.prompted = Counting(), list(range(units.PROMPT + units.ROOM)), False
    found = runner.turn("decode-4", 0.0)
    assert found["positions"] == [4 * (units.PROMPT + 2)] and len(found["times"]) == 1
    prompt = [("rewind", 1, 0), (1, 128, 0)]
    assert runner.decoder.calls == [
        *prompt,
        ("rewind", 4, 128),
        (4, 1, 128),
        (4, 1, 129),
    ]  # the first step is not counted
    runner.decoder = Counting()
    assert runner.turn("prompt-128", 0.0)["positions"] == [128]
    assert runner.decoder.calls == [("rewind", 1, 0), (1, 128, 0)]
    steps, runner.decoder = runner.decoding(1), Counting()
    positions = [next(steps)[1] for _ in range(units.ROOM)]
    assert positions[-2:] == [units.PROMPT + units.ROOM, units.PROMPT + 1]  # begins again where the room ends


def test_single_steps_beside_the_limit(benchmark):
    turns, units = benchmark("llm_turns"), benchmark("llm_units")
    calls = []

    class Fake:
        def append(self, new, at):
            calls.append((new, at))

        def facts(self):
            return {"weight_bytes": 1000 - 2 * (units.PROMPT + 1), "cache_bytes": 1}

        def rate(self, threads):
            calls.append(threads)
            return 1e9

    builds = [turns.Build(name, Fake()) for name in ("old", "new")]
    text = list(range(units.PROMPT + units.ROOM))
    assert turns.take_turns(builds, Fake(), 3, text, 2, 0.0) == [1e9]
    assert sorted(map(str, calls)) == sorted(["3", *[str(([[units.PROMPT]] * 2, units.PROMPT))] * 2])
    builds[0].times, builds[1].times = [2e-6], [1.25e-6]
    first, old, new = turns.report(builds, [1e9], 2).splitlines()
    assert first == "limit: 1.0 GB/s (1.0..1.0)"
    assert old.startswith("old: 0.00 ms, 50.0% of the limit beside it, 1.000 ")
    assert new.startswith("new: 0.00 ms, 80.0% of the limit beside it, 0.625 ")


def test_checkpoint_and_gguf_hold_the_same_weights(benchmark, tmp_path):
    gguf = pytest.importorskip("gguf")
    units, checkpoints, writing = benchmark("llm_units"), benchmark("llm_checkpoint"), benchmark("llm_gguf")
    small = units.Dimensions(vocabulary=40, width=32, layers=2, heads=4, kv_heads=2, hidden=48, context=64)
    checkpoints.write_checkpoint(small, tmp_path)
    writing.write_float16(small, tmp_path)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / checkpoints.WEIGHTS)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(writing.path_of(tmp_path, "F16")).tensors}
    assert len(read) == len(weights) == len(list(checkpoints.shapes(small)))
    for name, weight in weights.items():
        want, got = weight.float().numpy(), np.array(read[writing.name_of(name)].data, np.float32)
        if "q_proj" in name or "k_proj" in name:  # halves of a head become pairs
            heads = small.heads if "q_proj" in name else small.kv_heads
            want = want.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(want.shape)
        np.testing.assert_allclose(got, want, atol=1e-6)
    tables = weights["model.embed_tokens.weight"].numel() * 2
    assert writing.weight_bytes(writing.path_of(tmp_path, "F16")) == sum(int(t.n_bytes) for t in read.values()) - tables


def test_pairs_of_a_head_become_neighbours(benchmark):
    pytest.importorskip("gguf")
    weight = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    assert benchmark("llm_gguf").interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_reports_a_state_file_and_skips_what_is_missing(benchmark, tmp_path, monkeypatch, capsys):
    main, state = benchmark("llm"), tmp_path / "state.json"
    state.write_text(json.dumps({"format": 1, "machine": MACHINE, "results": RESULTS}))
    arguments = ["llm", "--report", "--state", str(state), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(benchmark("llm_units"), "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", arguments)
    assert main.main() == 0
    assert "skipped: llama.cpp: llama_cpp and gguf not installed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert main.main() == 0
    record = json.loads(capsys.readouterr().out)
    (written,) = (tmp_path / "out").glob("*-llm.json")
    assert json.loads(written.read_text()) == record and record["model"]["layers"] == 16
    monkeypatch.setattr(sys, "argv", ["llm", "--report", "--state", str(tmp_path / "none.json")])
    assert main.main() == 2 and "nothing was measured" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["llm", "--contenders", "llama.cpp/Q9"])
    with pytest.raises(SystemExit, match="2"):
        main.main()

"""Speed of matrix, quantized, convolution and attention kernels, beside PyTorch, BLAS and the multiply-add limit.

    python -m benchmarks.kernels [--target cpu:x86-64-v3] [--only resnet] [--threads 1,2] [--seconds 0.5]
    python -m benchmarks.kernels --json build/kernels.json    # for benchmarks.cpu --report --kernels build/kernels.json

Every row is measured in turns with PyTorch, and products of float32 with numpy's BLAS, which is OpenBLAS in the wheels
that numpy publishes: best of many. The limit is measured again beside every row, with as many threads. Weights stay in
cache where they fit. Attention of one row counts bytes of keys and values, in GB/s beside the limit of reading memory,
and so do decoding over a paged cache and one row times a quantized weight. Two threads each run half of the work units,
without waiting in between.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from tilewright.codegen.c import packing
from tilewright.codegen.c.blocking import Problem, choose
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.codegen.storage import to_numpy
from tilewright.codegen.targets import parse
from tilewright.codegen.templating import Hole, render
from tilewright.runtime.cpu import features

from .kernels_attention import Attention, decoding, prompts
from .kernels_case import POINTERS, Case, random
from .kernels_convolution import convolutions
from .kernels_paged import Paged, paged
from .kernels_quantized import Quantized, quantized
from .kernels_winograd import winograd_layers
from .limits import build, loops, timed

SPINNING = 0.01
"""Seconds after which PyTorch's threads have stopped waiting in a loop, on a processor that others need."""
BLAS_SPINNING = 0.1
"""The same of OpenBLAS."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", help="target to compile for (default: this machine)")
    parser.add_argument("--only", default="", help="regular expression on the names of layers")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, separated by commas")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each layer and number of threads")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON, which benchmarks.cpu takes as --kernels")
    options = parser.parse_args()
    target, compiler = parse(options.target, features()), find_compiler()
    blas = blas_name()
    print(f"{target.name}, {compiler.version}, torch {torch.__version__}, numpy with {blas}", file=sys.stderr)
    counts = [int(count) for count in options.threads.split(",")]
    print(
        f"{'GFLOP/s (share of limit)':34}"
        + "".join(f"{f'{n} thread(s)':>16}{'torch':>8}{'BLAS':>8}{'limit':>7}" for n in counts)
    )
    rows: list[dict[str, str | int | float]] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = re.compile(options.only).search
        cases = [case for case in every_case(packing.panel_of(target.vector_bits), wanted) if wanted(case.name)]
        limits = loops(target, Path(folder), reading=any(is_read(case) for case in cases))
        for case in cases:
            limit = limits["read"] if is_read(case) else limits.get(case.dtype, limits["float32"])
            amount = case.flops if isinstance(case, Case) or not case.reads else case.bytes
            if isinstance(case, Quantized):
                timed(build(case.before.source, target, Path(folder)), case.before.arrays, case.before.units, 1)
            kernel = build(case.source, target, Path(folder))
            line = f"{case.name:34}"
            for count in counts:
                torch.set_num_threads(count)
                ours = theirs = library = top = 0.0
                deadline = time.perf_counter() + options.seconds
                while time.perf_counter() < deadline:
                    ours = max(ours, amount / run(kernel, case, count))
                    theirs = max(theirs, amount / run_torch(case, count))
                    time.sleep(SPINNING)
                    if isinstance(case, Case) and case.blas_call is not None:
                        library = max(library, amount / run_blas(case, case.blas_call, count))
                        time.sleep(BLAS_SPINNING)
                    # Units are shared out between threads, so that the rate of all of them comes out.
                    top = max(top, limit.rate(count))
                row = {"name": case.name, "dtype": case.dtype, "threads": count, "share": ours / top}
                rows.append(row | {"rate": ours, "torch_rate": theirs, "limit": top})
                if library:
                    rows[-1]["blas_rate"] = library
                beside = f"{library / 1e9:8.1f}" if library else f"{'-':>8}"
                line += f"{ours / 1e9:10.1f} ({ours / top:4.0%}){theirs / 1e9:8.1f}{beside}{top / 1e9:7.0f}"
            print(line, flush=True)
    if options.json:
        versions = {"target": target.name, "compiler": compiler.version, "torch": torch.__version__, "blas": blas}
        options.json.write_text(json.dumps(versions | {"rows": rows}, indent=1) + "\n")


def run(kernel: Callable[..., None], case: Case | Attention | Paged | Quantized, threads: int) -> float:
    """Seconds for all units of a case, from the first thread's start to the last one's end."""
    return timed(kernel, case.arrays, case.units, threads, repeats_for(case, threads))


def run_torch(case: Case | Attention | Paged | Quantized, threads: int) -> float:
    """Seconds for PyTorch's operator."""
    repeats = repeats_for(case, threads)
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(repeats):
            case.torch_call()
        return (time.perf_counter() - start) / repeats


def run_blas(case: Case, call: Callable[[], object], threads: int) -> float:
    """Seconds for numpy's product."""
    repeats = repeats_for(case, threads)
    with threadpool_limits(threads, user_api="blas"):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


def blas_name() -> str:
    """The library that numpy multiplies with, and the processors that its kernels are for: ``openblas 0.3.31, Zen``."""
    found = [one for one in threadpool_info() if one["user_api"] == "blas"]
    names = [f"{one['internal_api']} {one['version']}, {one.get('architecture')}" for one in found]
    return "; ".join(names) or "an unknown library"


def repeats_for(case: Case | Attention | Paged | Quantized, threads: int) -> int:
    """Calls in one measurement: long against the clock, short against a busy machine's time slices."""
    return max(1, (20_000_000 if threads == 1 else 200_000_000) // case.flops)


def every_case(panel: int, wanted: Callable[[str], object]) -> Iterator[Case | Attention | Paged | Quantized]:
    """Layers, products of words with panels of so many columns, then quantized ones, then attention in both types.

    What takes long to make is left out where its name is not wanted.
    """
    yield from layers(panel)
    yield from quantized(wanted)
    for bf16 in (False, True):
        yield from prompts(bf16=bf16)
        yield from decoding(bf16=bf16)
        yield from paged(bf16=bf16)


def is_read(case: Case | Attention | Paged | Quantized) -> bool:
    """Whether reading memory limits a case."""
    return isinstance(case, Attention | Paged | Quantized) and case.reads


def layers(panel: int) -> Iterator[Case]:
    """The layers of the models that Tilewright is measured on."""
    for name, m, n, k in (
        ("bert 128 attention output", 128, 768, 768),
        ("bert 128 feed-forward up", 128, 3072, 768),
        ("bert 128 feed-forward down", 128, 768, 3072),
        ("minilm 8x64 q/k/v", 512, 1152, 384),
        ("minilm 8x64 feed-forward up", 512, 1536, 384),
        ("vit 197 q/k/v", 197, 2304, 768),
        ("vit 197 feed-forward up", 197, 3072, 768),
        ("vit 197 feed-forward down", 197, 768, 3072),
        ("square 1024", 1024, 1024, 1024),
        ("llama decode 2048 to 8192", 1, 8192, 2048),
        ("llama decode 8192 to 2048", 1, 2048, 8192),
        ("classifier 2048 to 1000", 1, 1000, 2048),
    ):
        yield linear(name, m, n, k)
        yield linear_bf16(f"bf16 {name}", m, n, k, panel)
        if m > 1:
            yield linear_bf16(f"bf16 of float32 {name}", m, n, k, panel, left="float32")
        yield product_int8(f"int8 {name}", m, n, k, panel)
    yield from convolutions()
    yield from winograd_layers()


def linear(name: str, m: int, n: int, k: int) -> Case:
    x, weight = random(m, k), random(n, k)
    chosen = choose(Problem(1, m, n, k, apart=k))
    source = render(
        "matmul.c.jinja", name="kernel", prelude=POINTERS, BATCH=1, M=m, N=n, K=k,
        a_direct=True, a_base="x", a_stride=k, b_packed=True, b_base="w", **chosen.context,
        epilogue=Hole(f"float *restrict to = y + m * {n};", "to[n] = acc;"),
    )  # fmt: skip
    tensors = torch.from_numpy(x), torch.from_numpy(weight)
    arrays = [x, packing.pack_matmul(weight.T), np.empty((m, n), np.float32)]
    units = packing.matmul_units(1, m, n, chosen.block)
    right = np.ascontiguousarray(weight.T)
    return Case(
        name, 2 * m * n * k, source, arrays, int(units), lambda: torch.nn.functional.linear(*tensors),
        blas_call=lambda: x @ right,
    )  # fmt: skip


def linear_bf16(name: str, m: int, n: int, k: int, panel: int, left: str = "bfloat16") -> Case:
    x, weight = (torch.from_numpy(random(*shape)) for shape in ((m, k), (n, k)))
    narrow, narrow_weight = x.bfloat16(), weight.bfloat16()
    kind = "float" if left == "float32" else "uint16_t"
    handled = "converted" if left == "float32" else "direct"
    chosen = choose(Problem(1, m, n, -(-k // 2), handled, apart=k // 2, panel=panel, kind="bfloat16"))
    source = render(
        "matmul.c.jinja", name="kernel", kind="bfloat16", BATCH=1, M=m, N=n, K=k, panel=panel,
        prelude=f"const {kind} *restrict x = buf[0]; uint16_t *restrict w = buf[1], *restrict y = buf[2];",
        a_direct=True, a_base="x", a_stride=k, a_storage=left, b_packed=True, b_base="w", **chosen.context,
        epilogue=Hole(f"uint16_t *restrict to = y + m * {n};", "to[n] = tw_f32_to_bf16(acc);"),
    )  # fmt: skip
    arrays = [
        to_numpy(x if left == "float32" else narrow),
        packing.pack_words(to_numpy(narrow_weight.T), panel),
        np.empty((m, n), np.uint16),
    ]
    units = packing.matmul_units(1, m, n, chosen.block, panel)
    call = functools.partial(torch.nn.functional.linear, narrow, narrow_weight)
    return Case(name, 2 * m * n * k, source, arrays, int(units), call, "bfloat16")


def product_int8(name: str, m: int, n: int, k: int, panel: int) -> Case:
    generator = np.random.default_rng(0)
    x, weight = (generator.integers(-128, 128, shape, np.int8) for shape in ((m, k), (k, n)))
    chosen = choose(Problem(1, m, n, -(-k // 4), "converted", panel=panel, kind="int8"))
    source = render(
        "matmul.c.jinja", name="kernel", kind="int8", BATCH=1, M=m, N=n, K=k, panel=panel,
        prelude="const int8_t *restrict x = buf[0], *restrict w = buf[1]; int32_t *restrict y = buf[2];",
        a_direct=True, a_base="x", a_stride=k, b_packed=True, b_base="w", **chosen.context,
        epilogue=Hole(f"int32_t *restrict to = y + m * {n};", "to[n] = acc;"),
    )  # fmt: skip
    arrays = [x, packing.pack_bytes(weight, panel), np.empty((m, n), np.int32)]
    units = packing.matmul_units(1, m, n, chosen.block, panel)
    call = functools.partial(torch._int_mm, torch.from_numpy(x), torch.from_numpy(weight))
    return Case(name, 2 * m * n * k, source, arrays, int(units), call, "int8")


if __name__ == "__main__":
    main()

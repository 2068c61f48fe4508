"""Speed of the matrix, convolution and depthwise kernels, beside PyTorch and the processor's multiply-add limit.

    python -m benchmarks.kernels [--target cpu:x86-64-v3] [--only resnet] [--threads 1,2] [--seconds 0.5]

Every row is measured in turns with PyTorch, best of many; the limit is measured again beside every row, with as many
threads. Weights stay in cache where they fit. Two threads each run half of the work units, without waiting in between.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tilewright.codegen.c import packing
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.codegen.storage import to_numpy
from tilewright.codegen.targets import parse
from tilewright.codegen.templating import Hole, render
from tilewright.runtime.cpu import features

from .limits import build, loops, timed

POINTERS = "const float *restrict x = buf[0]; const float *restrict w = buf[1]; float *restrict y = buf[2];"


@dataclass(frozen=True)
class Case:
    """One layer: the kernel's source and arguments, and what PyTorch does for it."""

    name: str
    flops: int
    source: str
    arrays: Sequence[np.ndarray]
    units: int
    torch_call: Callable[[], object]
    dtype: str = "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", help="target to compile for (default: this machine)")
    parser.add_argument("--only", default="", help="regular expression on the names of layers")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, separated by commas")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each layer and number of threads")
    options = parser.parse_args()
    target, compiler = parse(options.target, features()), find_compiler()
    print(f"{target.name}, {compiler.version}, torch {torch.__version__}", file=sys.stderr)
    counts = [int(count) for count in options.threads.split(",")]
    print(
        f"{'GFLOP/s (share of limit)':34}" + "".join(f"{f'{n} thread(s)':>16}{'torch':>8}{'limit':>7}" for n in counts)
    )
    with tempfile.TemporaryDirectory() as folder:
        limits = loops(target, Path(folder), reading=False)
        for case in layers():
            if not re.search(options.only, case.name):
                continue
            limit = limits.get(case.dtype, limits["float32"])
            kernel = build(case.source, target, Path(folder))
            line = f"{case.name:34}"
            for count in counts:
                torch.set_num_threads(count)
                ours = theirs = top = 0.0
                deadline = time.perf_counter() + options.seconds
                while time.perf_counter() < deadline:
                    ours = max(ours, case.flops / run(kernel, case, count))
                    theirs = max(theirs, case.flops / run_torch(case, count))
                    # Units are shared out between threads, so that the rate of all of them comes out.
                    top = max(top, limit.rate(count))
                line += f"{ours / 1e9:10.1f} ({ours / top:4.0%}){theirs / 1e9:8.1f}{top / 1e9:7.0f}"
            print(line, flush=True)


def run(kernel: Callable[..., None], case: Case, threads: int) -> float:
    """Seconds for all units of a case, from the first thread's start to the last one's end."""
    return timed(kernel, case.arrays, case.units, threads, repeats_for(case, threads))


def run_torch(case: Case, threads: int) -> float:
    """Seconds for PyTorch's operator."""
    repeats = repeats_for(case, threads)
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(repeats):
            case.torch_call()
        return (time.perf_counter() - start) / repeats


def repeats_for(case: Case, threads: int) -> int:
    """Calls in one measurement: long against the clock, short against a busy machine's time slices."""
    return max(1, (20_000_000 if threads == 1 else 200_000_000) // case.flops)


def layers() -> Iterator[Case]:
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
        yield linear_bf16(f"bf16 {name}", m, n, k)
        if m > 1:
            yield linear_bf16(f"bf16 of float32 {name}", m, n, k, left="float32")
        yield product_int8(f"int8 {name}", m, n, k)
    for ic, oc, size, kernel, stride in (
        (64, 64, 56, 1, 1), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1), (256, 64, 56, 1, 1), (128, 128, 56, 3, 2),
        (256, 512, 56, 1, 2), (512, 128, 28, 1, 1), (128, 128, 28, 3, 1), (128, 512, 28, 1, 1), (256, 256, 14, 3, 1),
        (1024, 256, 14, 1, 1), (256, 1024, 14, 1, 1), (512, 512, 14, 3, 2), (2048, 512, 7, 1, 1), (512, 512, 7, 3, 1),
        (512, 2048, 7, 1, 1),
    ):  # fmt: skip
        name = f"resnet {ic} to {oc}, {size}x{size}, {kernel}x{kernel}/{stride}"
        yield convolution(name, ic, oc, size, kernel, stride)
    yield gathered("resnet stem 7x7/2", 3, 64, 224, 7, 2, 3)
    yield gathered("mobilenet stem 3x3/2", 3, 16, 224, 3, 2, 1)
    yield gathered("vit patches 16x16/16", 3, 768, 224, 16, 16, 0)
    for channels, size, kernel, stride in (
        (16, 112, 3, 1),
        (64, 112, 3, 2),
        (72, 56, 5, 2),
        (120, 28, 5, 1),
        (480, 14, 3, 1),
        (960, 7, 5, 1),
    ):
        name = f"mobilenet depthwise {channels}, {size}, {kernel}x{kernel}/{stride}"
        yield depthwise(name, channels, size, kernel, stride)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def linear(name: str, m: int, n: int, k: int) -> Case:
    x, weight = random(m, k), random(n, k)
    source = render(
        "matmul.c.jinja", name="kernel", prelude=POINTERS, BATCH=1, M=m, N=n, K=k,
        a_direct=True, a_base="x", a_stride=k, b_packed=True, b_base="w",
        epilogue=Hole(f"float *restrict to = y + m * {n};", "to[n] = acc;"),
    )  # fmt: skip
    tensors = torch.from_numpy(x), torch.from_numpy(weight)
    arrays = [x, packing.pack_matmul(weight.T), np.empty((m, n), np.float32)]
    units = packing.matmul_units(1, m, n)
    return Case(name, 2 * m * n * k, source, arrays, int(units), lambda: torch.nn.functional.linear(*tensors))


def linear_bf16(name: str, m: int, n: int, k: int, left: str = "bfloat16") -> Case:
    x, weight = (torch.from_numpy(random(*shape)) for shape in ((m, k), (n, k)))
    narrow, narrow_weight = x.bfloat16(), weight.bfloat16()
    kind = "float" if left == "float32" else "uint16_t"
    source = render(
        "matmul.c.jinja", name="kernel", kind="bfloat16", BATCH=1, M=m, N=n, K=k,
        prelude=f"const {kind} *restrict x = buf[0]; uint16_t *restrict w = buf[1], *restrict y = buf[2];",
        a_direct=True, a_base="x", a_stride=k, a_storage=left, b_packed=True, b_base="w",
        epilogue=Hole(f"uint16_t *restrict to = y + m * {n};", "to[n] = tw_f32_to_bf16(acc);"),
    )  # fmt: skip
    arrays = [
        to_numpy(x if left == "float32" else narrow),
        packing.pack_words(to_numpy(narrow_weight.T)),
        np.empty((m, n), np.uint16),
    ]
    units = packing.matmul_units(1, m, n)
    call = functools.partial(torch.nn.functional.linear, narrow, narrow_weight)
    return Case(name, 2 * m * n * k, source, arrays, int(units), call, "bfloat16")


def product_int8(name: str, m: int, n: int, k: int) -> Case:
    generator = np.random.default_rng(0)
    x, weight = (generator.integers(-128, 128, shape, np.int8) for shape in ((m, k), (k, n)))
    source = render(
        "matmul.c.jinja", name="kernel", kind="int8", BATCH=1, M=m, N=n, K=k,
        prelude="const int8_t *restrict x = buf[0], *restrict w = buf[1]; int32_t *restrict y = buf[2];",
        a_direct=True, a_base="x", a_stride=k, b_packed=True, b_base="w",
        epilogue=Hole(f"int32_t *restrict to = y + m * {n};", "to[n] = acc;"),
    )  # fmt: skip
    arrays = [x, packing.pack_bytes(weight), np.empty((m, n), np.int32)]
    units = packing.matmul_units(1, m, n)
    call = functools.partial(torch._int_mm, torch.from_numpy(x), torch.from_numpy(weight))
    return Case(name, 2 * m * n * k, source, arrays, int(units), call, "int8")


def image_context(oc: int, size: int, kernel: int, stride: int, padding: int) -> tuple[int, dict[str, object]]:
    out = (size + 2 * padding - kernel) // stride + 1
    blocks = -(-oc // 16)
    return out, {
        "name": "kernel", "prelude": POINTERS, "H": size, "W": size, "OH": out, "OW": out, "KH": kernel, "KW": kernel,
        "stride": (stride, stride), "padding": (padding, padding), "dilation": (1, 1), "w_base": "w",
        "epilogue": Hole(
            f"float *restrict to = y + ((n * {blocks} + cb) * {out * out} + p) * 16;", "to[lane] = acc > 0 ? acc : 0;"
        ),
    }  # fmt: skip


def convolution(name: str, ic: int, oc: int, size: int, kernel: int, stride: int) -> Case:
    out, context = image_context(oc, size, kernel, stride, kernel // 2)
    source = render("convolution.c.jinja", IC=ic, OC=oc, groups=1, x_base="x", **context)
    x, weight = random(1, ic, size, size), random(oc, ic, kernel, kernel)
    arrays = [
        packing.block_channels(x),
        packing.pack_convolution(weight),
        np.empty(-(-oc // 16) * out * out * 16, np.float32),
    ]
    tensors, flops = (torch.from_numpy(x), torch.from_numpy(weight)), 2 * out * out * oc * ic * kernel * kernel
    units = int(packing.convolution_units(1, out, out, oc))
    return Case(name, flops, source, arrays, units, lambda: torch.conv2d(*tensors, stride=stride, padding=kernel // 2))


def gathered(name: str, ic: int, oc: int, size: int, kernel: int, stride: int, padding: int) -> Case:
    out, context = image_context(oc, size, kernel, stride, padding)
    load = Hole(
        f"const float *restrict from = x + ((n * {ic} + ic) * {size} + ih) * {size};", "const float x_value = from[iw];"
    )
    source = render("convolution_gathered.c.jinja", IC=ic, OC=oc, groups=1, load_x=load, **context)
    x, weight = random(1, ic, size, size), random(oc, ic, kernel, kernel)
    arrays = [x, packing.pack_convolution_gathered(weight), np.empty(-(-oc // 16) * out * out * 16, np.float32)]
    tensors, flops = (torch.from_numpy(x), torch.from_numpy(weight)), 2 * out * out * oc * ic * kernel * kernel
    units = int(packing.convolution_gathered_units(1, out, out, oc, 1, (kernel, kernel), (stride, stride), (1, 1)))
    return Case(name, flops, source, arrays, units, lambda: torch.conv2d(*tensors, stride=stride, padding=padding))


def depthwise(name: str, channels: int, size: int, kernel: int, stride: int) -> Case:
    out, context = image_context(channels, size, kernel, stride, kernel // 2)
    source = render("depthwise.c.jinja", C=channels, x_base="x", **context)
    x, weight = random(1, channels, size, size), random(channels, 1, kernel, kernel)
    arrays = [
        packing.block_channels(x),
        packing.pack_depthwise(weight),
        np.empty(-(-channels // 16) * out * out * 16, np.float32),
    ]
    tensors, flops = (torch.from_numpy(x), torch.from_numpy(weight)), 2 * out * out * channels * kernel * kernel
    units = int(packing.depthwise_units(1, channels, out, out, (kernel, kernel), (stride, stride), (1, 1)))
    return Case(
        name, flops, source, arrays, units,
        lambda: torch.conv2d(*tensors, stride=stride, padding=kernel // 2, groups=channels),
    )  # fmt: skip


if __name__ == "__main__":
    main()

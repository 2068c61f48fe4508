"""The measurements of the GPU benchmark, on the GPU at hand; each function is one kind of unit.

Times are of device events around calls that fill some tens of milliseconds, medians of several such runs. Single
kernels are measured in programs that do them many times on different data, more than the second-level cache holds;
both sides replay such a program as one CUDA graph.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import tilewright
from tilewright import models
from tilewright.passes.verify import TOLERANCES, error_of

from .gpu_templates import case

REPEATS = 7
RUN_SECONDS = 0.04
CACHE_BYTES = 400 << 20  # several times the second-level cache


@cache
def target() -> str:
    """The target of the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:sm_{major}{minor}"


@cache
def work_stream() -> torch.cuda.Stream:
    """The stream that all measurements run in."""
    return torch.cuda.Stream()


def compiled(module: nn.Module, args: tuple[Any, ...], folder: str, **options: Any) -> Callable[..., Any]:
    """Our artifact of a module, loaded on the GPU."""
    path = Path(folder) / "model.tw"
    tilewright.compile(module, args, output=path, target=target(), verify="off", **options)
    return tilewright.load(path, device="cuda:0", stream=work_stream())


def microseconds(call: Callable[[], Any]) -> float:
    """Time of a call, once calls follow each other."""
    stream = work_stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(5):  # compiles, fills caches and records graphs
            call()
        stream.synchronize()
        start = time.perf_counter()
        call()
        stream.synchronize()
        count = max(1, int(RUN_SECONDS / max(time.perf_counter() - start, 1e-6)))
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            for _ in range(count):
                call()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """A call as a CUDA graph."""
    stream = work_stream()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph.replay


def copy() -> dict[str, float]:
    """Bandwidth of a copy on the device: bytes read and written per second."""
    source = torch.randn(1 << 30, device="cuda")
    to = torch.empty_like(source)
    return {"rate": 2 * source.nbytes / microseconds(lambda: to.copy_(source)) * 1e6}


def matmul_rate() -> dict[str, float]:
    """Operations per second of a large product of random bfloat16 numbers."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"rate": 2 * n**3 / microseconds(lambda: a @ b) * 1e6}


def template(name: str, dtype: str) -> dict[str, Any]:
    """A small program through the compiler and the runtime, against PyTorch in float64 on the CPU."""
    kind = getattr(torch, dtype)
    module, given, shapes = case(name)
    module = module.to(kind)
    args = tuple(x.to(kind) if x.is_floating_point() else x for x in given)
    with tempfile.TemporaryDirectory() as folder:
        model = compiled(module, args, folder, dynamic_shapes=shapes)
        got = model(*(x.cuda() for x in args))
        found = torch.from_dlpack(got).cpu().double()
        work_stream().synchronize()
    with torch.inference_mode():
        wide = module.double()(*(x.double() if x.is_floating_point() else x for x in args))
    tolerance = 1e-5 if kind == torch.float32 else TOLERANCES[kind]
    deviation = float(error_of(wide, found))
    return {"good": deviation <= tolerance, "deviation": deviation, "tolerance": tolerance}


class Many(nn.Module):
    """One operator on many sets of operands, given one set after the other; one kernel serves them all."""

    def __init__(self, operands: int, operator: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.operands, self.operator = operands, operator

    def forward(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """The results, one by one."""
        return [self.operator(*given[at : at + self.operands]) for at in range(0, len(given), self.operands)]


def side_by_side(operator: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]], dtype: str) -> dict[str, float]:
    """Microseconds of one application by us and by PyTorch, and the largest deviation between them."""
    kind = getattr(torch, dtype)
    size = sum(torch.Size(shape).numel() for shape in shapes) * kind.itemsize
    count = int(min(16, max(2, CACHE_BYTES // size + 1)))
    operands = tuple(torch.randn(shape, device="cuda", dtype=kind) for _ in range(count) for shape in shapes)
    module = Many(len(shapes), operator).eval()
    with tempfile.TemporaryDirectory() as folder:
        model = compiled(module, tuple(x.cpu() for x in operands), folder)
        ours = microseconds(lambda: model(*operands)) / count
        theirs = microseconds(recorded(lambda: module(*operands))) / count
        with torch.inference_mode():
            pairs = zip(module(*operands), model(*operands), strict=True)
        deviation = max(float(error_of(a.double(), torch.from_dlpack(b).double())) for a, b in pairs)
    if deviation > TOLERANCES[kind]:
        raise ArithmeticError(f"differs from PyTorch by {deviation:.2g}")
    return {"us": ours, "torch_us": theirs, "deviation": deviation}


def matmul(m: int, n: int, k: int, dtype: str) -> dict[str, float]:
    """``x @ w.T``, as a linear layer has it."""
    found = side_by_side(functional.linear, [(m, k), (n, k)], dtype)
    return found | {"flops": 2.0 * m * n * k}


def matvec(m: int, n: int, k: int, dtype: str) -> dict[str, float]:
    """The same for few rows, which is limited by reading the weights."""
    size = getattr(torch, dtype).itemsize
    found = side_by_side(functional.linear, [(m, k), (n, k)], dtype)
    return found | {"bytes": float(size * (n * k + m * k + m * n))}


def attention(b: int, h: int, hk: int, sq: int, sk: int, d: int, causal: bool, dtype: str) -> dict[str, float]:
    """Against the fastest that ``scaled_dot_product_attention`` picks."""

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=h != hk)

    found = side_by_side(operator, [(b, h, sq, d), (b, hk, sk, d), (b, hk, sk, d)], dtype)
    return found | {"flops": 4.0 * b * h * sq * sk * d / (2 if causal else 1)}


class Steps(nn.Module):
    """A chain of operators of which none can be computed in another's kernel."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The last result."""
        for _ in range(self.count):
            x = x.softmax(-1).cumsum(-1)
        return x


def launch() -> dict[str, float]:
    """Microseconds of a call that does almost nothing, and of every further kernel in it."""

    def of(count: int) -> tuple[int, float, float]:
        module, x = Steps(count).eval(), torch.randn(4, 64, device="cuda")
        with tempfile.TemporaryDirectory() as folder:
            model = compiled(module, (x.cpu(),), folder)
            return len(model.profile(x)), microseconds(lambda: model(x)), microseconds(lambda: module(x))

    (few, short, eager_short), (many, long, eager_long) = of(1), of(50)
    return {
        "call_us": short,
        "eager_call_us": eager_short,
        "step_us": (long - short) / (many - few),
        "eager_step_us": (eager_long - eager_short) / (2 * 49),
    }


CHILD = """
import sys, time
start = time.monotonic()
import numpy as np
import tilewright
imported = time.monotonic()
model = tilewright.load(sys.argv[1], device="cuda:0")
loaded = time.monotonic()
inputs = [np.zeros([1 if isinstance(n, str) else n for n in port.shape], port.dtype) for port in model.inputs]
result = model(*inputs)
done = time.monotonic()
assert "torch" not in sys.modules
print(imported - start, loaded - imported, done - loaded)
"""


def startup(model: str) -> dict[str, float]:
    """Seconds of a fresh process to its first output, without PyTorch; medians of several."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tw"
        tilewright.compile(model, output=path, target=target(), verify="off")
        runs = []
        for _ in range(6):
            begin = time.monotonic()
            command = [sys.executable, "-c", CHILD, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append([*map(float, done.stdout.split()), time.monotonic() - begin])
    found = [statistics.median(run[part] for run in runs[1:]) for part in range(4)]
    return dict(zip(("import_s", "load_s", "first_call_s", "process_s"), found, strict=True))


def inputs_of(name: str, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Inputs on the GPU."""
    generator = torch.Generator().manual_seed(0)
    if name == "bert_base":
        ids = torch.randint(1, 30000, (batch, 128), generator=generator)
        return tuple(x.cuda() for x in (ids, torch.ones_like(ids), torch.zeros_like(ids)))
    return (torch.randn(batch, 3, 224, 224, generator=generator).to(dtype).cuda(),)


def model(model: str, dtype: str, batch: int, who: str) -> dict[str, float]:
    """Milliseconds of a call; ours and theirs on the same inputs, which lie on the GPU, like the results."""
    kind = getattr(torch, dtype)
    module = models.get(model).build().to(kind).eval()
    args = inputs_of(model, batch, kind)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        call = PREPARE[who](module, args, folder)
        seconds = time.monotonic() - start
        found = {"ms": microseconds(lambda: call(*args)) / 1e3, "prepared_s": seconds}
        if who == "tilewright":
            with torch.inference_mode():
                want = first(module.cuda()(*args))
                got = torch.from_dlpack(first(call(*args)))
            work_stream().synchronize()
            found["deviation"] = float(error_of(want.double(), got.double()))
            if not found["deviation"] <= 2 * TOLERANCES[kind]:  # both sides round
                raise ArithmeticError(f"differs from eager by {found['deviation']:.2g}")
    return found


def first(value: Any) -> Any:
    """The first tensor of a result."""
    while isinstance(value, tuple | list | dict):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def _ours(module: nn.Module, args: tuple[torch.Tensor, ...], folder: str) -> Callable[..., Any]:
    return compiled(module, tuple(x.cpu() for x in args), folder)


def _eager(module: nn.Module, args: tuple[torch.Tensor, ...], folder: str) -> Callable[..., Any]:
    return module.cuda()


def _max_autotune(module: nn.Module, args: tuple[torch.Tensor, ...], folder: str) -> Callable[..., Any]:
    call = torch.compile(module.cuda(), mode="max-autotune")
    with torch.inference_mode(), torch.cuda.stream(work_stream()):
        call(*args)
    return call


def _aotinductor(module: nn.Module, args: tuple[torch.Tensor, ...], folder: str) -> Callable[..., Any]:
    with torch.inference_mode():
        exported = torch.export.export(module.cuda(), args)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/model.pt2")
    return torch._inductor.aoti_load_package(path)


PREPARE = {"tilewright": _ours, "eager": _eager, "max-autotune": _max_autotune, "aotinductor": _aotinductor}
KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (copy, matmul_rate, template, matmul, matvec, attention, launch, startup, model)
}

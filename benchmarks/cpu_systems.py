"""How each system loads its artifact: ``LOADERS[system](folder, threads, precision)`` gives a call on numpy arrays.

Every call takes the inputs in order and gives the outputs as a flat list of numpy arrays, float32 also where a system
computes in bfloat16. All systems get the same number of threads on the same processors (the process is bound to them
before anything is imported); none binds single threads to one. Each loader imports its own system only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .values import flatten

if TYPE_CHECKING:
    import numpy as np

INPUTS, OUTPUTS = "inputs.npy", "outputs.npy"
"""In a case's folder: what all systems are given, and what eager float32 PyTorch makes of it."""

Call = Callable[[Sequence["np.ndarray"]], list["np.ndarray"]]
Loader = Callable[[Path, int, str], Call]


def tilewright(folder: Path, threads: int, precision: str) -> Call:
    """An artifact directory."""
    model = load_tilewright(folder, threads)
    return lambda arrays: flatten(model(*arrays))


def load_tilewright(folder: Path, threads: int) -> Any:
    """The model itself, which can also be profiled."""
    import tilewright

    return tilewright.load(folder / "model.tw", threads=threads)


def module_of(folder: Path, threads: int, precision: str) -> Any:
    """The PyTorch module as it was saved, in the precision, with flat inputs and outputs in float32 and integers."""
    import torch

    from .torch_module import InPrecision

    torch.set_num_threads(threads)
    module = torch.load(folder / "module.pt", weights_only=False, mmap=True)
    return module if precision == "fp32" else InPrecision(module, torch.bfloat16)


def eager(folder: Path, threads: int, precision: str) -> Call:
    """A saved module."""
    return call_of(module_of(folder, threads, precision))


def inductor(folder: Path, threads: int, precision: str) -> Call:
    """``torch.compile`` with frozen weights; compiles at the first call, from its cache where that is filled."""
    import torch
    import torch._inductor.config as config

    config.freezing = True
    return call_of(torch.compile(module_of(folder, threads, precision), dynamic=False))


def aotinductor(folder: Path, threads: int, precision: str) -> Call:
    """A package of AOTInductor."""
    import torch

    torch.set_num_threads(threads)
    return call_of(torch._inductor.aoti_load_package(str(folder / "model.pt2")))


def call_of(module: Any) -> Call:
    """A PyTorch callable on numpy arrays, without gradients."""
    import torch

    def call(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in flatten(module(*map(torch.from_numpy, arrays)))]

    return call


def onnxruntime(folder: Path, threads: int, precision: str) -> Call:
    """An ONNX file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def openvino(folder: Path, threads: int, precision: str) -> Call:
    """OpenVINO's own files, in one stream."""
    import openvino as ov

    compiled = ov.Core().compile_model(folder / "model.xml", "CPU", openvino_options(threads, precision))
    return lambda arrays: list(compiled(list(arrays)).to_tuple())


def openvino_options(threads: int, precision: str) -> dict[str, Any]:
    """The precision has to be named: OpenVINO takes bfloat16 by itself where the processor has it."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }


LOADERS: dict[str, Loader] = {
    "tilewright": tilewright,
    "eager": eager,
    "inductor": inductor,
    "aotinductor": aotinductor,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}

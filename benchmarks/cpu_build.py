"""The process of the CPU benchmark that builds: the reference of a case, or one system's artifact and its seconds.

A request is ``{"what": "reference" or a system, "model", "batch", "precision", "threads", "folder"}``. Every system
starts from the same saved module with the same fixed shapes. Seconds count from the module in memory to what can be
called, with empty caches; imports do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tilewright import models

from .cpu_systems import call_of, inductor, module_of, onnxruntime, openvino_options
from .models import CASES, image, minilm, tokens
from .process import serve
from .torch_module import Flat

Tensors = tuple[torch.Tensor, ...]


def subject(name: str, batch: int) -> tuple[Flat, Tensors]:
    """A model and its inputs. Models that are not in the table get their registry's example, repeated.

    Raises:
        UnknownModel: there is none of that name.
    """
    if name == "minilm":
        module = minilm()[1]
        for child in module.modules():
            if hasattr(child, "set_attn_implementation"):
                child.set_attn_implementation("sdpa")  # ours is known only to processes that read the checkpoint
        return Flat(module, ("input_ids", "attention_mask", "token_type_ids")), tokens(batch, 64, 30000)
    if name in {case.name for case in CASES}:
        module = models.get(name).build()
        if name == "bert_base":
            return Flat(module, ("input_ids", "attention_mask", "token_type_ids")), tokens(batch, 128, 30000)
        if name == "gpt2":
            return Flat(module), tokens(batch, 128, 50000, masked=False)
        return Flat(module), image(128 if name == "unet" else 224, batch)
    spec = models.get(name)
    args, kwargs = spec.example()
    given = [*args, *kwargs.values()]
    inputs = tuple(torch.cat([tensor] * batch)[:batch].contiguous() for tensor in given)
    return Flat(spec.build(), (*list(spec.shapes)[: len(args)], *kwargs)), inputs


def reference(folder: Path, model: str, batch: int) -> dict[str, Any]:
    """Save the module, its inputs and what eager PyTorch makes of them; count its arithmetic and its weights."""
    module, inputs = subject(model, batch)
    module.eval().requires_grad_(False)
    outputs = call_of(module)([tensor.numpy() for tensor in inputs])
    torch.save(module, folder / "module.pt")
    np.savez(folder / "inputs.npz", *(tensor.numpy() for tensor in inputs))
    np.savez(folder / "outputs.npz", *outputs)
    return {"flops": operations(module, inputs), "weight_bytes": weight_bytes(module)}


def operations(module: nn.Module, inputs: Tensors) -> int:
    """Multiplications and additions of its matrix products and convolutions."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter has no formula for the CPU's fused attention; this backend is made of matrix products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(*inputs)
    return int(counter.get_total_flops())


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that every call reads whole, which tables of embeddings are not."""
    found = {
        parameter.data_ptr(): parameter.nbytes
        for child in module.modules()
        if not isinstance(child, nn.Embedding)
        for parameter in child.parameters(recurse=False)
    }
    return sum(found.values())


def build(what: str, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    """One system's artifact: seconds, and bytes where there is one."""
    module = module_of(folder, threads, "fp32" if what in ("tilewright", "openvino") else precision)
    with np.load(folder / "inputs.npz") as stored:
        inputs = tuple(torch.from_numpy(stored[name]) for name in stored.files)
    return BUILDERS[what](module, inputs, folder, threads, precision)


def timed(work: Callable[[], Any]) -> float:
    """Seconds, without gradients."""
    start = time.perf_counter()
    with torch.no_grad():
        work()
    return time.perf_counter() - start


def build_tilewright(module: nn.Module, inputs: Tensors, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    from tilewright.compiler import driver

    def work() -> None:
        # On CPUs float32 is what "auto" means for a float32 module; other precisions are asked for by name.
        chosen = "auto" if precision == "fp32" else precision
        driver.compile(module, inputs, output=output, precision=chosen, verify="off")

    output = folder / "model.tw"
    return {"seconds": timed(work), "bytes": size_of(output)}


def build_eager(module: nn.Module, inputs: Tensors, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    return {}


def build_inductor(module: nn.Module, inputs: Tensors, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    call = inductor(folder, threads, precision)
    return {"seconds": timed(lambda: call([tensor.numpy() for tensor in inputs]))}


def build_aotinductor(module: nn.Module, inputs: Tensors, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    import torch._inductor

    output = folder / "model.pt2"

    def work() -> None:
        exported = torch.export.export(module, inputs)
        options = {"freezing": True}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(output), inductor_configs=options)

    return {"seconds": timed(work), "bytes": size_of(output)}


def build_onnxruntime(module: nn.Module, inputs: Tensors, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    for package in ("onnxruntime", "onnxscript"):
        import_module(package)  # not counted

    def work() -> None:
        torch.onnx.export(module, inputs, str(folder / "model.onnx"), dynamo=True, verbose=False)
        onnxruntime(folder, threads, precision)

    seconds = timed(work)
    return {"seconds": seconds, "bytes": size_of(folder / "model.onnx") + size_of(folder / "model.onnx.data")}


def build_openvino(module: nn.Module, inputs: Tensors, folder: Path, threads: int, precision: str) -> dict[str, Any]:
    import openvino as ov

    def work() -> None:
        converted = ov.convert_model(module, example_input=inputs)
        for port, tensor in zip(converted.inputs, inputs, strict=True):
            port.get_node().set_partial_shape(ov.PartialShape(list(tensor.shape)))
        converted.validate_nodes_and_infer_types()
        ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)
        ov.Core().compile_model(converted, "CPU", openvino_options(threads, precision))

    return {"seconds": timed(work), "bytes": size_of(folder / "model.xml") + size_of(folder / "model.bin")}


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a directory; none where there is nothing."""
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size if path.exists() else 0


BUILDERS: dict[str, Callable[[nn.Module, Tensors, Path, int, str], dict[str, Any]]] = {
    "tilewright": build_tilewright,
    "eager": build_eager,
    "inductor": build_inductor,
    "aotinductor": build_aotinductor,
    "onnxruntime": build_onnxruntime,
    "openvino": build_openvino,
}


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """One request."""
    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    if request["what"] == "reference":
        return reference(folder, request["model"], request["batch"])
    return build(request["what"], folder, request["threads"], request["precision"])


if __name__ == "__main__":
    serve(handle)

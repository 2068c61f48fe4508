"""The process of the CPU benchmark that builds: the reference of a case, or one system's artifact and its seconds.

A request is ``{"what": "reference" or a system, "model", "batch", "precision", "threads", "folder", "target",
"environment"}``; each is answered by a process of its own, forked where PyTorch is imported. Every system starts from
the same saved module with the same fixed shapes. Seconds count from the module in memory to what can be called, with
empty caches; imports do not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright import models

from .cpu_systems import INPUTS, OUTPUTS, call_of, inductor, module_of, onnxruntime, openvino_options
from .models import CASES, image, minilm, tokens
from .process import forked, serve
from .torch_module import Flat
from .values import load_arrays, save_arrays, save_raw

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
    arrays = [tensor.numpy() for tensor in inputs]
    save_arrays(folder / INPUTS, arrays)
    save_raw(folder, arrays)
    save_arrays(folder / OUTPUTS, outputs)
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


@dataclass(frozen=True)
class Task:
    """What a system builds from, all of it in memory; ``target`` is Tilewright's, empty for this machine's."""

    module: nn.Module
    inputs: Tensors
    folder: Path
    threads: int
    precision: str
    target: str


def build(what: str, folder: Path, threads: int, precision: str, target: str) -> dict[str, Any]:
    """One system's artifact: seconds, and bytes where there is one."""
    module = module_of(folder, threads, "fp32" if what in ("tilewright", "openvino") else precision)
    inputs = tuple(map(torch.from_numpy, load_arrays(folder / INPUTS)))
    return BUILDERS[what](Task(module, inputs, folder, threads, precision, target))


def timed(work: Callable[[], Any]) -> float:
    """Seconds, without gradients."""
    start = time.perf_counter()
    with torch.no_grad():
        work()
    return time.perf_counter() - start


def build_tilewright(task: Task) -> dict[str, Any]:
    from tilewright.compiler import driver

    def work() -> None:
        # On CPUs float32 is what "auto" means for a float32 module; other precisions are asked for by name.
        precision = "auto" if task.precision == "fp32" else task.precision
        target = task.target or "cpu"
        driver.compile(task.module, task.inputs, output=output, target=target, precision=precision, verify="off")

    output = task.folder / "model.tw"
    return {"seconds": timed(work), "bytes": size_of(output)}


def build_inductor(task: Task) -> dict[str, Any]:
    call = inductor(task.folder, task.threads, task.precision)
    return {"seconds": timed(lambda: call([tensor.numpy() for tensor in task.inputs]))}


def build_aotinductor(task: Task) -> dict[str, Any]:
    import torch._inductor

    output = task.folder / "model.pt2"

    def work() -> None:
        exported = torch.export.export(task.module, task.inputs)
        options = {"freezing": True}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(output), inductor_configs=options)

    return {"seconds": timed(work), "bytes": size_of(output)}


def build_onnxruntime(task: Task) -> dict[str, Any]:
    for package in ("onnxruntime", "onnxscript"):
        import_module(package)  # not counted

    def work() -> None:
        torch.onnx.export(task.module, task.inputs, str(task.folder / "model.onnx"), dynamo=True, verbose=False)
        onnxruntime(task.folder, task.threads, task.precision)

    seconds = timed(work)
    return {"seconds": seconds, "bytes": size_of(task.folder / "model.onnx") + size_of(task.folder / "model.onnx.data")}


def build_openvino(task: Task) -> dict[str, Any]:
    import openvino as ov

    def work() -> None:
        converted = ov.convert_model(task.module, example_input=task.inputs)
        for port, tensor in zip(converted.inputs, task.inputs, strict=True):
            port.get_node().set_partial_shape(ov.PartialShape(list(tensor.shape)))
        converted.validate_nodes_and_infer_types()
        ov.save_model(converted, task.folder / "model.xml", compress_to_fp16=False)
        ov.Core().compile_model(converted, "CPU", openvino_options(task.threads, task.precision))

    return {"seconds": timed(work), "bytes": size_of(task.folder / "model.xml") + size_of(task.folder / "model.bin")}


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a directory; none where there is nothing."""
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size if path.exists() else 0


BUILDERS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "tilewright": build_tilewright,
    "inductor": build_inductor,
    "aotinductor": build_aotinductor,
    "onnxruntime": build_onnxruntime,
    "openvino": build_openvino,
}


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """One request, in a process of its own."""
    os.environ.update(request["environment"])
    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    if request["what"] == "reference":
        return reference(folder, request["model"], request["batch"])
    return build(request["what"], folder, request["threads"], request["precision"], request["target"])


if __name__ == "__main__":
    serve(forked(handle))

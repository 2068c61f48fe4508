"""The process of the benchmark of language models that builds: checkpoint, reference, and a contender's artifact.

A request is ``{"what": "checkpoint", "reference" or a contender, "model", "threads", "folder"}``. Each is answered by
a process of its own, forked where PyTorch is imported. Seconds count from the checkpoint's files to the artifact's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from .cpu_build import size_of
from .llm_checkpoint import write_checkpoint, write_reference
from .llm_units import CONTENDERS, MODELS
from .process import forked, serve


def build_llama_cpp(format: str, model: str, folder: Path, threads: int) -> Path:
    """A GGUF file; all others come of the one in float16."""
    from .llm_gguf import F16, path_of, quantize, write_float16

    if not path_of(folder, F16).exists():
        write_float16(MODELS[model], folder)
    if format != F16:
        quantize(folder, format, threads)
    return path_of(folder, format)


def build_tilewright(format: str, model: str, folder: Path, threads: int) -> Path:
    """An artifact for generating text; beside quantized weights the cache is of 16 bits, as llama.cpp's is."""
    from tilewright.compiler import driver
    from tilewright.compiler.options import Task

    plain = format in ("fp32", "bf16")
    task = Task("generate", cache="auto" if plain else "bf16")
    output = folder / f"model.{format}.tw"
    driver.compile(folder, output=output, task=task, verify="off", **{"precision" if plain else "quantize": format})
    return output


BUILDERS = {"tilewright": build_tilewright, "llama.cpp": build_llama_cpp}


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """One request, in a process of its own."""
    what, model, folder, threads = (request[name] for name in ("what", "model", "folder", "threads"))
    torch.set_num_threads(threads)
    start = time.perf_counter()
    if what == "checkpoint":
        write_checkpoint(MODELS[model], Path(folder))
        return {"seconds": time.perf_counter() - start}
    if what == "reference":
        write_reference(MODELS[model], Path(folder))
        return {"seconds": time.perf_counter() - start}
    contender = CONTENDERS[what]
    artifact = BUILDERS[contender.system](contender.format, model, Path(folder), threads)
    return {"seconds": time.perf_counter() - start, "bytes": size_of(artifact)}


if __name__ == "__main__":
    serve(forked(handle))

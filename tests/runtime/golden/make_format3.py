"""How ``format3`` was made; kept to be read. Artifacts of format 3 stay as they are, so this is not run again.

The model and the devices of ``make_format2.py``, with one more entry point: a cache whose size a session chooses, that
is appended to in place, and an input of one size more than another. Binaries of the GPU and the C runtime are left out
likewise.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

import tilewright
from tilewright.codegen import targets
from tilewright.codegen.artifact import TargetBinaries, write_artifact
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.codegen.generate import build_kernels, generate
from tilewright.codegen.roles import fusion_roles
from tilewright.codegen.triton import backend
from tilewright.compiler.driver import reference_of
from tilewright.compiler.options import Entry
from tilewright.compiler.sources import open_source
from tilewright.passes.graph.cache_ops import CACHE_APPEND
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline

HERE = Path(__file__).parent
APPEND = {
    "rows": "tokens:1..16,1,4", "positions": "tokens", "starts": "sequences+1:1..4",
    "table": "sequences,width:1..2", "cache": "blocks:1..1000,1,32,4",
}  # fmt: skip


def append_inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """Two sequences, the first with one token; the cache lacks."""
    starts, table = torch.tensor([0, 1, tokens]).int(), torch.tensor([[2], [0]]).int()
    return torch.randn(tokens, 1, 4), torch.tensor([3, *range(tokens - 1)]).int(), starts, table


def append(rows, positions, starts, table, cache):
    """How much is in each column of the cache, and the cache with more in it."""
    cache = CACHE_APPEND(cache, rows, positions, starts, table, False)
    return cache.sum((0, 1, 2)), cache


def main(output: Path) -> None:
    """Compile for both devices and record what the model gives."""
    spec = importlib.util.spec_from_file_location("make_format1", HERE / "make_format1.py")
    assert spec is not None and spec.loader is not None
    before = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(before)
    torch.manual_seed(0)
    module = before.Golden().eval()
    args = (torch.randn(2, 6), torch.tensor([3, 9]), torch.randn(2, 24))
    more = append_inputs(5)
    cache = torch.zeros(3, 1, 32, 4)
    entries = {
        "main": Entry("forward", args, dynamic_shapes=before.SHAPES),
        "encode": Entry("encode", args[:1], dynamic_shapes={"x": "batch:1..32,6"}),
        "append": Entry(append, (*more, cache), dynamic_shapes=APPEND, states=("cache",)),
    }
    captured = open_source(module, entries=entries)
    programs = {device: [reference_of(program) for program in captured] for device in ("cpu", "cuda")}
    for device, each in programs.items():
        for program in each:
            PassManager(pipeline(fusion_roles(device), device, "auto")).run(program)
    generated = generate(programs)
    (built,) = build_kernels(generated, [targets.parse("cpu:x86-64-v3", ())], find_compiler(), None)
    small = {name: data for name, data in built.files.items() if not name.startswith("tw_")}
    kernels = generated.devices["cuda"].kernels
    (gpu,) = backend.build(kernels, targets.parse_list("cuda:sm_90", ()), None, plans=generated.devices["cuda"].plans)
    files = {name: name.encode() if name.endswith(".cubin") else data for name, data in gpu.files.items()}
    write_artifact(
        output,
        plans={device: code.plans for device, code in generated.devices.items()},
        constants=generated.constants,
        targets=[TargetBinaries(built.name, built.features, small), TargetBinaries(gpu.name, (), files, gpu.library)],
        sources=backend.sources(kernels),
        info={"source": "Golden"},
    )
    arrays = {name: tensor.numpy() for name, tensor in zip(("x", "word", "row"), args, strict=True)}
    arrays |= {name: tensor.numpy() for name, tensor in zip(APPEND, more, strict=False)}
    with torch.no_grad():
        got = module(*args)
        arrays |= {"scores": got["scores"].numpy(), "total": got["total"].numpy(), "encoded": module.encode(args[0])}
        arrays |= {"hidden": got["more"][0].numpy(), "soft": got["more"][1].numpy()}
        arrays |= {"sums": append(*more, cache)[0].numpy()}
    np.savez(HERE / f"{output.name}.npz", **arrays)
    tilewright.load(output, device="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

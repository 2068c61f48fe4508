"""How ``format2`` was made; kept to be read. Artifacts of format 2 stay as they are, so this is not run again.

The model of ``make_format1.py``, for a CPU and a GPU over one set of weights. Binaries of the GPU are replaced by a few
bytes and the C runtime's source is left out, to keep it small: what the format says of them is in the files beside.
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
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline

HERE = Path(__file__).parent


def main(output: Path) -> None:
    """Compile for both devices and record what the model gives."""
    spec = importlib.util.spec_from_file_location("make_format1", HERE / "make_format1.py")
    assert spec is not None and spec.loader is not None
    before = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(before)
    torch.manual_seed(0)
    module = before.Golden().eval()
    args = (torch.randn(2, 6), torch.tensor([3, 9]), torch.randn(2, 24))
    entries = {
        "main": Entry("forward", args, dynamic_shapes=before.SHAPES),
        "encode": Entry("encode", args[:1], dynamic_shapes={"x": "batch:1..32,6"}),
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
    with torch.no_grad():
        got = module(*args)
        arrays |= {"scores": got["scores"].numpy(), "total": got["total"].numpy(), "encoded": module.encode(args[0])}
        arrays |= {"hidden": got["more"][0].numpy(), "soft": got["more"][1].numpy()}
    np.savez(HERE / f"{output.name}.npz", **arrays)
    tilewright.load(output, device="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

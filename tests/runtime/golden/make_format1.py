"""How ``format1`` was made; kept to be read. Artifacts of format 1 stay as they are, so this is not run again.

Headers and the C runtime's source, which an artifact carries for readers only, are left out to keep it small.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tilewright
from tilewright.codegen import targets
from tilewright.codegen.artifact import TargetBinaries, write_artifact
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.codegen.generate import build_kernels, generate
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.options import Entry
from tilewright.compiler.sources import open_source
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline

HERE = Path(__file__).parent
SHAPES = {"x": "batch:1..32,6", "word": "batch", "row": "2,8*blocks:1..8000"}


class Golden(nn.Module):
    """Two layers and a bit of everything that a plan can say: states, checks, guarded variants, nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.words = nn.Embedding(10, 8)
        self.register_buffer("total", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, word: Tensor, row: Tensor) -> dict[str, object]:
        """Scores, the hidden layer, a long softmax, and how much was scored so far."""
        if x.shape[0] == 13:
            return {"scores": x}
        hidden = torch.relu(self.first(x)) + self.words(word)
        scores = torch.softmax(self.second(hidden), -1)
        self.total.add_(scores.sum(0))
        return {"scores": scores, "more": (hidden, row.softmax(-1), x.shape[0]), "total": self.total.clone()}

    def encode(self, x: Tensor) -> Tensor:
        """The second entry point."""
        return self.first(x)


def main(output: Path) -> None:
    """Compile and record what the artifact gives."""
    torch.manual_seed(0)
    module = Golden().eval()
    args = (torch.randn(2, 6), torch.tensor([3, 9]), torch.randn(2, 24))
    entries = {
        "main": Entry("forward", args, dynamic_shapes=SHAPES),
        "encode": Entry("encode", args[:1], dynamic_shapes={"x": "batch:1..32,6"}),
    }
    programs = open_source(module, entries=entries)
    for program in programs:
        PassManager(pipeline(fusion_roles())).run(program)
    generated = generate({"cpu": programs})
    (built,) = build_kernels(generated, [targets.parse("cpu:x86-64-v3", ())], find_compiler(), None)
    small = {name: data for name, data in built.files.items() if not name.startswith("tw_")}
    write_artifact(
        output,
        plans=generated.plans,
        constants=generated.constants,
        targets=[TargetBinaries(built.name, built.features, small)],
        info={"source": "Golden"},
    )
    arrays = {name: tensor.numpy() for name, tensor in zip(("x", "word", "row"), args, strict=True)}
    with torch.no_grad():
        got = module(*args)
        arrays |= {"scores": got["scores"].numpy(), "total": got["total"].numpy(), "encoded": module.encode(args[0])}
        arrays |= {"hidden": got["more"][0].numpy(), "soft": got["more"][1].numpy()}
    np.savez(HERE / f"{output.name}.npz", **arrays)
    tilewright.load(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A decoder's step as GPU kernels, interpreted, against eager PyTorch: plain and with quantized weights."""

from __future__ import annotations

import pytest
import torch

import tilewright
from tilewright.codegen.artifact import write_artifact
from tilewright.codegen.generate import generate, triton_sources
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.frontends.decoder import generating
from tilewright.compiler.options import Task
from tilewright.compiler.samples import make_inputs
from tilewright.compiler.sources import open_source
from tilewright.compiler.verification import run_entry
from tilewright.models.decoder import Config, Decoder
from tilewright.models.initialize import initialize
from tilewright.passes.graph.quantization import read_recipe
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.passes.verify import TOLERANCES, error_of

CONFIG = Config(vocabulary=40, width=64, layers=1, heads=4, kv_heads=2, hidden=96, context=64, head_size=16)
SIZES = (
    {"blocks": 4, "tokens": 32, "sequences": 2, "width": 2, "rows": 2},
    {"blocks": 4, "tokens": 5, "sequences": 2, "width": 2, "rows": 1},
)


@pytest.mark.parametrize("recipe", [None, "int4-g32"], ids=["bf16", "int4"])
def test_a_step_agrees_with_eager(recipe, tmp_path):
    """Embedding, projections, rotation, appending, attention over the cache and logits, for many and for few tokens."""
    module = initialize(Decoder(CONFIG), 0).bfloat16().eval()
    task = Task("generate", context=64, chunk=32, sequences=2)
    (program,) = open_source(generating(module, task, lambda dtype: dtype, {}, {}))
    inputs = [make_inputs(program, sizes) for sizes in SIZES]
    expected = [program.run(given)[0] for given in inputs]
    chosen = None if recipe is None else read_recipe(recipe, "float")
    PassManager(pipeline(fusion_roles("cuda"), "cuda", "own", chosen), precision="own").run(program)
    if recipe is not None:  # what is computed is another model, on purpose
        expected = [program.run(given)[0] for given in inputs]
    generated = generate({"cuda": [program]}, "ieee")
    path = write_artifact(
        tmp_path / "step.tw", plans={"cuda": generated.devices["cuda"].plans}, constants=generated.constants,
        targets=(), sources=triton_sources(generated), info={},
    )  # fmt: skip
    with tilewright.load(path, device="interpreter") as model:
        entry = model.entry("step")
        families = {step.family for step in entry.plan.steps}
        assert {"cache_append", "paged_attention", "matmul" if recipe is None else "quantized"} <= families
        for sizes, given, want in zip(SIZES, inputs, expected, strict=True):
            got = run_entry(entry, given, sizes)[0]
            assert error_of(want, got) <= TOLERANCES[torch.bfloat16], sizes

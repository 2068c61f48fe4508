"""Model families with ``--precision bf16`` on CPUs with and without its instructions, against eager PyTorch."""

import pytest
import torch

import tilewright
from tilewright.codegen.targets import parse
from tilewright.passes.verify import TOLERANCES
from tilewright.runtime import cpu

AVX2, HERE = "cpu:x86-64-v3", "cpu"
CASES = [
    ("mobilenet_v3", HERE), ("unet", HERE), ("unet", AVX2), ("vit", HERE), ("bert", HERE), ("bert", AVX2),
    ("llama_tiny", HERE), ("llama_tiny", AVX2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "target"), CASES)
def test_bfloat16_is_within_its_tolerance(name, target, small_model, tmp_path):
    if not set(parse(target, cpu.features()).features) <= set(cpu.features()):
        pytest.skip(f"this processor cannot run {target}")
    case = small_model(name)
    path = tmp_path / "m.tw"
    done = tilewright.compile(
        case.module, case.args, case.kwargs, output=path, target=target, dynamic_shapes=case.shapes, precision="bf16"
    )
    assert {item.tolerance for item in done.errors} == {TOLERANCES[torch.bfloat16]}
    with tilewright.load(path) as model:
        plan = model.entry("main").plan
    assert {port.dtype for port in plan.outputs} == {"float32"}, "results keep their types"
    steps = [plan.buffers[ref.index].dtype for step in plan.steps for ref in _written(step) if ref.kind == "buffer"]
    assert steps.count("bfloat16") > len(steps) / 2


def _written(step):
    return [step.variants[0].operands[position] for position in step.writes]

"""Targets of several kinds of device: what is refused, and that the passes run once per kind, each on its own copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tilewright.codegen.artifact import plan_name
from tilewright.compiler.driver import Compilation
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.targets import device_kinds, parse_targets
from tilewright.compiler.verification import expect
from tilewright.passes.graph.printer import show
from tilewright.runtime.errors import UsageError

BOTH = ("cuda:sm_90,cpu:x86-64-v3", "cuda:sm_80")


class Half(nn.Module):
    """A product and a norm in half precision."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(24, 40, dtype=dtype), nn.LayerNorm(40, dtype=dtype)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.linear(x).relu())
        return y, y.argmax(-1)


def captured(compilation: Compilation, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(1)
    return compilation.capture(Half(dtype).eval(), (torch.randn(3, 24, dtype=dtype),), shapes={"x": "n:1..64,24"})


def dtypes(program: Any) -> set[torch.dtype]:
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "call_module")
    return {part.dtype for value in values for part in (value if isinstance(value, tuple) else (value,))}


def test_targets_are_taken_apart_by_kind():
    found = parse_targets(BOTH)
    assert [target.name for target in found.cpu] == ["cpu:x86-64-v3"]
    assert [target.name for target in found.cuda] == ["cuda:sm_90", "cuda:sm_80"]
    assert device_kinds(BOTH) == ("cpu", "cuda")
    assert device_kinds(("cuda:sm_90",)) == ("cuda",)


@pytest.mark.parametrize("name", ["cuda:sm_70", "cuda:sm_90a", "cuda:90", "rocm:gfx90a", "gpu"])
def test_unknown_targets_are_refused_with_all_that_exist(name):
    with pytest.raises(UsageError, match=rf"unknown target '{name}'.*\n.*cpu:x86-64-v4, .*cuda:sm_80, .*cuda:sm_120"):
        parse_targets(("cpu:x86-64-v3", name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": BOTH, "precision": "fp16"}, "precision 'fp16' is for GPUs.*compile for the GPU alone"),
        ({"target": ("cpu",), "precision": "tf32"}, "precision 'tf32' is for GPUs, .* choose auto, fp32 or bf16$"),
        ({"target": ("cpu",), "ptx": True}, "--ptx is for GPUs, and no target is one"),
    ],
)
def test_what_a_kind_of_device_cannot_do_is_refused_before_the_source_is_read(changes, message):
    with pytest.raises(UsageError, match=message):
        Compilation(CompileOptions(**changes)).capture("no such source")


def test_unknown_precisions_are_refused():
    with pytest.raises(UsageError, match="unknown precision 'fp8': choose one of auto, fp32, tf32, fp16, bf16"):
        CompileOptions(precision="fp8")


def test_passes_run_per_kind_of_device_on_copies(tmp_path):
    compilation = Compilation(CompileOptions(target=BOTH, verify="passes", dump_dir=tmp_path))
    programs = captured(compilation)
    before = show(programs[0])
    rewritten, records = compilation.rewrite(programs)
    assert show(programs[0]) == before
    assert list(rewritten) == ["cpu", "cuda"]
    assert list(records) == ["main", "main.cuda"] == [plan_name("main", device) for device in rewritten]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu", "cuda"]
    assert (tmp_path / "cpu" / "01_widen_floats").is_dir() and (tmp_path / "cuda" / "passes.json").is_file()
    assert dtypes(rewritten["cuda"][0]) == {torch.bfloat16, torch.int64}
    assert torch.float32 in dtypes(rewritten["cpu"][0])


def test_one_kind_of_device_dumps_without_a_folder_of_its_own(tmp_path):
    compilation = Compilation(CompileOptions(target=("cuda:sm_90",), dump_dir=tmp_path))
    compilation.rewrite(captured(compilation))
    assert (tmp_path / "passes.json").is_file()


def test_fp32_widens_half_precision_for_gpus_too():
    compilation = Compilation(CompileOptions(target=("cuda:sm_90",), precision="fp32"))
    rewritten, _ = compilation.rewrite(captured(compilation))
    assert torch.float32 in dtypes(rewritten["cuda"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_program_is_verified_without_its_device(dtype):
    compilation = Compilation(CompileOptions(target=("cuda:sm_90",)))
    programs = captured(compilation, dtype)
    rewritten, _ = compilation.rewrite(programs)
    found = expect(programs[0], rewritten["cuda"][0], "cuda", runs=False).passes
    floats = {torch.float32: ["output0", "output1"]}.get(dtype, ["output0"])  # a half's last digit decides an argmax
    assert [item.output for item in found] == floats * 3
    assert {item.sizes["n"] for item in found} == {1, 3, 7}
    assert all(item.ok and item.device == "cuda" and "main for cuda: output" in str(item) for item in found)


def test_verification_sees_a_program_that_is_wrong():
    compilation = Compilation(CompileOptions(target=("cuda:sm_90",)))
    programs = captured(compilation, torch.float32)
    rewritten, _ = compilation.rewrite(programs)
    (program,) = rewritten["cuda"]
    bias = next(node for node in program.graph.find_nodes(op="get_attr") if "norm_bias" in node.name)
    setattr(program.module, str(bias.target), getattr(program.module, str(bias.target)) + 0.1)
    assert not all(item.ok for item in expect(programs[0], program, "cuda", runs=False).passes)

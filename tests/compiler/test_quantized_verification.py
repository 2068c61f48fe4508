"""Artifacts with rounded activations are verified kernel by kernel: faults in one layer of a deep model are found."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import fx

import tilewright
from tilewright.codegen.kernel_table import KernelTable
from tilewright.compiler.cli import cli
from tilewright.compiler.driver import Compilation
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.roundings import follow_roundings
from tilewright.compiler.verification import Expected, require_right
from tilewright.passes.convert_quantized import ConvertQuantized
from tilewright.passes.graph.quantized_ops import QUANTIZED_LINEAR, quantize_weight
from tilewright.passes.graph.query import calls
from tilewright.passes.verify import error_of
from tilewright.runtime.errors import NumericsError

SOURCE = """
import torch
from torch import nn
from torch.nn.functional import silu

class Layer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, hidden), nn.Linear(64, hidden), nn.Linear(hidden, 64)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))

def model():
    torch.manual_seed(0)
    net = nn.Sequential(*(Layer(hidden) for hidden in (96, 96, 128, 96)), nn.Linear(64, 40)).eval()
    return net, (torch.randn(5, 64),), {}, {"input": "rows:1..64,64"}
"""
FAULTY = "2.down"  # has a kernel of its own, as its layer is wider than the others
PANEL, STEP = 32, 512  # columns of a panel; bytes of 32 terms of it in 4 bits


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("source") / "layers.py"
    path.write_text(SOURCE)
    return f"{path}:model"


@dataclass
class Built:
    path: Path
    expected: Expected


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Built:
    """With zero points; what it is to compute is kept, so that a fault costs no compilation."""
    found = []

    class Keeping(Compilation):
        def expect(self, *args, **kwargs):
            found.extend(super().expect(*args, **kwargs))
            return found

    path = tmp_path_factory.mktemp("built") / "layers.tw"
    done = Keeping(CompileOptions(quantize="int4-g32-z")).run(source, (), None, path)
    assert done.errors and max(error.error for error in done.errors) < 1e-5
    assert {error.tolerance for error in done.errors} == {1e-4}
    assert {error.sizes["rows"] for error in done.errors} == {1, 5, 11}
    return Built(path, found[0])


def damaged(built: Built, folder: Path, weight: str, change) -> Path:
    """A copy of the artifact with the bytes of one constant changed."""
    path = Path(shutil.copytree(built.path, folder / "bad.tw"))
    with tilewright.load(path) as model:
        constants = model.entry("main").plan.constants
    (constant,) = [one for one in constants if one.name.startswith(weight)]
    file = path / "weights.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") + constant.offset
    size = int(np.prod(constant.shape)) * np.dtype(constant.dtype).itemsize
    view = np.frombuffer(content, np.uint8)[start : start + size].view(constant.dtype).reshape(constant.shape)
    before = view.copy()
    change(view)
    assert not np.array_equal(before, view)
    file.write_bytes(content)
    return path


def a_wrong_scale(panels):
    panels[1, :64].view(np.float16)[5] *= 1.125


def a_swapped_nibble(panels):
    data = panels[0, 3 * PANEL : 3 * PANEL + STEP]
    at = int(np.argmax(np.abs((data & 15).astype(int) - (data >> 4).astype(int))))
    data[at] = (data[at] >> 4) | ((data[at] & 15) << 4)


def a_wrong_zero_point(panels):
    panels[0, 2 * PANEL + 7] += 1


def a_dropped_block(panels):
    panels[:, 3 * PANEL + STEP :][:, :64] = 0  # the scales of the second group of terms


def a_wrong_bias(values):
    values[3] += 0.05


@pytest.mark.parametrize(
    ("weight", "fault"),
    [
        (f"{FAULTY}.weight", a_wrong_scale), (f"{FAULTY}.weight", a_swapped_nibble),
        (f"{FAULTY}.weight", a_wrong_zero_point), (f"{FAULTY}.weight", a_dropped_block),
        (f"{FAULTY}.bias", a_wrong_bias), ("4.weight", a_swapped_nibble), ("0.down.weight", a_wrong_scale),
    ],
)  # fmt: skip
def test_faults_in_one_layer_are_found(built, tmp_path, weight, fault):
    path = damaged(built, tmp_path, weight, fault)
    with tilewright.load(path) as model, pytest.raises(NumericsError, match="1 kernel result differs") as caught:
        require_right(model.entry("main"), built.expected)
    assert f"in {weight.rpartition('.')[0]} at" in str(caught.value)


def test_nothing_else_is(built):
    with tilewright.load(built.path) as model:
        assert all(error.ok for error in require_right(model.entry("main"), built.expected))


def test_compiling_finds_a_kernel_that_leaves_terms_out(source, tmp_path, monkeypatch):
    right = KernelTable.add
    last, fewer = "/ TW_STEP_K, TW_BLOCK", "/ TW_STEP_K - 1, TW_BLOCK"

    def wrong(self, code):
        if code.family == "quantized" and "TW_K = 128" in code.source:
            assert last in code.source
            code = replace(code, source=code.source.replace(last, fewer))
        return right(self, code)

    monkeypatch.setattr(KernelTable, "add", wrong)
    with pytest.raises(NumericsError, match=rf"The first kernel that diverges is quantized_\w+ \(.* in {FAULTY}"):
        tilewright.compile(source, output=tmp_path / "bad.tw", quantize="int4-g32")
    assert not list(tmp_path.iterdir())


def test_compiling_finds_a_wrong_pass(source, tmp_path, monkeypatch):
    """A product that loses its bias, where all kernels compute what the program says."""
    right = ConvertQuantized.run

    def wrong(self, program, report):
        right(self, program, report)
        for node in calls(program.graph, (QUANTIZED_LINEAR,))[3:4]:
            node.update_arg(2, None)

    monkeypatch.setattr(ConvertQuantized, "run", wrong)
    with pytest.raises(NumericsError, match="A pass changed the model"):
        tilewright.compile(source, output=tmp_path / "bad.tw", quantize="int4-g32-z")


def test_the_command_takes_its_options_from_the_artifact(built, source, tmp_path):
    def call(path, *options):
        return CliRunner().invoke(cli, ["verify", str(path), source, "-q", *options])

    found = json.loads(call(built.path, "--kernels", "--json").stdout)
    assert found["outputs"] and all(item["ok"] and item["tolerance"] == 1e-4 for item in found["outputs"])
    assert len(found["kernels"]) > 9
    assert found["kernels_compared_with_later_ones"] == 9  # those that quantize rows of products
    assert found["kernels_not_compared"] == 0
    bad = damaged(built, tmp_path, f"{FAULTY}.weight", a_wrong_zero_point)
    result = call(bad)
    assert result.exit_code == 4 and "DIFFERS" in result.stdout
    assert "1 of 17 kernel results" in result.stderr and "the first is step 17 (quantized_" in result.stderr


# -- roundings that fall the other way ---------------------------------------------------------------------------------


def gated() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """``relu(quantized_linear(a * b, rows)) + r``, and operands of which one element lies just above a middle."""
    generator = torch.Generator().manual_seed(0)
    rows = quantize_weight(torch.randn(24, 64, generator=generator), 8, 0, True, True)
    graph = fx.Graph()
    a, b, weight, added = (graph.placeholder(name) for name in ("a", "b", "weight", "added"))
    x = graph.call_function(torch.ops.aten.mul.Tensor, (a, b))
    y = graph.call_function(QUANTIZED_LINEAR, (x, weight, None, 64, 8, 0, True, 0))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (graph.call_function(torch.relu, (y,)), added)))
    x = torch.randn(3, 64, generator=generator).clamp(-3.9, 3.9)
    x[:, 0], x[1, 9], x[1, 30], x[2, 5] = 4.0, 20.50001 * 4 / 127, -7.49999 * 4 / 127, 3.49999 * 4 / 127
    return fx.GraphModule(torch.nn.Module(), graph), [
        x,
        torch.ones(3, 64),
        rows,
        torch.randn(3, 24, generator=generator),
    ]


def test_roundings_that_fall_the_other_way_are_followed():
    module, operands = gated()
    wanted = [module(*operands)]
    kernel = [operands[0].clone(), *operands[1:]]
    kernel[0][1, 9], kernel[0][1, 30], kernel[0][2, 5] = (c * 4 / 127 for c in (20.49999, -7.50001, 3.50001))
    got = module(*kernel)
    assert error_of(wanted[0], got) > 1e-3
    (followed,) = follow_roundings(module, operands, wanted, [got], 1e-4)
    assert error_of(followed, got) < 1e-6


def test_what_no_rounding_explains_stays_an_error():
    module, operands = gated()
    wanted = [module(*operands)]
    got = wanted[0].clone()
    got[1, 4] += 0.01 * float(got.abs().max())
    (followed,) = follow_roundings(module, operands, wanted, [got], 1e-4)
    assert error_of(followed, got) > 5e-3
    kernel = [operands[0].clone(), *operands[1:]]
    kernel[0][1, 20] += 4 / 127  # another code, of a number that is not near a middle
    got = module(*kernel)
    (followed,) = follow_roundings(module, operands, wanted, [got], 1e-4)
    assert error_of(followed, got) > 1e-3


def test_activations_that_come_from_memory_are_rounded_exactly():
    module, operands = gated()
    (product,) = calls(module.graph, (torch.ops.aten.mul.Tensor,))
    product.replace_all_uses_with(product.args[0])
    module.recompile()
    wanted = [module(*operands)]
    kernel = [operands[0].clone(), *operands[1:]]
    kernel[0][1, 9] = 20.49999 * 4 / 127
    got = module(*kernel)
    (followed,) = follow_roundings(module, operands, wanted, [got], 1e-4)
    assert torch.equal(followed, wanted[0]) and error_of(followed, got) > 1e-3

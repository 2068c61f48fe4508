"""Several sets of inputs at once: the results of runs one by one, with weights computed once."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.compiler.copies import late_constants
from tilewright.compiler.driver import Compilation
from tilewright.compiler.options import CompileOptions
from tilewright.passes.graph.quantized_ops import QUANTIZED_LINEAR
from tilewright.passes.graph.together import run_together

SIZES = (3, 1, 6)


class Model(nn.Module):
    """Products by weights of two kinds, several results of an operator, and values that no input changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("shift", torch.randn(32).bfloat16())

    def forward(self, x):
        y = self.down(torch.relu(self.up(x))) + self.shift.float().sin()
        best, where = y.max(-1)
        return y * best.unsqueeze(-1), where


class InFloat(fx.Interpreter):
    """Runs a program node by node, quantized products on activations as they come."""

    def call_function(self, target, args, kwargs):
        return super().call_function(target, (*args[:-1], -1) if target is QUANTIZED_LINEAR else args, kwargs)

    def call_module(self, target, args, kwargs):
        return InFloat(self.fetch_attr(target)).run(*args)


class Counted(TorchDispatchMode):
    """Counts the calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def programs():
    """The model as captured, and after the passes with quantized weights; and the sets of inputs."""
    compilation = Compilation(CompileOptions(quantize="int8"))
    captured = compilation.capture(Model().eval(), (torch.randn(3, 32),), shapes={"x": "rows:1..9,32"})
    lowered = compilation.rewrite(captured)[0]["cpu"][0]
    compilation.watch.quantize(lowered)
    inputs = [(torch.randn(rows, 32),) for rows in SIZES]
    return captured[0], compilation.watch.settled(lowered), inputs


def same(got, expected) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gives_what_runs_one_by_one_give(programs):
    captured, settled, inputs = programs
    for program in (captured, settled):
        for got, given in zip(run_together(program, inputs), inputs, strict=True):
            same(got, program.run(given))
    for got, given in zip(run_together(settled, inputs, in_float=True), inputs, strict=True):
        with torch.no_grad():
            same(got, InFloat(settled.module).run(*given))


def test_computes_what_no_input_changes_and_products_once(programs):
    captured, settled, inputs = programs
    with Counted() as counted:
        run_together(late_constants(captured), inputs)
    assert counted.calls["sin"] == 1 and counted.calls["relu"] == len(inputs)
    with Counted() as counted:
        run_together(settled, inputs)
    assert counted.calls["quantized_linear"] == 2


def test_kernels_are_asked_for_every_set(programs):
    _, settled, inputs = programs
    seen = []

    def kernel(node, operands, results):
        seen.append((node.name, [len(each) for each in operands]))
        return [
            tuple(map(torch.zeros_like, one)) if isinstance(one, tuple) else torch.zeros_like(one) for one in results
        ]

    for got in run_together(settled, inputs, kernel=kernel):
        assert all(not value.any() for value in got)
    assert seen and all(len(each) == len(inputs) for _, each in seen)

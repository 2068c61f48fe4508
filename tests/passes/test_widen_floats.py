"""Half-precision programs are computed in float32; borders keep their dtypes."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from tilewright.passes.graph.cache_ops import CACHE_APPEND, PAGED_ATTENTION
from tilewright.passes.verify import error_of
from tilewright.passes.widen_floats import HALVES, WidenFloats

BATCH = Dim("batch", min=1, max=16)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.project = nn.Linear(16, 48)
        self.output = nn.Linear(16, 16)

    def forward(self, x):
        rows = self.project(self.norm(x)).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.output(mixed), (x.float() * 2).to(x.dtype), x


@pytest.fixture
def program(exported):
    torch.manual_seed(0)
    module = Attention().to(torch.bfloat16)
    return exported(module, torch.randn(2, 5, 16).to(torch.bfloat16), dynamic_shapes={"x": {0: BATCH}})


def test_golden(program, run_pass, show, golden):
    report = run_pass(WidenFloats(), program, tolerance=2e-2)
    assert len(report.changes) == 1
    golden(show(program))


@pytest.mark.parametrize("dtype", HALVES)
def test_is_closer_to_the_exact_result_than_half_precision(dtype, exported, run_pass):
    torch.manual_seed(1)
    module = Attention().to(dtype)
    x = torch.randn(3, 9, 16).to(dtype)
    narrow = exported(module, x, dynamic_shapes={"x": {0: BATCH}})
    half = narrow.run((x,))[0]
    run_pass(WidenFloats(), narrow, tolerance=4e-2)
    wide = narrow.run((x,))[0]
    exact = module.double()(x.double())[0]
    assert wide.dtype == dtype
    assert error_of(exact, wide.double()) <= error_of(exact, half.double()) + torch.finfo(dtype).eps


def test_only_borders_stay_narrow(program, run_pass):
    run_pass(WidenFloats(), program, tolerance=2e-2)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype in HALVES:
            assert all(user.op == "output" for user in node.users), node


def test_leaves_float32_alone(exported, run_pass):
    program = exported(nn.Linear(4, 4), torch.randn(2, 4))
    assert not run_pass(WidenFloats(), program).changed


def test_results_of_other_dtypes_keep_theirs(exported, run_pass):
    """What converts to and from half precision itself: inputs of integers, results of float32 and integers."""

    class Mixed(nn.Module):
        def forward(self, x, i):
            y = x * i.to(torch.bfloat16)
            return y, y.float(), (y * 2).to(torch.int32), x, i.to(torch.bfloat16)

    program = exported(Mixed(), torch.tensor([[1.0, -2.0, 0.5]]).bfloat16(), torch.arange(3))
    before = [value.dtype for value in program.run(program.sample)]
    run_pass(WidenFloats(), program)
    assert [value.dtype for value in program.run(program.sample)] == before


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_caches_keep_their_type(exported, run_pass, cached_step, cache):
    module, inputs = cached_step(torch.bfloat16, cache)
    program = exported(module, *inputs)
    run_pass(WidenFloats(), program, tolerance=2e-2)
    calls = {node.target: node for node in program.graph.nodes if node.op == "call_function"}
    assert calls[PAGED_ATTENTION].meta["val"].dtype == torch.float32
    assert calls[CACHE_APPEND].meta["val"].dtype == cache
    assert all(node.op in ("placeholder", "call_function") and node.meta["val"].dtype == cache
               for node in calls[PAGED_ATTENTION].args[1:3])  # fmt: skip
    assert calls[CACHE_APPEND].args[0].op == "placeholder"

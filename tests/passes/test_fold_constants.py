"""Constant folding: small ones are computed, large ones become regions, what varies or grows stays."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tilewright.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.graph.query import SMALL
from tilewright.passes.graph.regions import body, is_region

BATCH = Dim("batch", min=1, max=16)


class Mixed(nn.Module):
    """A small constant, a large one, one shared by two users, a mask, and what depends on the batch."""

    def __init__(self):
        super().__init__()
        self.small = nn.Parameter(torch.randn(8))
        self.large = nn.Parameter(torch.randn(256, 128))

    def forward(self, x):
        scale = (self.small * 2).exp()[:4].sum()
        weight = (self.large.t() * 0.5 + 1)[:, :64]
        mask = torch.full((8, 8), float("-inf")).triu(1)
        rows = torch.arange(x.shape[0])
        return (x @ weight).relu() @ weight.t() * scale, mask + x[:8, :8], rows


def mixed(exported):
    torch.manual_seed(0)
    return exported(Mixed(), torch.randn(8, 128), dynamic_shapes={"x": {0: Dim("batch", min=8, max=16)}})


def test_golden(exported, run_pass, show, golden):
    program = mixed(exported)
    run_pass(FoldConstants(), program)
    golden(show(program))


def test_large_constants_wait_without_outlining(exported, run_pass, targets):
    program = mixed(exported)
    run_pass(FoldConstants(outline=False), program)
    assert "aten.exp" not in targets(program) and "aten.triu" not in targets(program)
    assert targets(program).count("aten.slice.Tensor") == 3, "of the weight, and of x by rows and columns"
    assert not any(is_region(node) for node in program.graph.nodes)


def test_regions_stand_on_weights_and_absorb_earlier_regions(exported, run_pass):
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Parameter(torch.randn(256, 128))

        def forward(self, x):
            return x @ (self.large * 2), x @ (self.large * 2 + 1)

    program = exported(Later(), torch.randn(3, 256))
    run_pass(EliminateCommonSubexpressions(), program)
    run_pass(FoldConstants(), program)
    first, second = [node for node in program.graph.nodes if is_region(node, "constant")]
    assert [operand.op for operand in (*first.args, *second.args)] == ["get_attr", "get_attr"]
    assert len(body(second).graph.nodes) == 4, "operand, product, sum, output: recomputed, not held"
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        half = program.graph.call_function(torch.ops.aten.mul.Tensor, (second, 0.5))
    half.meta["val"] = second.meta["val"]
    output.args = ((*output.args[0], half),)
    run_pass(FoldConstants(), program)
    last = program.graph.output_node().args[0][2]
    assert is_region(last, "constant") and [operand.op for operand in last.args] == ["get_attr"]
    assert len(body(last).graph.nodes) == 5


@pytest.mark.parametrize("rows", [SMALL // 4 // 64, SMALL // 4 // 64 + 1])
def test_the_limit_of_what_is_computed_at_once(exported, run_pass, rows):
    class AtLimit(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(rows, 64))

        def forward(self, x):
            return x + self.weight * 2

    program = exported(AtLimit(), torch.randn(rows, 64))
    run_pass(FoldConstants(), program)
    assert any(is_region(node) for node in program.graph.nodes) == (rows * 64 * 4 > SMALL)


def test_what_grows_stays(exported, run_pass, targets):
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.randn(512))

        def forward(self, x):
            positions = torch.arange(512)
            return self.row.expand(512, 512) * 2 + x, (positions[:, None] <= positions[None]) & (x > 0)

    program = exported(Grows(), torch.randn(512, 512))
    run_pass(FoldConstants(), program)
    left = targets(program)
    assert "aten.expand" in left and "aten.le.Tensor" in left and "aten.arange" not in left


def test_a_large_filled_tensor_stays(exported, refusals):
    class Filled(nn.Module):
        def forward(self, x):
            return x + torch.ones(512, 512)

    assert refusals(FoldConstants(), exported(Filled(), torch.randn(512, 512))) == []


def test_varying_sizes_and_random_numbers_stay(exported, refusals):
    class Varies(nn.Module):
        def forward(self, x):
            return torch.arange(x.shape[0]) * 2, torch.rand(4) + x, torch.zeros(x.shape[0])

    program = exported(Varies(), torch.randn(3, 4), dynamic_shapes={"x": {0: BATCH}})
    assert refusals(FoldConstants(), program) == []


def test_parts_of_a_split_constant(exported, run_pass, targets):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.Parameter(torch.randn(6))
            self.large = nn.Parameter(torch.randn(384, 128))

        def forward(self, x):
            a, b = self.small.split(3)
            q, k, v = self.large.chunk(3)
            return x @ q, x @ k, x @ v, a + b

    program = exported(Parts(), torch.randn(2, 128))
    run_pass(FoldConstants(), program)
    assert [name for name in targets(program) if name.startswith("aten")] == ["aten.matmul"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(exported, run_pass, dtype):
    run_pass(FoldConstants(), exported(Mixed().to(dtype), torch.randn(8, 128).to(dtype)))


def test_a_constant_output(exported, run_pass, targets):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Parameter(torch.randn(256, 128))

        def forward(self, x):
            return x, self.large * 2, torch.ones(3) * 2

    program = exported(Constant(), torch.randn(2))
    run_pass(FoldConstants(), program)
    assert [node.op for node in program.graph.output_node().args[0]] == ["placeholder", "call_module", "get_attr"]


def test_no_memory_of_a_weight_is_kept_by_a_slice(exported, run_pass):
    class Slice(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Parameter(torch.randn(256, 256))

        def forward(self, x):
            return x + self.large[3]

    program = exported(Slice(), torch.randn(256))
    run_pass(FoldConstants(), program)
    (constant,) = [node for node in program.graph.nodes if node.op == "get_attr" and node.users]
    assert getattr(program.module, constant.target).untyped_storage().nbytes() == 1024

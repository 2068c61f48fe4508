"""All passes in order on whole networks, verified after each: the same numbers, the structure that they promise."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from tilewright.codegen.roles import fusion_roles
from tilewright.passes.graph.regions import is_region
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline

BATCH, SEQ = Dim("batch", min=1, max=8), Dim("seq", min=1, max=32)
aten = torch.ops.aten


class Block(nn.Module):
    """A transformer block with attention and its mask written out."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x):
        y = self.before(x)
        q, k, v = (self.split(projection(y)) for projection in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        mask = torch.full((y.shape[1], y.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        y = ((scores + mask).softmax(-1) @ v).transpose(1, 2).contiguous().view(x.shape)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.after(x)))) * 0.5


class Images(nn.Module):
    """Convolutions with batch norms, one of them before its convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.early = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image)
        x = x + self.early(self.deep(x))
        return self.head(x.mean((2, 3)) / 3).softmax(-1)


def operators(program):
    found = []
    for node in program.graph.nodes:
        nodes = node.graph.owning_module.get_submodule(node.target).graph.nodes if is_region(node, "kernel") else [node]
        found += [one.target for one in nodes if one.op == "call_function"]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformer(exported, cloned, assert_same_outputs, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block()).to(dtype)
    program = exported(net, torch.randn(2, 7, 32).to(dtype), dynamic_shapes={"input": {0: BATCH, 1: SEQ}})
    before = cloned(program)
    PassManager(pipeline(fusion_roles()), verify=True).run(program)
    found = operators(program)
    assert found.count(aten.scaled_dot_product_attention.default) == 2
    assert found.count(aten.linear.default) == 8, "queries, keys and values are one product"
    assert aten.softmax.int not in found and aten.mul.Tensor not in found
    assert not [
        node for node in program.graph.nodes if node.op == "call_function" and node.target is not aten.sym_size.int
    ]
    for shape in ((1, 1, 32), (5, 13, 32)):
        assert_same_outputs(before, program, [torch.randn(shape).to(dtype)])


def test_images(exported, cloned, assert_same_outputs):
    torch.manual_seed(0)
    program = exported(Images(), torch.randn(2, 3, 16, 16), dynamic_shapes={"image": {0: BATCH}})
    before = cloned(program)
    records = PassManager(pipeline(fusion_roles()), verify=True).run(program)
    found = operators(program)
    assert aten.batch_norm.default not in found and found.count(aten.convolution.default) == 3
    assert_same_outputs(before, program, [torch.randn(7, 3, 16, 16)])
    assert max(record.error or 0.0 for record in records) < 1e-5


def test_nothing_changes_when_it_runs_again_before_fusion(exported, show):
    torch.manual_seed(0)
    program = exported(Block(), torch.randn(2, 7, 32), dynamic_shapes={"x": {0: BATCH, 1: SEQ}})
    passes = pipeline(fusion_roles())[:-1]
    PassManager(passes).run(program)
    settled = show(program)
    PassManager(passes).run(program)
    assert show(program) == settled


def test_every_pass_can_be_left_out(exported, cloned, assert_same_outputs):
    torch.manual_seed(0)
    before = exported(Block(), torch.randn(2, 7, 32), dynamic_shapes={"x": {0: BATCH, 1: SEQ}})
    for name in dict.fromkeys(one.name for one in pipeline(fusion_roles())):
        program = cloned(before)
        PassManager(pipeline(fusion_roles()), disabled=[name]).run(program)
        assert_same_outputs(before, program, [torch.randn(3, 5, 32)])

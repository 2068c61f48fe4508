from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.codegen.roles import fusion_roles
from tilewright.passes.align_layouts import AlignLayouts
from tilewright.passes.base import Report
from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.fold_batch_norm import FoldBatchNorm
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fuse_operators import FuseOperators
from tilewright.passes.graph.layouts import layout_of
from tilewright.passes.graph.regions import body, is_region

ROLES = fusion_roles()
GPU = replace(ROLES, image_layout="channels_last")


@pytest.fixture
def aligned(exported, run_pass):
    """``aligned(module, *inputs) -> (program, report)`` after fusion, with the numbers and a second run checked."""

    def run(module, *inputs, dynamic_shapes=None, roles=ROLES):
        torch.manual_seed(0)
        program = exported(module, *inputs, dynamic_shapes=dynamic_shapes)
        for prepare in (Canonicalize(), FoldBatchNorm(), FoldConstants(), FuseOperators(roles)):
            prepare.run(program, Report())
        report = run_pass(AlignLayouts(roles), program)
        check_convolutions(program, roles)
        return program, report

    return run


def regions(program):
    return {str(node.target): node for node in program.graph.nodes if is_region(node, "kernel")}


def layouts(program):
    return {name: layout_of(node) for name, node in regions(program).items()}


def copies(program):
    """Kernels that do nothing but lay a value out anew."""
    inner = {
        name: [one for one in body(node).graph.nodes if one.op == "call_function"]
        for name, node in regions(program).items()
    }
    return [name for name, nodes in inner.items() if [one.target for one in nodes] == [torch.ops.aten.clone.default]]


def check_convolutions(program, roles):
    """A convolution of at least a block of channels (of float32 on a CPU) never reads rows."""
    gpu = roles is GPU
    for node in regions(program).values():
        if node.meta["region"].family == "convolution":
            image = node.args[0]
            value = image.meta["val"]
            transposed, _, groups = next(one for one in body(node).graph.nodes if one.target in roles.anchors).args[-3:]
            few = value.dim() != 4 or value.shape[1] < roles.lanes or (gpu and value.shape[1] // groups < roles.lanes)
            if not few and not transposed and (gpu or value.dtype == torch.float32):
                assert layout_of(image) == roles.image_layout, f"{node} reads {image} in rows"


class Residual(nn.Module):
    def __init__(self, channels=16, outputs=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, outputs, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(channels, outputs, 1, stride=2)
        self.head = nn.Linear(outputs, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return self.head(F.adaptive_avg_pool2d((y + self.down(x)).relu(), 1).flatten(1))


def test_residual_network(aligned, show, golden):
    batch = torch.export.Dim("batch", min=1, max=8)
    program, report = aligned(Residual(), torch.randn(2, 3, 16, 16), dynamic_shapes=({0: batch},))
    assert copies(program) == []
    assert {name: layout for name, layout in layouts(program).items() if layout == "rows"} == {"linear": "rows"}
    assert report.changes[-1].text == "0 conversions: 0 of operands, 0 of outputs"
    golden(show(program))


class Sequence(nn.Module):
    """Layers one after the other; callables that are no modules are called too."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers
        self.modules_ = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        lambda x: torch.cat([x, x.tanh()], 1)[:, :32] * 2,
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: F.pad(x, (1, 2, 0, 1)),
        lambda x: x.exp(),
    ],
)
def test_nothing_is_copied_between_convolutions(between, aligned):
    program, report = aligned(
        Sequence(nn.Conv2d(3, 32, 1), between, nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 3, 1)),
        torch.randn(1, 3, 8, 8),
    )
    assert copies(program) == []
    rows = [name for name, layout in layouts(program).items() if layout == "rows"]
    assert rows == [list(layouts(program))[-1]]  # the last one, which makes three channels


def test_input_with_channels_is_copied_once(aligned, show, golden):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, x):
            return self.a(x) * self.b(x)

    program, report = aligned(Shared(), torch.randn(1, 16, 5, 5))
    assert copies(program) == ["image_of_x"]
    assert report.changes[-1].text == "1 conversions: 1 of operands, 0 of outputs"
    golden(show(program))


def test_product_with_channels_is_copied(aligned):
    """A product stores rows; its first reader in blocks is given a copy."""
    program, _ = aligned(
        Sequence(nn.Linear(8, 64), lambda x: x.reshape(2, 16, 2, 2), nn.Conv2d(16, 4, 1)), torch.randn(2, 8)
    )
    assert layouts(program) == {"linear": "rows", "reshape": "channels16", "convolution": "rows"}

    class Matrix(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.conv(torch.matmul(x, x.transpose(-1, -2)))

    program, _ = aligned(Matrix(), torch.randn(2, 16, 3, 3))
    assert len(copies(program)) == 1


def test_outputs_are_rows(aligned):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            y = self.first(x)
            return y, self.second(y), F.avg_pool2d(y, 2)

    program, report = aligned(Both(), torch.randn(1, 3, 4, 4))
    assert layouts(program) == {"convolution": "channels16", "convolution_1": "rows", "avg_pool2d": "rows"}
    assert report.changes[-1].text == "1 conversions: 0 of operands, 1 of outputs"
    assert [note.text for note in report.refusals] == ["lies in rows: it is only given out"] * 2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(12, 12, 3), (1, 12, 5, 5)),  # less than a block of channels
        (nn.Conv2d(24, 24, 3, groups=2), (1, 24, 5, 5)),  # groups that are no whole blocks
        (nn.Conv1d(16, 16, 3), (1, 16, 9)),
        (nn.ConvTranspose2d(16, 8, 2, 2), (1, 16, 5, 5)),
    ],
)
def test_gathered_convolutions_read_anything(layer, shape, exported, run_pass):
    program = exported(Sequence(layer, torch.relu), torch.randn(shape))
    for prepare in (Canonicalize(), FoldConstants(), FuseOperators(ROLES)):
        prepare.run(program, Report())
    report = run_pass(AlignLayouts(ROLES), program)
    assert not report.changes


def two_convolutions(aligned, dtype):
    module = Sequence(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)).to(dtype)
    return aligned(module, torch.randn(1, 16, 4, 4, dtype=dtype))


def test_bfloat16_is_blocked_like_float32(aligned):
    program, _ = two_convolutions(aligned, torch.bfloat16)
    assert layouts(program) == layouts(two_convolutions(aligned, torch.float32)[0])
    assert copies(program) and "channels16" in str(layouts(program))


def test_float16_stays_in_rows(aligned):
    program, report = two_convolutions(aligned, torch.float16)
    assert not report.changes and copies(program) == []
    found = [note.text for note in report.refusals]
    assert "lies in rows: blocks of channels are float32 or bfloat16, this is float16" in found


def test_other_layouts_do_not_spread(aligned):
    """What has fewer axes, or reads mostly rows, lies in rows."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 1)

        def forward(self, x, y):
            z = self.conv(x)
            return (z.mean((2, 3)) * 2).softmax(-1), (z.amax((2, 3), keepdim=True) + y).softmax(-1).sum(1)

    program, _ = aligned(Mixed(), torch.randn(1, 3, 4, 4), torch.randn(1, 16, 4, 4))
    found = layouts(program)
    assert found.pop("convolution") == "channels16"
    assert found.pop("amax") == "channels16"  # reads blocks only
    assert set(found.values()) == {"rows"}


# -- channels_last, for GPUs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_network_with_channels_last(aligned, dtype):
    """The network's input stays as it is; everything up to the head is channels_last, whatever its dtype."""
    batch = torch.export.Dim("batch", min=1, max=8)
    module, image = Residual().eval().to(dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    program, report = aligned(module, image, dynamic_shapes=({0: batch},), roles=GPU)
    assert copies(program) == []
    found = layouts(program)
    assert found.pop("linear") == "rows"
    assert set(found.values()) == {"channels_last"}
    assert report.changes[-1].text == "0 conversions: 0 of operands, 0 of outputs"


def test_few_channels_are_channels_last_too(aligned, show, golden):
    program, _ = aligned(
        Sequence(nn.Conv2d(3, 5, 3), torch.relu, nn.Conv2d(5, 6, 3), nn.ConvTranspose2d(6, 7, 2, 2)),
        torch.randn(1, 3, 8, 8),
        roles=GPU,
    )
    assert list(layouts(program).values()) == ["channels_last", "channels_last", "rows"]
    golden(show(program))


@pytest.mark.parametrize(
    ("layer", "channels", "copied"),
    [
        (nn.Conv2d(3, 8, 3), 3, False),
        (nn.Conv2d(16, 8, 3), 16, True),
        (nn.Conv2d(16, 16, 3, groups=16), 16, True),
        (nn.Conv2d(32, 8, 3, groups=2), 32, True),
        (nn.Conv2d(32, 8, 3, groups=4), 32, False),
        (nn.ConvTranspose2d(16, 8, 2, 2), 16, False),
    ],
)
def test_inputs_are_copied_where_that_pays(aligned, layer, channels, copied):
    program, _ = aligned(Sequence(layer, torch.relu), torch.randn(1, channels, 5, 5), roles=GPU)
    assert copies(program) == (["image_of_x"] if copied else [])

"""Every operator with a lowering, each in a kernel of its own, against PyTorch at awkward sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.codegen.registry import all_lowerings, lowers


class Pointwise(nn.Module):
    def forward(self, x, y):
        positive = x.abs() + 0.1
        return (
            x + y, x - y, x * y, x / (y.abs() + 1), torch.maximum(x, y), torch.minimum(x, y), x.neg(), x.abs(),
            torch.exp(x), torch.expm1(x), torch.log(positive), torch.log1p(positive), torch.log2(positive),
            torch.tanh(x), torch.erf(x), torch.sigmoid(x), torch.sin(x), torch.cos(x), torch.sqrt(positive),
            torch.rsqrt(positive), torch.floor(x), torch.ceil(x), torch.round(x), torch.trunc(x), torch.sign(x),
            F.silu(x), F.relu(x), F.relu6(x * 5), F.hardtanh(x), x.clamp(-0.5, 0.5), x.clamp(min=0.2), F.hardsigmoid(x
            * 3), F.hardswish(x * 3), F.gelu(x), F.gelu(x, approximate="tanh"), F.leaky_relu(x, 0.2), F.elu(x),
            F.selu(x), F.softplus(x), F.mish(x), F.logsigmoid(x), x.reciprocal(), torch.pow(positive, y), x**2, x**3,
            positive**0.5, positive**-0.5, x**-2, torch.remainder(x, 0.7), torch.fmod(x, 0.7), torch.atan2(x, y),
            F.hardshrink(x), F.softshrink(x), torch.erfc(x), torch.add(x, y, alpha=2), torch.rsub(x, y, alpha=3), 1 -
            x, torch.square(x), F.threshold(x, 0.1, 20.0), torch.where(x > y, x, y), x.masked_fill(x > 0, -1.0),
            torch.div(x, y, rounding_mode="floor"), torch.div(x, y, rounding_mode="trunc"), torch.tan(x),
            torch.asin(x.clamp(-1, 1)), torch.atan(x), torch.sinh(x),
        )  # fmt: skip


class Logic(nn.Module):
    def forward(self, x, i):
        a, b = x > 0, i > 2
        return (
            a, x >= 0.5, x < i, x == x, x != 0, i <= 3, a & b, a | b, a ^ b, ~a, torch.logical_and(a, b),
            torch.logical_not(x), i // 3, i % 3, i * 2 - 1, -i, i & 3, i | 4, i ^ 5, i << 2, i >> 1, ~i, i.abs(),
            i.float() / 2, i.to(torch.int32), x.to(torch.int64), x.isnan(), x.isinf(), (x / 0).isfinite(), a.float(),
            a.any(-1), b.all(1), i.sum(-1), a.sum(), torch.full_like(x, 3.0), torch.zeros_like(i), torch.ones_like(a),
            torch.arange(x.shape[1]) + i, torch.arange(3, 17, 2), torch.where(a, 1.5, 0.0), torch.div(i, 2),
            torch.div(i, 3, rounding_mode="trunc"), i.clamp(1, 4), torch.maximum(i, i.flip(0)), i.amax(1),
            i.argmin(1), a.to(torch.uint8), i.double() / 3,
        )  # fmt: skip


class Views(nn.Module):
    def forward(self, x):
        b, s, c = x.shape
        first, second, third = x.split([3, 5, c - 8], dim=2)
        return (
            x.permute(2, 0, 1), x.transpose(0, 2), x.reshape(b, s * c), x.reshape(b * s, c).t(),
            x.unsqueeze(1).expand(b, 3, s, c), x[:, :, 2:-1], x[:, ::2], x[:, -1], x[..., ::3], x.flip(1), x.repeat(2,
            1, 3), x.repeat_interleave(2, 1), torch.cat([x, x * 2, x[:, :1]], 1), torch.stack([x, -x], 1), F.pad(x,
            (1, 2, 3, 0)), F.pad(x, (-1, -2)), F.pad(x, (2, 1), value=7.0), torch.tril(x), torch.triu(x, 1), first *
            2, second + 1, third - 1, x.roll(1, 1), x.view(b, s, 2, c // 2).transpose(2, 3).reshape(b, s, c),
            x.unflatten(2, (c // 2, 2)).sum(-1), x.unsqueeze(0).squeeze(0), x.chunk(2, -1)[1] * 1, torch.diagonal(x,
            0, 1, 2) + 0, x.movedim(0, -1), x.unbind(2)[4] + 0, F.pad(x, (3, 2), mode="reflect"), F.pad(x, (3, 2),
            mode="replicate"), F.pad(x, (3, 2), mode="circular"),
        )  # fmt: skip


class Reductions(nn.Module):
    def forward(self, x):
        return (
            x.sum(-1), x.sum(1), x.sum((0, 2)), x.sum(), x.mean(-1, keepdim=True), x.mean(1), x.mean(), x.amax(-1),
            x.amin(1), x.max(), x.prod(2), x.var(-1), x.std(1), x.var((1, 2), correction=0), torch.softmax(x, -1),
            torch.softmax(x, 1), torch.log_softmax(x, -1), F.layer_norm(x, x.shape[-1:]), F.layer_norm(x,
            x.shape[-1:], x[0, 0], x[0, 0] * 2), F.rms_norm(x, x.shape[-1:], x[0, 0], 1e-5), x.argmax(-1), x.argmax(1,
            keepdim=True), x.argmin(-1), x.argmax(), *x.max(1), *x.min(-1), x.cumsum(1), x.cumsum(-1),
            F.group_norm(x.transpose(1, 2), 4), torch.softmax(x * 2, 0), F.normalize(x, dim=-1),
            torch.linalg.vector_norm(x, dim=-1), torch.linalg.vector_norm(x, 1, dim=1), torch.linalg.vector_norm(x,
            3.0), torch.linalg.vector_norm(x, float("inf"), dim=-1),
        )  # fmt: skip


class Indexing(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(37, 21)

    def forward(self, ids, x):
        rows = self.table(ids)
        other = x.slice_scatter(x[:, :1] * 5, 1, 1, 2)
        return (
            rows, rows + 1, torch.index_select(x, 1, ids[0] % 2), torch.gather(x, 2, (ids %
            21).unsqueeze(1).expand(-1, 2, -1)), x[:, ids[0] % 3], x[:, :, -1 - ids[0] % 5], other,
            x.select_scatter(x[:, 0] * 2, 1, -1), x.index_copy(1, ids[0, :2] % 2, x[:, :2] * 3), F.one_hot(ids[:, :2]
            % 3, 4),
        )  # fmt: skip


class Windows(nn.Module):
    def forward(self, x):
        return (
            F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 2, ceil_mode=True), F.max_pool2d(x, (3, 2), (1, 2), (1, 0),
            dilation=2), F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1,
            count_include_pad=False), F.avg_pool2d(x, 3, 2, ceil_mode=True), F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool2d(x, (3, 5)), F.adaptive_max_pool2d(x, (2, 3)), F.interpolate(x, scale_factor=2),
            F.interpolate(x, size=(9, 20)), F.interpolate(x, scale_factor=2, mode="bilinear"), F.interpolate(x,
            size=(5, 31), mode="bilinear", align_corners=True), F.max_pool1d(x[:, :, 0], 3, 1, 1), F.avg_pool1d(x[:,
            :, 0], 3, 2), F.pixel_shuffle(x[:, :16], 2), F.interpolate(x[:, :, 0], scale_factor=2, mode="linear"),
            F.adaptive_avg_pool1d(x[:, 0], 4), F.channel_shuffle(x[:, :16], 4),
        )  # fmt: skip


BATCH, SEQ = torch.export.Dim("batch", max=64), torch.export.Dim("seq", max=512)
CASES = {
    "pointwise": (
        Pointwise,
        lambda b, s: (torch.randn(b, s, 19), torch.randn(s, 1)),
        ({0: BATCH, 1: SEQ}, {0: SEQ}),
        4e-6,
    ),
    "logic": (
        Logic,
        lambda b, s: (torch.randn(b, s), torch.randint(-9, 9, (b, s))),
        ({0: BATCH, 1: SEQ}, {0: BATCH, 1: SEQ}),
        2e-6,
    ),
    "views": (Views, lambda b, s: (torch.randn(b, s, 22),), ({0: BATCH, 1: SEQ},), 2e-6),
    "reductions": (Reductions, lambda b, s: (torch.randn(b, s, 20),), ({0: BATCH, 1: SEQ},), 4e-6),
    "indexing": (
        Indexing,
        lambda b, s: (torch.randint(0, 37, (b, s)), torch.randn(b, 3, 21)),
        ({0: BATCH, 1: SEQ}, {0: BATCH}),
        2e-6,
    ),
}


@pytest.mark.sanitize("indexing")
@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
@pytest.mark.parametrize("name", CASES)
def test_at_several_sizes(name, target, compiled, assert_same):
    module_type, make, shapes, tolerance = CASES[name]
    torch.manual_seed(3)
    module = module_type()
    sizes = [(3, 7), (1, 4), (2, 65)] if name in ("views", "indexing") else [(3, 7), (1, 2), (2, 130)]
    model = compiled(module, make(*sizes[0]), shapes, passes=False, target=target)
    for size in sizes:
        assert_same(model, module, make(*size), tolerance)


@pytest.mark.parametrize("channels", [16, 21])
def test_windows(channels, compiled, assert_same):
    torch.manual_seed(4)
    model = compiled(Windows(), (torch.randn(2, channels, 14, 13),), ({0: BATCH},), passes=False)
    for batch in (1, 3):
        assert_same(model, Windows(), (torch.randn(batch, channels, 14, 13),))


def test_special_values(compiled, assert_same):
    values = torch.tensor(
        [[0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3e38, -3e38, 88.0, -104.0]]
    )

    class Specials(nn.Module):
        def forward(self, x):
            return (
                F.relu(x), x.clamp(-1, 1), torch.exp(x), torch.sigmoid(x), torch.tanh(x), x.amax(-1), x.amin(-1),
                x.isnan(), torch.softmax(x[:, 5:], -1), torch.log(x), torch.sqrt(x), torch.maximum(x, x.flip(1)),
                x.argmax(-1), torch.erf(x), torch.sign(x),
            )  # fmt: skip

    assert_same(compiled(Specials(), (values,), passes=False), Specials(), (values,))


def test_half_precision_inputs(compiled, assert_same):
    class Half(nn.Module):
        def forward(self, x, y):
            return x * 2 + 1, (x * y).float(), torch.softmax(x, -1), x.to(torch.bfloat16).float()

    x, y = torch.randn(5, 33).half(), torch.randn(5, 33).half()
    assert_same(compiled(Half(), (x, y), passes=False), Half(), (x, y), 1e-3)


class Lookups(nn.Module):
    """Three ways to take rows with which an index has to be in its table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, rows, places, elements):
        table = self.table.weight
        return self.table(rows), table.index_select(0, places), table.gather(1, elements)


@pytest.mark.sanitize
def test_an_index_outside_its_table_is_reported_and_the_model_stays_usable(compiled, assert_same):
    from tilewright.runtime.errors import InputError

    module, good = Lookups(), (torch.tensor([[1, 9, 3]]), torch.tensor([0, 9]), torch.tensor([[3, 0]]))
    model = compiled(module, good)
    for position, inputs in enumerate(good):
        for outside in (-1, 10):
            given = [tensor.clone().numpy() for tensor in good]
            given[position].flat[inputs.numel() - 1] = outside
            with pytest.raises(InputError, match="out of range"):
                model(*given)
    assert_same(model, module, good)


class Wrapped(nn.Module):
    """Two ways to take rows with which -1 is the last."""

    def forward(self, x, rows, elements):
        return x[rows], torch.take_along_dim(x, elements, 1)


@pytest.mark.sanitize
def test_indices_count_from_the_end_where_pytorch_lets_them(compiled, assert_same):
    from tilewright.runtime.errors import InputError

    inputs = (torch.randn(6, 4), torch.tensor([-6, 5, -1]), torch.tensor([[-1, 0, -4]]))
    model = compiled(Wrapped(), inputs)
    assert_same(model, Wrapped(), inputs)
    for rows, elements in (([-7], [[0]]), ([0], [[-5]])):
        with pytest.raises(InputError, match="out of range"):
            model(inputs[0].numpy(), np.array(rows * 3), np.array(elements * 3).T.copy())


@pytest.mark.sanitize
def test_a_row_that_cannot_be_copied_to_is_reported(compiled, assert_same):
    from tilewright.runtime.errors import InputError

    class Copy(nn.Module):
        def forward(self, x, ids, rows):
            return x.index_copy(0, ids, rows)

    inputs = (torch.randn(5, 3), torch.tensor([4, 0, 4]), torch.randn(3, 3))
    model = compiled(Copy(), inputs)
    assert_same(model, Copy(), inputs)
    for outside in (5, -1):
        with pytest.raises(InputError, match="out of range"):
            model(inputs[0].numpy(), np.array([1, outside, 2]), inputs[2].numpy())


def test_a_constant_index_outside_its_table_is_reported(compiled):
    from tilewright.runtime.errors import InputError

    class Constant(nn.Module):
        def forward(self, x):
            return x[torch.full((2,), 6)]

    with pytest.raises(InputError, match="out of range"):
        compiled(Constant(), (torch.randn(5, 3),))(np.zeros((5, 3), np.float32))


def test_registering_an_operator_twice_is_an_error():
    target = next(iter(all_lowerings()))
    with pytest.raises(ValueError, match="lowered twice"):
        lowers(target, role="pointwise")(lambda *args: None)


def test_large_and_strided(compiled, assert_same):
    class Large(nn.Module):
        def forward(self, x):
            return x * 2 + 1, x.t().contiguous(), (x[::3] + x[1::3]).sum(0)

    x = torch.randn(999, 1025)
    assert_same(compiled(Large(), (x,), passes=False), Large(), (x,))


@pytest.mark.sanitize
def test_one_element_and_zero_sizes(compiled, assert_same):
    class Small(nn.Module):
        def forward(self, x):
            return x + 1, x.sum(-1), torch.softmax(x, -1), x.reshape(-1), x[:0], x.mean(0)

    assert_same(compiled(Small(), (torch.randn(1, 1),), passes=False), Small(), (torch.randn(1, 1),))
    module = Small()
    model = compiled(module, (torch.randn(4, 3),), ({0: torch.export.Dim("rows", min=0, max=9)},), passes=False)
    assert_same(model, module, (torch.randn(0, 3),))


def test_long_rows_take_another_variant(compiled, assert_same):
    class Rows(nn.Module):
        def forward(self, x):
            return torch.softmax(x, -1), F.layer_norm(x * 2 + 1, x.shape[-1:])

    module = Rows()
    shapes = ({1: torch.export.Dim("length", max=200_000)},)
    model = compiled(module, (torch.randn(3, 40),), shapes)
    guards = [[variant.guard for variant in step.variants] for step in model.entry("main").plan.steps]
    assert any(len(variants) == 2 and variants[-1] == 1 for variants in guards)
    for length in (1, 40, 24_000, 100_001):
        assert_same(model, module, (torch.randn(3, length),), 4e-6)


@pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu"])
def test_long_sums_end_anywhere(target, compiled, assert_same):
    class Sums(nn.Module):
        def forward(self, x, y):
            return x.sum(-1), (x * y).sum(-1), x.t()[1:].sum(0), x.square().mean(-1), x.var(-1)

    module = Sums()
    shapes = ({1: torch.export.Dim("length", min=64, max=4096)},) * 2
    model = compiled(module, (torch.ones(3, 80), torch.ones(3, 80)), shapes, target=target)
    for length in (64, 79, 127, 128, 129, 255, 257, 319, 513):
        whole = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(length))
        assert_same(model, module, (whole[0], whole[1]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_products_in_other_dtypes_than_float32(dtype, compiled, assert_same):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (7, 5)).to(dtype), requires_grad=False)

        def forward(self, x):
            y = F.linear(x, self.weight)
            added = torch.addmm(y[0], x[0], self.weight.t())
            return y, y @ y.transpose(1, 2), x[0] @ self.weight.t() + 1, added, y[0, 0] @ y[1].t()

    torch.manual_seed(2)
    module = Products()
    for passes in (False, True):
        model = compiled(module, (torch.randint(-9, 9, (2, 3, 5)).to(dtype),), ({0: BATCH},), passes=passes)
        assert_same(model, module, (torch.randint(-9, 9, (4, 3, 5)).to(dtype),), 1e-14)

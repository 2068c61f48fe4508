"""Corners of what a model may take and return, from the module to the running artifact."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.models.initialize import initialize
from tilewright.runtime.errors import ShapeError, UsageError


class EveryOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x, y):
        doubled = x * 2
        return {
            "input": x, "weight": self.weight, "view_of_input": x[:, 1:3], "doubled": doubled, "again": doubled,
            "view": doubled.transpose(0, 1), "view_of_view": doubled.transpose(0, 1)[1],
            "view_of_weight": self.weight.t(),
            "constant": torch.tensor([1.5, -2.0]), "number": 3, "fraction": 0.5, "flag": True, "nothing": None,
            "text": "abc",
            "size": x.shape[0], "twice": x.shape[0] * 2 + 1,
            "nested": [{"tuple": (x.sum(), [y])}, (), [], {}], "swapped": (y, x, y),
        }  # fmt: skip


def test_every_kind_of_output(make, same):
    module = EveryOutput()
    x, y = torch.randn(5, 4), torch.randint(0, 9, (2,))
    model = make(module, (x, y), {"x": "n:1..9,4"})
    for rows in (5, 1, 9):
        x = torch.randn(rows, 4)
        given = x.numpy().copy()
        result = model(given, y.numpy())
        same(result, module(x, y))
        result["input"][:] = 7  # outputs are the caller's: they share memory with nothing
        result["doubled"][:] = 7
        result["weight"][:] = 7
        same(result["again"], x * 2)
        np.testing.assert_array_equal(given, x.numpy())
        same(model(given, y.numpy()), module(x, y))


class OnlyViews(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2).reshape(x.shape[0], -1)[:, ::2]


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Same(nn.Module):
    def forward(self, x):
        return x


class Constant(nn.Module):
    def forward(self, x):
        return torch.arange(4), torch.zeros(x.shape[0], 2), 1


@pytest.mark.parametrize("kind", [OnlyViews, Nothing, Same, Constant])
def test_models_that_compute_nothing(make, same, kind):
    model = make(kind(), (torch.randn(3, 4, 6),), {"x": "n:1..9,4,6"})
    for rows in (3, 1, 8):
        x = torch.randn(rows, 4, 6)
        same(model(x.numpy()), kind()(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 2), nn.Linear(100, 100)

    def forward(self, x, y, flag=None):
        return self.layer(x)


def test_unused_inputs_and_weights(make, same):
    module = initialize(Unused(), 0)
    model = make(module, (torch.randn(3, 4), torch.randn(2, 2)), {"x": "n:1..9,4", "y": "m:1..5,2"})
    x, y = torch.randn(2, 4), torch.randn(5, 2)
    same(model(x.numpy(), y=y.numpy()), module(x, y))
    with pytest.raises(ShapeError, match="'y'"):
        model(x.numpy(), np.zeros((6, 2), np.float32))
    with pytest.raises(UsageError, match="y missing"):
        model(x.numpy())
    assert all("idle" not in constant.name for constant in model.entry("main").plan.constants)


# -- sizes -------------------------------------------------------------------------------------------------------------


class Reducing(nn.Module):
    def forward(self, x, y):
        return x.sum(0), (x @ y).relu(), torch.cat([x, x * 2]), y.mean() + x.sum()


@pytest.mark.parametrize("rows, inner", [(0, 3), (2, 0), (0, 0)])
def test_zero_sizes(make, rows, inner):
    x, y = torch.randn(rows, inner), torch.randn(inner, 2)
    model = make(Reducing(), (x, y))
    got, want = model(x.numpy(), y.numpy()), Reducing()(x, y)
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right.numpy(), rtol=1e-6)


def test_a_dynamic_size_of_zero(make, same):
    module = initialize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    model = make(module, (torch.randn(2, 4),), {"input": "rows:0..9,4"})
    for rows in (0, 1, 9):
        x = torch.randn(rows, 4)
        same(model(x.numpy()), module(x))


class Scalars(nn.Module):
    def forward(self, x, y, n):
        return x * y, x.reshape(1, 1), torch.where(n > 2, x, y), n + 1, torch.stack([x, y]).softmax(0)


def test_scalars(make, same):
    model = make(Scalars(), (torch.tensor(2.0), torch.tensor(-3.0), torch.tensor(4)))
    for x, y, n in ((1.5, 2.5, 3), (-1.0, 0.0, 2)):
        want = Scalars()(torch.tensor(x), torch.tensor(y), torch.tensor(n))
        same(model(np.float32(x), np.array(y, np.float32), np.int64(n)), want)
        same(model(x, y, n), want)


class OneElement(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 1, 1), nn.LayerNorm(1), nn.Linear(1, 1)

    def forward(self, x):
        y = self.conv(x)
        return y, self.norm(y), self.linear(y), y.softmax(-1), y.amax((2, 3)), F.max_pool2d(y, 1), y @ y


def test_one_element(make, same):
    module = initialize(OneElement(), 0)
    x = torch.randn(1, 1, 1, 1)
    same(make(module, (x,))(x.numpy()), module(x))


class Stretched(nn.Module):
    def forward(self, x):
        b, n = x.shape
        return x.view(b, n // 16, 16).sum(1), x.view(b, 16, n // 16).amax(2), F.softmax(x, -1)


def test_multiples_of_a_symbol(make, same):
    model = make(Stretched(), (torch.randn(2, 64),), {"x": "b:1..4,16*h:2..32"})
    assert model.inputs[0].shape == ("b", "h*16") and model.inputs[0].ranges == {"b": (1, 4), "h": (2, 32)}
    for rows, h in ((2, 4), (1, 2), (4, 32), (3, 7)):
        x = torch.randn(rows, 16 * h)
        same(model(x.numpy()), Stretched()(x))
    for size in (16, 40, 33 * 16):
        with pytest.raises(ShapeError, match="'x'"):
            model(np.zeros((2, size), np.float32))
    x = torch.randn(2, 64)
    same(model(x.numpy()), Stretched()(x))


class Scaled(nn.Module):
    """Real numbers computed from sizes, which the compiler must not take at the sample's value."""

    def forward(self, x, y):
        n, h = x.shape[1], y.shape[2]
        scores = (x @ x.transpose(-1, -2) / n**0.5).softmax(-1)
        return (
            scores @ x, x * (1 / n), x - (n - 1) / 2, x.sum() / n, x.sum(1) * (n // 2), x.clamp(max=n * 0.1),
            x * torch.sym_sqrt(n),
            torch.full((2,), n * 0.25), torch.arange(n) * (1.0 / n), y[:, :, : h // 2] * 1,
            F.interpolate(y, scale_factor=1.5, mode="bilinear"),
            F.interpolate(y, scale_factor=2.0), F.interpolate(y, scale_factor=0.5), torch.linspace(-1, 2.5, 7),
            torch.linspace(3, 4, 1),
        )  # fmt: skip


def test_numbers_that_follow_from_sizes(make, same):
    model = make(Scaled(), (torch.randn(2, 5), torch.randn(1, 3, 6, 8)), {"x": "b:1..8,n:1..9", "y": "1,3,h:2..20,8"})
    for b, n, h in ((2, 5, 6), (1, 1, 3), (8, 9, 20)):
        x, y = torch.randn(b, n), torch.randn(1, 3, h, 8)
        same(model(x.numpy(), y.numpy()), Scaled()(x, y))


class Folded(nn.Module):
    def forward(self, x):
        return x.view(-1, 24) * 2


def test_an_assumption_about_sizes_is_checked(make, same):
    model = make(Folded(), (torch.randn(8, 6),), {"x": "n:1..64,6"})
    for size in (7, 1):
        with pytest.raises(ShapeError, match=rf"traced assuming n == .*4.*n = {size}"):
            model(np.zeros((size, 6), np.float32))
        x = torch.randn(12, 6)
        same(model(x.numpy()), Folded()(x))


def test_shape_errors_say_what_was_expected_and_what_came(make, same):
    module = initialize(nn.Linear(4, 2), 0)
    model = make(module, (torch.randn(3, 4),), {"input": "rows:2..9,4"})
    f32 = np.float32
    for value, message in (
        (np.zeros((3, 4)), r"'input'.*float32.*float64"),
        (np.zeros((3, 4), np.int64), r"'input'.*float32.*int64"),
        (np.zeros(4, f32), r"'input'.*float32\[rows, 4\].*shape \[4\]"),
        (np.zeros((3, 4, 1), f32), r"'input'.*rows"),
        (np.zeros((3, 5), f32), r"'input', axis 1: expected 4, got 5"),
        (np.zeros((1, 4), f32), r"'input', axis 0 \(rows\): expected 2 to 9, got 1"),
        (np.zeros((10, 4), f32), r"'input', axis 0 \(rows\): expected 2 to 9, got 10"),
        (np.zeros((0, 4), f32), r"'input', axis 0 \(rows\): expected 2 to 9, got 0"),
    ):
        with pytest.raises(ShapeError, match=message):
            model(value)
        x = torch.randn(5, 4)
        same(model(x.numpy()), module(x))


class Pair(nn.Module):
    def forward(self, x, y):
        return x @ y


def test_one_symbol_in_two_inputs(make, same):
    model = make(Pair(), (torch.randn(3, 5), torch.randn(5, 2)), {"x": "n:1..9,k:1..9", "y": "k,2"})
    x, y = torch.randn(2, 7), torch.randn(7, 2)
    same(model(x.numpy(), y.numpy()), Pair()(x, y))
    with pytest.raises(ShapeError, match=r"'y', axis 0.*expected 7, got 6 .*k.*'x', axis 1"):
        model(x.numpy(), np.zeros((6, 2), np.float32))


def test_names_of_sizes_may_be_anything(make, same):
    """Names that C, the templates or the kernels' loops use themselves."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, y, z):
            mixed = F.scaled_dot_product_attention(self.linear(x), x, x)
            return mixed, y.softmax(-1) @ y.transpose(1, 2), z.mean((1, 2)), z[:, 1:].amax(2)

    module = initialize(Odd(), 0)
    shapes = {"x": "b:1..4,int:1..9,8", "y": "unit:1..4,h:1..9,k:1..9", "z": "size:1..4,i0:2..9,double:2..9"}
    model = make(module, (torch.randn(2, 5, 8), torch.randn(3, 6, 4), torch.randn(2, 3, 5)), shapes)
    inputs = torch.randn(3, 4, 8), torch.randn(2, 9, 7), torch.randn(4, 8, 6)
    same(model(*[tensor.numpy() for tensor in inputs]), module(*inputs))


class Attentions(nn.Module):
    """The operator and the same written out, causal and not."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-1, -2) * 0.2
        return (
            F.scaled_dot_product_attention(q, k, v),
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1),
            scores.softmax(-1) @ v,
            F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
            F.scaled_dot_product_attention(q.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), k, v),
        )


@pytest.mark.parametrize(
    "d, shapes, dtype",
    [(300, "2,3,n:1..9,300", torch.float32), (6, "2,3,n:1..9,d:1..20", torch.float32), (8, None, torch.float64)],
)
def test_attention_over_any_heads(make, same, d, shapes, dtype):
    """Heads that no attention kernel takes: too long, of a length that varies, in float64."""
    shapes = shapes and {"q": shapes, "k": shapes, "v": shapes}
    model = make(Attentions(), [torch.randn(2, 3, 5, d, dtype=dtype) for _ in range(3)], shapes)
    for length in (5, 1, 9) if shapes else (5,):
        inputs = [torch.randn(2, 3, length, d, dtype=dtype) for _ in range(3)]
        same(model(*[tensor.numpy() for tensor in inputs]), Attentions()(*inputs), 1e-5)


class Large(nn.Module):
    def forward(self, x, y):
        return x.sum(), (x + y).amax(1), x.reshape(-1)[::1000].cumsum(0)


def test_large_static_shapes(make):
    """Offsets in 64 bits, reductions of millions of elements."""
    x, y = torch.randn(3000, 2000), torch.randn(2000)
    got, want = make(Large(), (x, y))(x.numpy(), y.numpy()), Large()(x.double(), y.double())
    for left, right in zip(got, want, strict=True):
        np.testing.assert_allclose(left, right.numpy(), rtol=1e-5, atol=1e-3)


# -- dtypes ------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x, i, mask):
        y = torch.where(mask, x, -x) * 2 + i.to(self.dtype)
        return y, y > 1, y.sum(-1), y.amax(0), (y * 2).to(torch.int32), i.sum(), mask.any(-1), y.softmax(-1), y.float()


DTYPES = [
    *((dtype, torch.int64) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    *((torch.float32, integers) for integers in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)),
    (torch.bfloat16, torch.uint8),
]


@pytest.mark.parametrize(("dtype", "integers"), DTYPES, ids=str)
def test_dtypes(make, dtype, integers):
    model = make(
        Mixed(dtype), (torch.randn(4, 5).to(dtype), torch.randint(0, 9, (5,)).to(integers), torch.rand(4, 5) > 0.5)
    )
    x, i, mask = (
        (torch.randn(4, 5) * 3).round().to(dtype),
        torch.randint(0, 100, (5,)).to(integers),
        torch.rand(4, 5) > 0.5,
    )
    given = x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else x.numpy()
    got, want = model(given, i.numpy(), mask.numpy()), Mixed(dtype)(x, i, mask)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for position, (left, right) in enumerate(zip(got, want, strict=True)):
        expected = right.float().numpy() if right.dtype == torch.bfloat16 else right.numpy()
        assert left.dtype.name == str(right.dtype).removeprefix("torch."), position
        np.testing.assert_allclose(
            left.astype(expected.dtype), expected, rtol=rounding, atol=rounding, err_msg=str(position)
        )


def test_extrema_of_small_integers(make, same):
    class Extrema(nn.Module):
        def forward(self, x):
            return x.amax(-1), x.amin(0), x.argmax(-1), x.min(1)[0]

    for dtype, low, high in (
        (torch.int16, -30000, -20000),
        (torch.int8, -100, -90),
        (torch.uint8, 200, 255),
        (torch.int32, -(10**9), -(10**8)),
    ):
        x = torch.randint(low, high, (3, 7), dtype=dtype)
        same(make(Extrema(), (x,))(x.numpy()), Extrema()(x))

"""Loop kernels over bfloat16 and float32 in any mix, in every form and layout, on every kind of CPU target."""

import pytest
import torch
from torch import nn
from torch.nn import functional

TARGETS = pytest.mark.parametrize("target", ["cpu:x86-64-v3", "cpu:x86-64-v4", "cpu"])
BF16, F32 = torch.bfloat16, torch.float32


def values(*shape, seed, dtype=BF16):
    """Numbers that bfloat16 has, so that only the arithmetic rounds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def assert_close(model, module, inputs, tolerance=1e-2):
    """Compare with eager PyTorch, which rounds after every operator: dtypes, and errors over the largest value."""
    with torch.no_grad():
        expected = module(*inputs)
    for position, (want, have) in enumerate(zip(expected, model(*inputs), strict=True)):
        assert have.dtype.name == str(want.dtype).removeprefix("torch."), position
        got, want = torch.from_numpy(have.astype("float64")), want.double()
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
        assert got.shape == want.shape and error <= tolerance, f"output {position}: {error:.2e}"


class Forms(nn.Module):
    """Long and short runs, rows, lanes, gathers, whole sums; narrow from wide, wide from narrow, and both."""

    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(77), nn.RMSNorm(77, dtype=BF16)
        self.table = nn.Embedding(9, 77, dtype=BF16)

    def forward(self, x, wide, image, ids):
        normed = self.norm(wide)
        return (
            (x * 2 + wide).to(BF16), x.float() - wide, torch.cat([x, wide.to(BF16)], 1).relu(), wide.to(BF16),
            x.transpose(1, 2) + 1, x[:, ::2, 3:] * 2, functional.gelu(x), normed.to(BF16), normed + 1, self.rms(x),
            x.softmax(-1), wide.softmax(-1).to(BF16), x.float().mean(1), x.sum(-1), wide.amax(1).to(BF16),
            functional.max_pool2d(image, 3, 2, 1), functional.avg_pool2d(image.float(), 2).to(BF16),
            image.mean((2, 3)), self.table(ids) * 2, functional.interpolate(image, scale_factor=2), x[:, :, 0] > 0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "passes"),
    [("cpu:x86-64-v3", False), ("cpu:x86-64-v3", True), ("cpu:x86-64-v4", True), ("cpu", True)],
)
def test_any_mix_of_types(target, passes, compiled):
    """Every operator is a kernel of its own once: how a target converts does not depend on what a kernel holds."""
    batch = torch.export.Dim("batch", max=8)
    inputs = (
        values(3, 13, 77, seed=0), values(3, 13, 77, seed=1, dtype=F32), values(3, 21, 9, 11, seed=2),
        torch.tensor([[1, 8, 0], [2, 2, 3], [4, 5, 6]]),
    )  # fmt: skip
    module = Forms()
    with torch.no_grad():
        module.norm.weight.normal_(), module.norm.bias.normal_(), module.rms.weight.normal_()
    model = compiled(module, inputs, ({0: batch},) * 4, target=target, passes=passes, precision="own")
    for count in (1, 3):
        assert_close(model, module, tuple(tensor[:count] for tensor in inputs))


class Stretched(nn.Module):
    """Chunks of a long axis, and of one whose length varies."""

    def forward(self, x, wide):
        return (x + wide).to(BF16), (wide.t() * 2).to(BF16), x.float() * wide, x.t().relu()


@TARGETS
def test_runs_end_anywhere(target, compiled):
    length = torch.export.Dim("length", min=1, max=20000)
    inputs = values(2, 5000, seed=3), values(2, 5000, seed=4, dtype=F32)
    model = compiled(Stretched(), inputs, ({1: length},) * 2, target=target, precision="own")
    for count in (1, 15, 64, 95, 256, 257, 4096 + 255, 8192, 9001):
        inputs = values(2, count, seed=count), values(2, count, seed=5, dtype=F32)
        assert_close(model, Stretched(), inputs)


@TARGETS
def test_rows_of_two_chunks(target, compiled):
    """The shortest rows of fixed length that are shared out between threads."""
    inputs = values(3, 8192, seed=6), values(3, 8192, seed=7, dtype=F32)
    assert_close(compiled(Stretched(), inputs, target=target, precision="own"), Stretched(), inputs)


class Blocked(nn.Module):
    """Images in blocks of channels, the last one not full: residual sums, pooling, scales, and rows of what is left."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(20, 37, 1), nn.Conv2d(37, 37, 1)

    def forward(self, x):
        y = self.first(x)
        z = self.second(functional.max_pool2d(y, 3, 1, 1) + y)
        return (z * z.mean((2, 3), keepdim=True).sigmoid() + y).flatten(1), z.amax((2, 3))


@TARGETS
def test_blocks_of_channels(target, compiled):
    torch.manual_seed(0)
    module, x = Blocked(), values(2, 20, 9, 7, seed=6, dtype=F32)
    assert_close(compiled(module, (x,), target=target, precision="bf16"), module, (x,), 2e-2)


class Special(nn.Module):
    def forward(self, x):
        return x.to(BF16), (x + 0).to(BF16)


@TARGETS
def test_special_numbers_survive(target, compiled):
    """NaN, infinities, ties to even, the largest numbers; AVX-512 BF16 takes subnormal numbers as zeros."""
    row = [float("nan"), float("inf"), -float("inf"), -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4e38, 1e-30]
    x = torch.tensor([row * 5])
    expected = x.to(BF16)
    for got in compiled(Special(), (x,), target=target, precision="own")(x):
        got = torch.from_numpy(got.view("uint16").copy()).view(BF16)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7.0, posinf=8.0), expected.nan_to_num(7.0, posinf=8.0))
        assert torch.equal(got.signbit() & ~got.isnan(), expected.signbit() & ~expected.isnan())

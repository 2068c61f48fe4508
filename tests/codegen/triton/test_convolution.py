"""The convolution family of the Triton dialect, from modules to numbers: interpreted, against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from tilewright.codegen.triton.convolution import convolution_family
from tilewright.codegen.triton.loops import loop_family
from tilewright.passes.verify import TOLERANCES, error_of
from tilewright.runtime.errors import CompileError, UnsupportedOperator

SEED = 20
LIMIT = {torch.float32: 1e-5, torch.float16: TOLERANCES[torch.float16], torch.bfloat16: TOLERANCES[torch.bfloat16]}
HALVES = (torch.float16, torch.bfloat16)
FAMILIES = {"convolution": convolution_family, "loop": loop_family}


class Layers(nn.Module):
    """Layers one after the other; callables that are no modules are called too."""

    def __init__(self, *layers: Callable) -> None:
        super().__init__()
        self.layers = layers
        self.modules_ = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def convolved(lowered):
    """``convolved(module, *inputs, shapes=None)``: all passes for a GPU, then kernels."""

    def make(module: nn.Module, *inputs: torch.Tensor, shapes=None):
        return lowered(module.eval(), inputs, shapes, passes=True, families=FAMILIES)

    return make


def given(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)


def agree(kernels, module: nn.Module, *inputs: torch.Tensor, tiles: int = 2) -> None:
    """Compare with the module in double precision, for every tile."""
    dtype = inputs[0].dtype
    want = module.double()(*(one.double() for one in inputs))
    module.to(dtype)
    for tile in range(tiles):
        (got,) = kernels(*inputs, tile=tile)
        assert got.shape == want.shape and got.dtype == dtype
        error = error_of(want, got.double())
        assert error <= LIMIT[dtype], f"tile {tile}, seed {SEED}: error {error:.3g}"


def templates(kernels) -> list[str]:
    """Which template each convolution came from, in the order of the plan."""
    marks = {"inside_tap": "rows >>", "depthwise": "weight = tl.load", "gathered": "iw = left[:, None]"}
    found = []
    for step in kernels.plan.steps:
        if step.family == "convolution":
            text = kernels.kernels[step.variants[-1].kernel].text
            found.append(next((name for name, mark in marks.items() if mark in text), "direct"))
    return ["direct" if name == "inside_tap" else name for name in found]


DIRECT = [
    # module, input
    (nn.Conv2d(16, 17, 3, padding=1), (2, 16, 5, 7)),
    (nn.Conv2d(37, 5, 3, stride=2, padding=1, bias=False), (1, 37, 9, 6)),
    (nn.Conv2d(24, 24, 1), (3, 24, 5, 3)),
    (nn.Conv2d(64, 16, 1, stride=2), (1, 64, 7, 5)),
    (nn.Conv2d(16, 8, (3, 2), padding="same", dilation=2), (1, 16, 6, 7)),
    (nn.Conv2d(20, 3, (1, 5), stride=(2, 1), padding="valid"), (2, 20, 4, 9)),
    (nn.Conv2d(32, 34, 3, padding=(0, 1), groups=2), (1, 32, 5, 4)),
    (nn.Conv2d(16, 16, 1, padding=1), (1, 16, 3, 3)),
    (nn.Conv2d(16, 4, 3, padding=4, dilation=3), (1, 16, 5, 5)),
]
ROWS = [
    (nn.Conv2d(3, 20, 8, stride=8), (2, 3, 17, 24)),
    (nn.Conv2d(3, 9, (3, 7), stride=2, padding=(1, 0), dilation=(2, 1)), (1, 3, 9, 17)),
]
GATHERED = [
    (nn.Conv2d(3, 37, 7, stride=2, padding=3), (2, 3, 13, 11)),
    (nn.Conv2d(5, 3, 3), (1, 5, 5, 6)),
    (nn.Conv2d(1, 1, 1), (1, 1, 3, 3)),
    (nn.Conv2d(3, 20, 4, stride=4), (2, 3, 8, 12)),
    (nn.Conv2d(3, 8, (2, 3), padding="same", dilation=(1, 2)), (1, 3, 5, 7)),
    (nn.Conv2d(12, 10, 3, padding=1, groups=2), (1, 12, 5, 4)),
    (nn.Conv1d(5, 7, 3, padding=1), (2, 5, 9)),
    (nn.Conv1d(40, 17, 5, stride=3, groups=1), (1, 40, 11)),
    (nn.Conv1d(8, 8, 3, padding="same", dilation=2, groups=2), (1, 8, 9)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 4, 3)),
    (nn.ConvTranspose2d(17, 3, (2, 5), stride=(1, 3), dilation=(2, 1)), (1, 17, 3, 4)),
    (nn.ConvTranspose1d(4, 5, 5, stride=3, padding=2), (2, 4, 5)),
]
DEPTHWISE = [
    (nn.Conv2d(24, 24, 3, padding=1, groups=24), (2, 24, 5, 7)),
    (nn.Conv2d(17, 17, 5, stride=2, padding=2, groups=17, bias=False), (1, 17, 9, 8)),
    (nn.Conv2d(5, 10, 3, padding="same", groups=5), (1, 5, 4, 5)),
    (nn.Conv2d(72, 72, 3, dilation=2, groups=72), (1, 72, 7, 6)),
    (nn.Conv1d(6, 6, 4, groups=6), (2, 6, 9)),
    (nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, groups=16), (1, 16, 4, 4)),
]


@pytest.mark.parametrize(("module", "shape"), DIRECT, ids=str)
def test_direct(convolved, module, shape):
    kernels = convolved(module, given(*shape))
    assert templates(kernels) == ["direct"]
    agree(kernels, module, given(*shape))


@pytest.mark.parametrize(("module", "shape"), ROWS, ids=str)
def test_rows_of_taps_in_one_run(convolved, module, shape):
    """Of an image in channels_last, as a kernel before the convolution leaves it."""
    layers = Layers(nn.ReLU(), module)
    kernels = convolved(layers, given(*shape))
    assert templates(kernels) == ["direct"]
    agree(kernels, layers, given(*shape))


@pytest.mark.parametrize(("module", "shape"), GATHERED, ids=str)
def test_gathered(convolved, module, shape):
    kernels = convolved(module, given(*shape))
    assert set(templates(kernels)) == {"gathered"}
    agree(kernels, module, given(*shape))


@pytest.mark.parametrize(("module", "shape"), DEPTHWISE, ids=str)
def test_depthwise(convolved, module, shape):
    kernels = convolved(module, given(*shape))
    assert set(templates(kernels)) == {"depthwise"}
    agree(kernels, module, given(*shape))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("module", "shape"), [DIRECT[0], DIRECT[2], GATHERED[0], GATHERED[9], DEPTHWISE[0]], ids=str)
def test_half_precision(convolved, module, shape, dtype):
    module = module.to(dtype)
    kernels = convolved(module, given(*shape, dtype=dtype))
    agree(kernels, module, given(*shape, dtype=dtype), tiles=1)
    assert {item.dtype.name for item in kernels.constants} == {str(dtype).removeprefix("torch.")}
    module.float()


@pytest.mark.parametrize(
    ("module", "shape"), [(DIRECT[0][0], (16, 5, 7)), (DEPTHWISE[0][0], (24, 5, 4)), (GATHERED[6][0], (5, 9))], ids=str
)
def test_without_a_batch(convolved, module, shape):
    agree(convolved(module, given(*shape)), module, given(*shape))


@pytest.mark.parametrize(("module", "shape"), [DIRECT[0], DIRECT[2], GATHERED[0], DEPTHWISE[0]], ids=str)
def test_any_batch(convolved, module, shape):
    """One kernel for every batch, or one for few pixels and one for many."""
    kernels = convolved(module, given(2, *shape[1:]), shapes=({0: Dim("batch", max=4096)},))
    for batch in (1, 3):
        agree(kernels, module, given(batch, *shape[1:]))


@pytest.mark.parametrize(("module", "shape"), [DIRECT[0], GATHERED[9], DEPTHWISE[0]], ids=str)
def test_wide_indices(convolved, compile_cubin, module, shape):
    """More elements than 32 bits count."""
    kernels = convolved(module, given(2, *shape[1:]), shapes=({0: Dim("batch", max=2**26)},))
    agree(kernels, module, given(2, *shape[1:]), tiles=1)
    kernel = next(kernel for kernel in kernels.kernels.values() if kernel.family == "convolution")
    assert kernel.signature[-1] == "i64" and "tl.int64" in kernel.text
    compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0], "sm_90")


def test_any_image_size(convolved):
    module = Layers(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 5, 3, padding=1))
    kernels = convolved(module, given(1, 3, 8, 8), shapes=({2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)},))
    for h, w in ((4, 9), (7, 5)):
        agree(kernels, module, given(1, 3, h, w), tiles=1)


def test_terms_are_split_between_programs(convolved):
    """Few pixels and many terms: the sums of several programs are joined, and the counters are zero again."""
    module = nn.Conv2d(64, 20, 3, padding=1)
    kernels = convolved(module, given(1, 64, 4, 3))
    (step,) = [step for step in kernels.plan.steps if step.family == "convolution"]
    splits = [tile.values()["SPLIT_K"] for tile in step.variants[0].tiles]
    assert max(splits) > 1
    assert [ref.kind for ref in step.variants[0].operands].count("counters") == 1
    agree(kernels, module, given(1, 64, 4, 3), tiles=len(splits))


@pytest.mark.parametrize(
    "after",
    [
        torch.relu,
        functional.hardswish,
        lambda y: y + 2 * y.sigmoid(),
        lambda y: (y * y.mean((2, 3), keepdim=True).sigmoid()).relu(),
        lambda y: functional.max_pool2d(y, 2),
    ],
    ids=["relu", "hardswish", "swish", "squeeze", "pool"],
)
def test_what_follows(convolved, after):
    module = Layers(
        nn.Conv2d(3, 20, 3, padding=1), after, nn.Conv2d(20, 6, 3), after if after is torch.relu else nn.ReLU()
    )
    agree(convolved(module, given(2, 3, 7, 6)), module, given(2, 3, 7, 6), tiles=1)


class Residual(nn.Module):
    """Sums of results in channels_last, a stride in the shortcut, a depthwise convolution between two dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.first, self.second = nn.Conv2d(16, 24, 3, 2, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.third, self.down = nn.Conv2d(24, 24, 1), nn.Conv2d(16, 24, 1, 2)
        self.norm = nn.BatchNorm2d(24)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.third(functional.hardswish(self.second(self.norm(self.first(x)))))
        return (y + self.down(x)).relu().mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_block(convolved, dtype):
    """From rows to channels_last and back, without a copy."""
    torch.manual_seed(SEED)
    module = Residual().to(dtype)
    image = given(2, 3, 11, 9, dtype=dtype)
    kernels = convolved(module, image)
    assert sorted(templates(kernels)) == ["depthwise", "direct", "direct", "direct", "gathered"]
    assert {buffer.layout for buffer in kernels.plan.buffers if len(buffer.shape) == 4} == {"channels_last"}
    agree(kernels, module, image, tiles=1)


def test_padded_before(convolved):
    """A view of the image belongs to the kernel: outside of the padding's source nothing is read."""
    module = Layers(lambda x: functional.pad(x, (1, 2, 0, 1), value=3.0), nn.Conv2d(3, 8, 3, padding=1))
    agree(convolved(module, given(1, 3, 5, 4)), module, given(1, 3, 5, 4), tiles=1)


def test_refusals(convolved):
    with pytest.raises(UnsupportedOperator, match="convolutions in 3 dimensions cannot be compiled"):
        convolved(nn.Conv3d(2, 3, 2), given(1, 2, 4, 4, 4))
    with pytest.raises(CompileError, match="convolutions compute in float32, not torch.float64"):
        convolved(nn.Conv2d(2, 3, 2).double(), given(1, 2, 4, 4).double())

    class Dynamic(nn.Module):
        def forward(self, x, w):
            return functional.conv2d(x, w)

    with pytest.raises(CompileError, match="whose weight is not a constant"):
        convolved(Dynamic(), given(1, 2, 4, 4), given(3, 2, 2, 2))


# -- binaries ----------------------------------------------------------------------------------------------------------

TYPICAL = {
    "resnet stem": (nn.Conv2d(3, 64, 7, 2, 3), (3, 224, 224)),
    "resnet 3x3": (nn.Conv2d(128, 128, 3, padding=1), (128, 28, 28)),
    "resnet 1x1": (nn.Conv2d(256, 64, 1), (256, 56, 56)),
    "resnet last": (nn.Conv2d(512, 512, 3, padding=1), (512, 7, 7)),
    "mobilenet 1x1": (nn.Conv2d(24, 72, 1), (24, 56, 56)),
    "mobilenet depthwise": (nn.Conv2d(72, 72, 5, 2, 2, groups=72), (72, 56, 56)),
    "vit patches": (nn.Conv2d(3, 768, 16, 16), (3, 224, 224)),
}


BINARIES = [(name, torch.bfloat16) for name in TYPICAL] + [(name, torch.float32) for name in list(TYPICAL)[:2]]


@pytest.mark.parametrize(("name", "dtype"), BINARIES, ids=str)
def test_binaries(convolved, compile_cubin, name, dtype):
    """The default tile of typical layers compiles without spills, with shared memory that every GPU has."""
    module, shape = TYPICAL[name]
    kernels = convolved(Layers(module.to(dtype), torch.relu), given(8, *shape, dtype=dtype))
    module.float()
    kernel = next(kernel for kernel in kernels.kernels.values() if kernel.family == "convolution")
    for arch in ("sm_80", "sm_90"):
        compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0], arch)
        compiled = compile_cubin(kernel.text, kernel.name, kernel.signature, kernel.tiles[0], arch)
        assert compiled.shared + compiled.static_shared <= 99 * 1024


@pytest.mark.parametrize("before", [[], [nn.ReLU()]], ids=["rows", "channels_last"])
def test_patches_are_copied_16_bytes_at_a_time(convolved, compile_cubin, before):
    """Neither layout of the image leaves a load that is not asynchronous in the loop."""
    module = Layers(*before, nn.Conv2d(3, 64, 16, stride=16).half())
    kernels = convolved(module, given(2, 3, 64, 64, dtype=torch.float16))
    (kernel,) = (kernel for kernel in kernels.kernels.values() if kernel.name.startswith("convolution"))
    ptx = compile_cubin(kernel.text, kernel.name, kernel.signature, kernel.tiles[0], "sm_90").ptx
    assert "cp.async.cg.shared.global" in ptx and "cp.async.ca" not in ptx
    assert "ld.global" not in ptx[: ptx.rindex("cp.async.cg.shared.global")]

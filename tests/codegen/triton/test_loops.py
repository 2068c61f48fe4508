"""Forms of loop kernels in Triton: rows, chunks, windows, gathers; dtypes, NaN, faults, wide indices, cubins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tilewright.passes.verify import TOLERANCES

SEED = 11
BATCH, SEQ, LONG = Dim("batch", max=64), Dim("seq", max=512), Dim("length", max=200_000)
INF, NAN = float("inf"), float("nan")


def module_of(function, arguments=1):
    """A module that calls a function of tensors."""
    forward = {
        1: lambda self, x: function(x),
        2: lambda self, x, y: function(x, y),
        3: lambda self, x, y, z: function(x, y, z),
    }[arguments]
    return type("Module", (nn.Module,), {"forward": forward})()


@pytest.fixture
def agrees(lowered):
    """Lower a function with all passes and compare it with PyTorch at several inputs."""

    def run(function, inputs, shapes=None, tolerance=1e-5, tiles=1):
        module = module_of(function, len(inputs[0]))
        model = lowered(module, inputs[0], shapes, passes=True)
        for tensors in inputs:
            expected = module(*tensors)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for tile in range(tiles):
                for want, have in zip(expected, model(*tensors, tile=tile), strict=True):
                    assert (want.shape, want.dtype) == (have.shape, have.dtype)
                    want, have = want.double(), have.double()
                    np.testing.assert_array_equal(have.isnan(), want.isnan(), err_msg=f"seed {SEED}")
                    finite = want.isfinite()
                    assert (have[~finite] == want[~finite])[~want[~finite].isnan()].all()
                    if not finite.any():
                        continue
                    error = (have - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1e-30)
                    assert error <= tolerance, f"seed {SEED}, tile {tile}: {error:.2e}"
        return model

    torch.manual_seed(SEED)
    return run


def source(model, number=0):
    return list(model.kernels.values())[number].text


# -- forms -------------------------------------------------------------------------------------------------------------


def test_one_kernel_for_all_sizes(agrees):
    inputs = [(torch.randn(b, s, 40),) for b, s in ((3, 7), (1, 1), (64, 2), (1, 512))]
    model = agrees(lambda x: torch.softmax(x * 2, -1) + 1, inputs, ({0: BATCH, 1: SEQ},), tiles=2)
    assert len(model.kernels) == 1
    assert source(model).count("tl.load") == 1  # a whole row is read once


@pytest.mark.parametrize("length", [5, 2048, 8193])
def test_rows_that_are_one_block_and_that_are_not(agrees, length):
    model = agrees(lambda x: F.layer_norm(x, x.shape[-1:]) * x.amax(-1, keepdim=True), [(torch.randn(3, length),)])
    assert ("for " in source(model)) == (length > 8192)


def test_rows_of_varying_length(agrees):
    function = lambda x: (torch.softmax(x, -1), F.layer_norm(x, x.shape[-1:]))  # noqa: E731
    agrees(function, [(torch.randn(2, n),) for n in (40, 1, 5000)], ({1: LONG},), tiles=2)
    model = agrees(lambda x: x.std(-1), [(torch.randn(2, n),) for n in (40, 2, 512)], ({1: SEQ},), tiles=3)
    guards = [tile.guard for tile in model.plan.steps[0].variants[0].tiles]
    assert guards[0] == 1 and guards[-1] != 1  # short rows may take a smaller block


def test_long_sums_keep_their_digits(agrees):
    agrees(lambda x: (x.sum(-1), x.mean()), [(torch.rand(2, 300_001) + 1000,)], tolerance=1e-6)


@pytest.mark.parametrize("dims", [0, 1, (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_axes_that_are_not_the_innermost(agrees, dims):
    inputs = [(torch.randn(b, 70, 11),) for b in (3, 1, 64)]
    agrees(lambda x: (x * x).sum(dims), inputs, ({0: BATCH},), tiles=2)
    agrees(lambda x: x - x.mean(dims, keepdim=True), inputs, ({0: BATCH},))


def test_group_norm_reads_a_group_once(agrees):
    inputs = [(torch.randn(b, 24, 5, 7), torch.randn(24), torch.randn(24)) for b in (2, 1)]
    model = agrees(lambda x, w, b: F.group_norm(x, 4, w, b), inputs, ({0: BATCH}, None, None))
    assert source(model).count("tl.load(x0") == 1


def test_a_norm_that_transposes(agrees):
    inputs = [(torch.randn(b, 20, 6, 3),) for b in (2, 1)]
    model = agrees(lambda x: F.layer_norm(x.flatten(2).transpose(1, 2), (20,)), inputs, ({0: BATCH},))
    assert source(model).count("tl.load(x0") == 1


def test_a_reduction_inside_another(agrees):
    agrees(lambda x: torch.softmax(x, -1).mean(0), [(torch.randn(5, 33),)])
    agrees(lambda x: (x - x.mean(1, keepdim=True)).amax((0, 2)), [(torch.randn(5, 33, 4),)])


def test_windows_inside_a_norm(agrees):
    agrees(lambda x: F.softmax(F.avg_pool1d(x, 3, 2), -1), [(torch.randn(2, 4, 31),)])
    agrees(lambda x: F.relu(F.max_pool2d(x * 2, 3, 2, 1)), [(torch.randn(2, 4, 9, 11),)])
    agrees(lambda x: F.adaptive_avg_pool2d(x, (3, 4)), [(torch.randn(2, 4, 9, 11),)])


def test_transposes_are_tiled(agrees):
    inputs = [(torch.randn(b, s, 40),) for b, s in ((3, 70), (1, 1), (2, 33))]
    model = agrees(lambda x: x.transpose(1, 2) * 2 + 1, inputs, ({0: BATCH, 1: SEQ},), tiles=3)
    assert "YBLOCK" in source(model)
    inputs = [(torch.randn(2, 9, 12, 3, 10), torch.randn(2, 10, 3, 12))]
    model = agrees(lambda x, y: x[:, 1:].permute(0, 1, 4, 3, 2) + y[:, None], inputs, tiles=3)
    assert "YBLOCK" in source(model)


@pytest.mark.parametrize("channels", [3, 20])
def test_images_with_channels_last(lowered, channels):
    """Written in one layout and read in the other, normalised, reduced over space and over channels."""
    torch.manual_seed(SEED)
    module = module_of(lambda x: (F.group_norm(x * 2, 1), (x * 3).mean((2, 3)), (x * 4).sum(1), torch.softmax(x, 1)))
    model = lowered(module, (torch.randn(2, channels, 9, 11),), ({0: BATCH},), images="channels_last")
    assert any(buffer.layout == "channels_last" for buffer in model.plan.buffers)
    for batch in (1, 3):
        x = torch.randn(batch, channels, 9, 11)
        for want, have in zip(module(x), model(x), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5, msg=f"seed {SEED}")


def test_a_scalar_and_nothing(agrees):
    agrees(lambda x: (x.sum(), x.mean(0)), [(torch.randn(4, 3),)])
    agrees(
        lambda x: (x + 1, x.sum(-1), x.sum(0)), [(torch.randn(n, 3),) for n in (2, 0)], ({0: Dim("n", min=0, max=9)},)
    )


def test_results_of_one_shape_share_a_kernel(agrees):
    model = agrees(lambda x: (x * 2, (x * 2).exp()), [(torch.randn(5, 33),)])
    assert len(model.kernels) == 1


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(agrees, dtype):
    inputs = [(torch.randn(b, 40).to(dtype), torch.randn(40).to(dtype)) for b in (3, 1)]
    function = lambda x, w: (F.gelu(x + w), torch.softmax(x, -1), F.rms_norm(x, (40,), w), x.sum(0), (x * w).float())  # noqa: E731
    agrees(function, inputs, ({0: BATCH}, None), tolerance=TOLERANCES[dtype])


def test_other_dtypes(agrees):
    x, i = torch.randn(5, 33, dtype=torch.float64), torch.randint(-(2**40), 2**40, (5, 33))
    function = lambda x, i: (  # noqa: E731
        torch.softmax(x * 0.1, -1), x.exp() + 1e-9, i.sum(-1), i * 3 + 2**33, i.amax(0), (x > 0.1).any(-1), x.int() + 1,
        (x > 0), torch.where(x > 0, 2**40, 7), (x > 0).sum(-1), i.to(torch.int8), (i % 200).to(torch.uint8), i // 7,
    )  # fmt: skip
    agrees(function, [(x, i)], tolerance=1e-14)


def test_bools(agrees, compile_cubin):
    a = torch.rand(6, 40) > 0.5
    function = lambda a, b: (  # noqa: E731
        a + b, a * b, a > b, a <= b, a == b, torch.maximum(a, b), torch.minimum(a, b), a.amax(-1), a.amin(0), a.sum(0),
        a.any(-1), a.all(), torch.where(a, b, ~b), a.float() + b, a.to(torch.uint8) + b,
    )  # fmt: skip
    model = agrees(function, [(a, a.flip(0).roll(1, 1))])
    comparisons = [kernel.text for kernel in model.kernels.values() if " > " in kernel.text]
    assert comparisons and all("tl.cast(" in text for text in comparisons)  # one bit that is set is below 0
    for kernel in model.kernels.values():
        compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0], "sm_80")


def test_nan_and_infinities(agrees):
    x = torch.randn(6, 40)
    x[0, 3] = x[0, 7] = NAN
    x[1, 30] = INF
    x[2] = -INF
    x[3, 5:9] = 9.0
    function = lambda x: (  # noqa: E731
        x.amax(-1), x.amin(-1), x.argmax(-1), x.argmin(-1), x.sum(-1), x.amax(0), x.argmax(0), x.clamp(-1, 1),
        F.relu(x), torch.maximum(x, x.flip(0)),
    )  # fmt: skip
    agrees(function, [(x,)])
    agrees(lambda x: (x.argmax(-1), x.argmin(-1), x.amax(-1)), [(x.repeat(1, 250),)])  # in chunks


# -- indices -----------------------------------------------------------------------------------------------------------


def test_an_index_out_of_range_sets_the_fault(lowered):
    module = module_of(lambda ids, table: F.embedding(ids, table) + 1, 2)
    table = torch.randn(10, 5)
    model = lowered(module, (torch.tensor([[1, 9, 0]]), table), ({0: BATCH}, None), passes=True)
    assert model.plan.steps[0].variants[0].operands[-1].kind == "fault"
    good = torch.tensor([[1, 9, 3], [0, 0, 9]])
    torch.testing.assert_close(model(good, table)[0], module(good, table))
    assert model.faults == 0
    for bad in (10, -11, 2**40):
        model(torch.tensor([[1, bad, 0]]), table)
        assert model.faults == 1


def test_large_buffers_take_wide_indices(lowered):
    """Not run: 3 billion elements. All that is multiplied must be of 64 bits."""
    module = module_of(lambda x: (x + 1, x.sum(1)))
    model = lowered(module, (torch.randn(2, 3, 50_000),), ({0: BATCH, 1: Dim("long", max=2000)},))
    for kernel in model.kernels.values():
        assert kernel.signature[-1] == "i64"
        assert "tl.program_id(0).to(tl.int64)" in kernel.text
    assert "+ tl.arange(0, RBLOCK)[None, :]).to(tl.int64)" in source(model, 1)
    small = lowered(module, (torch.randn(2, 3, 50),), ({0: BATCH, 1: Dim("long", max=1000)},))
    assert {kernel.signature[-1] for kernel in small.kernels.values()} == {"i32"}


# -- binaries ----------------------------------------------------------------------------------------------------------

KERNELS = {
    "softmax": (lambda x: torch.softmax(x, -1), [(3, 4096)], ({0: BATCH},)),
    "long softmax": (lambda x: torch.softmax(x, -1), [(3, 50257)], ({0: BATCH},)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (768,), w, b), [(3, 768), (768,), (768,)], ({0: BATCH}, None, None)),
    "gelu": (lambda x, w: F.gelu(x + w) * 2, [(3, 768), (768,)], ({0: BATCH}, None)),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(3, 64, 28, 28)], ({0: BATCH},)),
    "transpose": (lambda x: x.transpose(1, 2) * 2, [(3, 70, 40)], ({0: BATCH},)),
    "mean": (lambda x: x.mean(1), [(3, 512, 96)], ({0: BATCH},)),
    "argmax": (lambda x: x.argmax(-1), [(3, 1000)], ({0: BATCH},)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(lowered, compile_cubin, name, dtype):
    function, shapes, dynamic = KERNELS[name]
    inputs = tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)
    model = lowered(module_of(function, len(shapes)), inputs, dynamic, passes=True)
    for kernel in model.kernels.values():
        for tile in kernel.tiles if name in ("softmax", "layer norm") else kernel.tiles[:1]:
            compile_cubin.good(kernel.text, kernel.name, kernel.signature, tile)

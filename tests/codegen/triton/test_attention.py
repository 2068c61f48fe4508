"""The attention family of the Triton dialect, interpreted, against PyTorch in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tilewright.codegen.kernel_table import KernelSource, KernelTable
from tilewright.codegen.lower import lower
from tilewright.codegen.storage import ConstantTable
from tilewright.codegen.triton.attention import attention_family
from tilewright.codegen.triton.attention_tiles import LEAST_SPLIT, MOST_KEYS, decode_tiles, tiles
from tilewright.compiler.capture import capture
from tilewright.passes.graph.regions import Region, outline
from tilewright.passes.verify import TOLERANCES, error_of
from tilewright.runtime import sizes
from tilewright.runtime.errors import CompileError
from tilewright.runtime.plan import COUNTERS

NUMPY = {torch.bfloat16: ml_dtypes.bfloat16}
LIMIT = {torch.float32: 1e-5, torch.float16: TOLERANCES[torch.float16], torch.bfloat16: TOLERANCES[torch.bfloat16]}
HALVES = (torch.float16, torch.bfloat16)


class Attend(nn.Module):
    """Attention alone; a mask is the fourth input."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return functional.scaled_dot_product_attention(q, k, v, mask, **self.options)


@dataclass
class Lowered:
    """One attention kernel, its plan, and the interpreter to run it in."""

    interpret: Callable
    step: object
    kernels: dict[str, KernelSource]
    lowered: object
    used: list[str] = field(default_factory=list)

    def __call__(self, *inputs: torch.Tensor, tile: int = 0, variant: int | None = None) -> torch.Tensor:
        """The result, of the variant that the guards choose or of a given one."""
        symbols = {
            symbol.name: inputs[symbol.input].shape[symbol.axis] // symbol.factor
            for symbol in self.lowered.draft.symbols
        }
        number = next(n for n, item in enumerate(self.step.variants) if sizes.evaluate(item.guard, symbols))
        chosen = self.step.variants[number if variant is None else variant]
        binary = chosen.tiles[tile % len(chosen.tiles)]
        arrays = [self._array(ref, inputs, symbols) for ref in chosen.operands]
        values = [sizes.evaluate(size, symbols) for size in chosen.sizes]
        grid = sizes.evaluate(chosen.units, {**symbols, **binary.values()})
        kernel = self.kernels[chosen.kernel]
        width = kernel.signature[-1] if values else "i64"
        after = self.interpret(kernel.text, kernel.name, arrays, values, binary.values(), grid, width)
        for ref, array in zip(chosen.operands, after, strict=True):
            assert ref.kind != "counters" or not array.any(), "counters are left as they were found"
        self.used.append(chosen.kernel)
        return to_torch(after[self.step.writes[0]])

    def _array(self, ref, inputs: Sequence[torch.Tensor], symbols) -> np.ndarray:
        if ref.kind == "input":
            return to_numpy(inputs[ref.index])
        if ref.kind == "counters":
            return np.zeros(COUNTERS, np.int32)
        port = (self.lowered.draft.outputs if ref.kind == "output" else self.lowered.draft.buffers)[ref.index]
        shape = [sizes.evaluate(extent, symbols) for extent in port.shape]
        dtype = ml_dtypes.bfloat16 if port.dtype == "bfloat16" else port.dtype
        return np.full(shape, np.nan, dtype)  # what is not written shows


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture
def attention(interpret):
    """``attention(module, *inputs, shapes=None)``: the module as one region, lowered."""

    def make(module: nn.Module, *inputs: torch.Tensor, shapes=None) -> Lowered:
        program = capture("main", module.eval(), inputs, shapes=shapes)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        outline(program.module, calls, Region("kernel", "attention"), "region")
        program.module.recompile()
        kernels = KernelTable()
        lowered = lower(program, kernels, ConstantTable(), {"attention": attention_family})
        return Lowered(interpret, lowered.draft.steps[0], {kernel.name: kernel for kernel in kernels.kernels}, lowered)

    return make


def inputs(b, h, hk, sq, sk, d, dv, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check(got: torch.Tensor, module: nn.Module, *given: torch.Tensor) -> None:
    """Compare with the module in double precision."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    want = module(*wide)
    assert got.shape == want.shape
    error = error_of(want, got.double())
    assert error <= LIMIT[given[0].dtype], f"error {error:.3g}"


SHAPES = [
    # b, heads, key heads, sq, sk, d, dv
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 16, 16),
    (1, 2, 2, 129, 17, 40, 40),
    (1, 4, 2, 97, 129, 64, 64),
    (2, 2, 1, 17, 150, 80, 96),
    (1, 2, 2, 33, 128, 128, 70),
    (1, 1, 1, 20, 65, 256, 256),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(attention, shape, causal):
    given = inputs(*shape)
    module = Attend(is_causal=causal, enable_gqa=shape[1] != shape[2])
    lowered = attention(module, *given)
    for tile in range(2):
        check(lowered(*given, tile=tile), module, *given)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1, 33, 70, 64, 64), (1, 1, 1, 17, 129, 80, 40)], ids=str)
def test_half_precision(attention, shape, dtype):
    given = inputs(*shape, dtype=dtype)
    for module in (Attend(enable_gqa=True), Attend(enable_gqa=True, is_causal=True)):
        check(attention(module, *given)(*given), module, *given)


def test_masks(attention):
    """Added or boolean, dense or one row of keys; rows that see nothing give zeros."""
    q, k, v = inputs(2, 3, 3, 33, 70, 16, 16)
    generator = torch.Generator().manual_seed(1)
    added = torch.randn(2, 3, 33, 70, generator=generator) * 3
    added[torch.rand(added.shape, generator=generator) < 0.3] = -torch.inf
    added[0, 1, 5] = -torch.inf
    got = attention(Attend(), q, k, v, added)(q, k, v, added)
    check(got, Attend(), q, k, v, added)
    assert (got[0, 1, 5] == 0).all()

    allowed = torch.rand(2, 1, 33, 70, generator=generator) < 0.5
    allowed[:, :, :, :64] &= torch.rand(2, 1, 33, 1, generator=generator) < 0.8  # rows that see nothing at first
    allowed[1, 0, 7] = False
    got = attention(Attend(), q, k, v, allowed)(q, k, v, allowed)
    check(got, Attend(), q, k, v, allowed)
    assert (got[1, :, 7] == 0).all()

    padding = (torch.arange(70) < torch.tensor([[70], [41]]))[:, None, None, :]
    check(attention(Attend(), q, k, v, padding)(q, k, v, padding), Attend(), q, k, v, padding)


def test_a_mask_of_the_largest_numbers_hides_keys_but_not_all_of_them(attention):
    """Where a mask adds the most negative number everywhere, all keys count alike, as they do in PyTorch."""
    for queries, keys in ((20, 70), (2, 300)):
        q, k, v = inputs(1, 2, 2, queries, keys, 16, 16)
        mask = torch.zeros(queries, keys)
        mask[0, 3:] = mask[1] = torch.finfo(torch.float32).min
        check(attention(Attend(), q, k, v, mask)(q, k, v, mask), Attend(), q, k, v, mask)


def test_large_and_special_scores(attention):
    """Scores beyond the range of exponentials are fine; NaN and infinity spoil their own row only."""
    q, k, v = inputs(1, 1, 1, 40, 100, 32, 32)
    module = Attend(scale=100.0)
    check(attention(module, q, k, v)(q, k, v), module, q, k, v)
    mask = torch.zeros(40, 100)
    mask[3, 77], mask[20, 99], mask[30, 0] = torch.nan, torch.inf, torch.nan
    mask[31] = -torch.inf
    mask[31, 60] = torch.nan
    got = attention(Attend(), q, k, v, mask)(q, k, v, mask)
    bad = torch.tensor([3, 20, 30, 31])
    assert got[0, 0, bad].isnan().all()
    good = torch.tensor([row for row in range(40) if row not in bad])
    want = Attend()(q.double(), k.double(), v.double(), mask.double())
    assert error_of(want[:, :, good], got[:, :, good].double()) <= 1e-5


class Packed(nn.Module):
    """A head of a fused projection, and the result with its heads merged."""

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = x.view(batch, length, 3, 4, 20).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, length, 80)


def test_views_before_and_after(attention):
    """Operands are read through their views, the result is stored permuted; one kernel for all sizes."""
    x = torch.randn(2, 12, 240)
    lowered = attention(Packed(), x, shapes={"x": "batch:1..4,seq:1..300,240"})
    for batch, length in ((1, 1), (3, 17), (1, 129)):
        x = torch.randn(batch, length, 240)
        for tile in range(2):
            check(lowered(x, tile=tile), Packed(), x)


class Grouped(nn.Module):
    """Several leading axes, of which the second is split between the heads of a group."""

    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 2)], ids=str)
def test_any_leading_axes(attention, lead):
    given = [torch.randn(*lead, length, 16) for length in (9, 21, 21)]
    check(attention(Grouped(), *given)(*given), Grouped(), *given)


def test_operands_broadcast(attention):
    q, k, v = torch.randn(2, 3, 19, 16), torch.randn(1, 3, 33, 16), torch.randn(2, 1, 33, 16)
    check(attention(Grouped(), q, k, v)(q, k, v), Grouped(), q, k, v)


FEW = {"q": "batch:1..8,8,n:1..16,32", "k": "batch,2,s:1..4096,32", "v": "batch,2,s,32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_split_the_keys(attention, dtype):
    """The result is the same however many programs there are, and the counters are zero again."""
    module = Attend(enable_gqa=True)
    lowered = attention(module, *inputs(2, 8, 2, 2, 20, 32, 32, dtype), shapes=FEW)
    split, general = lowered.step.variants
    assert any(ref.kind == "counters" for ref in split.operands) and not any(
        ref.kind == "counters" for ref in general.operands
    )
    for batch, queries, keys in ((1, 1, 1), (2, 1, 700), (1, 3, 257), (2, 4, 128)):
        given = inputs(batch, 8, 2, queries, keys, 32, 32, dtype, seed=keys)
        for tile in range(2):
            check(lowered(*given, tile=tile), module, *given)
        assert lowered.used[-1] == split.kernel
    given = inputs(1, 8, 2, 5, 40, 32, 32, dtype)
    check(lowered(*given), module, *given)
    assert lowered.used[-1] == general.kernel


def test_few_queries_without_a_key_give_zeros(attention):
    """Split over keys there would be no program to write them."""
    lowered = attention(
        Attend(enable_gqa=True), *inputs(2, 8, 2, 2, 20, 32, 32), shapes=FEW | {"k": "batch,2,s:0..4096,32"}
    )
    given = inputs(1, 8, 2, 1, 0, 32, 32)
    assert (lowered(*given) == 0).all()


def test_few_queries_with_a_mask(attention):
    """The first part sees nothing, and one query sees nothing at all."""
    q, k, v = inputs(2, 3, 3, 2, 600, 40, 24)
    mask = torch.rand(2, 1, 2, 600) < 0.5
    mask[:, :, :, :300] = False
    mask[1, 0, 1] = False
    lowered = attention(Attend(), q, k, v, mask)
    assert len(lowered.step.variants) == 1
    got = lowered(q, k, v, mask)
    check(got, Attend(), q, k, v, mask)
    assert (got[1, :, 1] == 0).all()


def test_a_row_has_the_same_bits_alone_and_in_company(attention):
    shapes = {"q": "batch:1..4,2,n:1..300,16", "k": "batch,2,s:1..300,16", "v": "batch,2,s,16"}
    for options in ({}, {"is_causal": True}):
        q, k, v = inputs(2, 2, 2, 150, 90, 16, 16)
        lowered = attention(Attend(**options), q, k, v, shapes=shapes)
        whole = lowered(q, k, v, variant=-1)
        assert torch.equal(lowered(q[1:], k[1:], v[1:], variant=-1), whole[1:])
        assert torch.equal(lowered(q[:, :, :33], k, v, variant=-1), whole[:, :, :33])


def test_refuses_what_it_cannot_compute(attention):
    with pytest.raises(CompileError, match="attention computes in float32"):
        attention(Attend(), *(tensor.double() for tensor in inputs(1, 1, 1, 5, 5, 16, 16)))


SEQUENCE = {"q": "2,8,s:1..4096,{d}", "k": "2,8,s,{d}", "v": "2,8,s,{d}"}
DEFAULTS = {
    "causal 64": (64, torch.bfloat16, {"is_causal": True}, None),
    "keys 128": (128, torch.float16, {}, "2,1,1,s"),
    "dense 96": (96, torch.bfloat16, {}, "s,s"),
    "float32 80": (80, torch.float32, {"is_causal": True}, None),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_tile_fits_its_architecture(attention, compile_cubin, name, arch):
    """The first tile for an architecture spills no registers there, and one tile suits the smallest GPUs."""
    d, dtype, options, mask = DEFAULTS[name]
    given = [torch.randn(2, 8, 20, d).to(dtype) for _ in range(3)]
    shapes = {key: text.format(d=d) for key, text in SEQUENCE.items()}
    if mask is not None:
        shapes["mask"] = mask
        given.append(torch.ones(2, 1, 1, 20, dtype=torch.bool) if mask[0] == "2" else torch.zeros(20, 20).to(dtype))
    lowered = attention(Attend(**options), *given, shapes=shapes)
    kernel = lowered.kernels[lowered.step.variants[-1].kernel]
    tile = next(tile for tile in kernel.tiles if arch in (tile.architectures or (arch,)))
    compile_cubin.good(kernel.text, kernel.name, kernel.signature, tile, arch)
    common = [tile for tile in kernel.tiles if not tile.architectures]
    assert any(
        compile_cubin(kernel.text, kernel.name, kernel.signature, tile, arch).shared <= 99 * 1024 for tile in common
    )


@pytest.mark.parametrize("group", [1, 8])
def test_the_default_tiles_of_split_keys_fit(attention, compile_cubin, group):
    q, k = torch.randn(2, 2 * group, 1, 128).bfloat16(), torch.randn(2, 2, 40, 128).bfloat16()
    shapes = {"q": f"2,{2 * group},1,128", "k": "2,2,s:1..8192,128", "v": "2,2,s,128"}
    lowered = attention(Attend(enable_gqa=True), q, k, k, shapes=shapes)
    kernel = lowered.kernels[lowered.step.variants[0].kernel]
    assert "counters" in kernel.text
    compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0])


def test_every_head_length_has_tiles():
    for length in range(1, 257):
        for dtype in ("float32", "float16", "bfloat16"):
            for precision, dense in (("ieee", False), ("tf32", False), ("ieee", True)):
                found = tiles(dtype, length, length, precision=precision, dense=dense)
                assert any(not tile.architectures for tile in found), "some tile is for all architectures"
                assert len({tile.name for tile in found}) == len(found) <= 4
                assert all(tile.values()["BLOCK_N"] <= MOST_KEYS for tile in found)
            assert all(tile.values()["SPLIT"] >= LEAST_SPLIT for tile in decode_tiles(dtype, length, length))

"""The matmul family of the Triton dialect, interpreted, against PyTorch in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tilewright.codegen.kernel_table import KernelTable
from tilewright.codegen.lower import lower
from tilewright.codegen.storage import ConstantTable
from tilewright.codegen.triton.matmul import matmul_family
from tilewright.compiler.capture import capture
from tilewright.passes.graph.regions import Region, outline
from tilewright.passes.verify import TOLERANCES, error_of
from tilewright.runtime import sizes
from tilewright.runtime.plan import COUNTERS

LIMIT = {torch.float32: 1e-5, torch.float16: TOLERANCES[torch.float16], torch.bfloat16: TOLERANCES[torch.bfloat16]}
HALVES = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=str)


@dataclass
class Lowered:
    """One region with a product, its plan, and the interpreter to run it in."""

    interpret: Callable
    step: object
    kernels: dict[str, object]
    lowered: object
    constants: ConstantTable
    ran: list[str] = field(default_factory=list)
    last: str = ""

    def __call__(
        self,
        *inputs: torch.Tensor,
        variant: int | None = None,
        tile: str = "",
        reverse: bool = False,
        programs: int | None = None,
    ):
        """The results of the variant that the guards choose (or a given one), in its default tile or a named one.

        Programs run in reverse order where asked; ``programs`` stands in for the tile's constant ``PROGRAMS``.
        """
        symbols = {item.name: inputs[item.input].shape[item.axis] // item.factor for item in self.lowered.draft.symbols}
        number = next(n for n, item in enumerate(self.step.variants) if sizes.evaluate(item.guard, symbols))
        chosen = self.step.variants[number if variant is None else variant]
        binary = next(item for item in chosen.tiles if item.name == tile) if tile else chosen.tiles[0]
        assert sizes.evaluate(binary.guard, symbols), f"{tile} is not for these sizes"
        arrays = [self._array(ref, inputs, symbols) for ref in chosen.operands]
        values = [sizes.evaluate(size, symbols) for size in chosen.sizes]
        constants = binary.values() if programs is None else {**binary.values(), "PROGRAMS": programs}
        grid = sizes.evaluate(chosen.units, {**symbols, **constants})
        source = self.kernels[chosen.kernel].text
        if reverse:
            source = source.replace("tl.program_id(0)", f"({grid - 1} - tl.program_id(0))")
        after = self.interpret(source, chosen.kernel, arrays, values, constants, grid)
        for ref, array in zip(chosen.operands, after, strict=True):
            assert ref.kind != "counters" or not array.any(), "counters are left as they were found"
        self.ran.append(f"{number}:{binary.name}")
        self.last = chosen.kernel
        results = [to_torch(after[place]) for place in self.step.writes]
        return results[0] if len(results) == 1 else tuple(results)

    def tiles(self, variant: int = -1) -> list[str]:
        """The names of a variant's binaries."""
        return [tile.name for tile in self.step.variants[variant].tiles]

    def source(self) -> str:
        """Of the kernel that ran last, else of the last variant's."""
        return self.kernels[self.last or self.step.variants[-1].kernel].text

    def _array(self, ref, inputs: Sequence[torch.Tensor], symbols) -> np.ndarray:
        if ref.kind == "input":
            return to_numpy(inputs[ref.index])
        if ref.kind == "counters":
            return np.zeros(COUNTERS, np.int32)
        if ref.kind == "constant":
            item = self.constants.constants[ref.index]
            array = item.load()
            return array.view(ml_dtypes.bfloat16) if item.dtype == "bfloat16" else array
        port = (self.lowered.draft.outputs if ref.kind == "output" else self.lowered.draft.buffers)[ref.index]
        shape = [sizes.evaluate(extent, symbols) for extent in port.shape]
        array = np.empty(shape, ml_dtypes.bfloat16 if port.dtype == "bfloat16" else port.dtype)
        array.reshape(-1).view(np.uint8)[:] = 255  # NaN: what is not written shows
        return array


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture
def product(interpret):
    """``product(module, *inputs, shapes=None, precision="ieee")``: the module as one region, lowered."""

    def make(module: nn.Module, *inputs: torch.Tensor, shapes=None, precision: str = "ieee") -> Lowered:
        program = capture("main", module.eval(), inputs, shapes=shapes)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        outline(program.module, calls, Region("kernel", "matmul"), "region")
        program.module.recompile()
        kernels, constants = KernelTable(), ConstantTable()
        lowered = lower(program, kernels, constants, {"matmul": matmul_family}, precision)
        (step,) = lowered.draft.steps
        return Lowered(interpret, step, {kernel.name: kernel for kernel in kernels.kernels}, lowered, constants)

    return make


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers; the seed is the test's own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got, module: nn.Module, *given: torch.Tensor) -> None:
    """Compare with the module in double precision."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(*wide)
    wanted, got = ((item if isinstance(item, tuple) else (item,)) for item in (wanted, got))
    for want, have in zip(wanted, got, strict=True):
        assert have.shape == want.shape
        error = error_of(want, have.double())
        assert error <= LIMIT[have.dtype], f"error {error:.3g}"


class Linear(nn.Module):
    """A linear layer, with GELU and a residual where asked."""

    def __init__(self, k: int, n: int, dtype: torch.dtype = torch.float32, then: str = ""):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(k, n).to(dtype)
        self.then = then

    def forward(self, x, residual=None):
        y = self.linear(x)
        if self.then == "gelu":
            y = functional.gelu(y)
        return y if residual is None else y + residual


@DTYPES
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 63, 129), (33, 129, 63), (129, 33, 40), (70, 64, 128)])
def test_linear(product, dtype, m, n, k):
    module, x = Linear(k, n, dtype), random(m, k, dtype=dtype)
    kernel = product(module, x)
    for tile in kernel.tiles() if n in (63, 33) else kernel.tiles()[:1]:
        check(kernel(x, tile=tile), module, x)


class Spelled(nn.Module):
    """A product spelled by a function of the inputs."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


SPELLINGS = {
    "mm": (torch.mm, (17, 33), (33, 9)),
    "bmm": (torch.bmm, (3, 17, 33), (3, 33, 9)),
    "matmul": (torch.matmul, (2, 1, 17, 33), (3, 33, 9)),
    "matmul, left broadcast": (torch.matmul, (17, 33), (2, 3, 33, 9)),
    "matrix times vector": (torch.matmul, (17, 33), (33,)),
    "matrices times vector": (torch.matmul, (2, 17, 33), (33,)),
    "vector times matrix": (torch.matmul, (33,), (33, 9)),
    "vector times matrices": (torch.matmul, (33,), (3, 33, 9)),
    "vectors": (torch.matmul, (33,), (33,)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (9,), (17, 33), (33, 9)),
    "addmm, no addend": (lambda c, a, b: torch.addmm(c, a, b, beta=0), (17, 9), (17, 33), (33, 9)),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=2), (17, 1), (3, 17, 33), (3, 33, 9)),
    "linear": (functional.linear, (2, 3, 17, 33), (9, 33), (9,)),
    "linear of a vector": (functional.linear, (33,), (9, 33)),
}
VIEWS = {
    "transposed": (lambda a, b: a.T @ b.T, (33, 17), (9, 33)),
    "permuted": (lambda a, b: a.permute(1, 0, 2) @ b.permute(2, 1, 0), (17, 3, 33), (9, 33, 3)),
    "sliced": (lambda a, b: a[1:, 2:35] @ b[:, ::2][3:36], (18, 40), (40, 18)),
    "heads": (lambda a, b: a.view(5, 2, 33).transpose(0, 1) @ b.view(7, 2, 33).permute(1, 2, 0), (5, 66), (7, 66)),
    "padded": (lambda a, b: functional.pad(a, (2, 1), value=7.0) @ b, (17, 30), (33, 9)),
    "expanded": (lambda a, b: a.expand(17, 33) @ b[:, :1].expand(33, 9), (1, 33), (33, 9)),
    "a number": (lambda a, b: torch.full((17, 33), 0.5, dtype=b.dtype) @ b + a, (17, 1), (33, 9)),
    "pointwise": (lambda a, b: torch.exp(a + 1) @ torch.log(b.abs()), (17, 33), (33, 9)),
    "flattened": (lambda a, b: a.reshape(6, 33) @ b.reshape(33, 10), (2, 3, 33), (11, 3, 10)),
    "converted": (lambda a, b: a.to(b.dtype) @ (b * 2), (17, 33), (33, 9)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in SPELLINGS] + [(name, torch.bfloat16) for name in ("mm", "baddbmm", "vectors")],
    ids=str,
)
def test_spellings(product, name, dtype):
    function, *shapes = SPELLINGS[name]
    module, inputs = Spelled(function), [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    check(product(module, *inputs)(*inputs), module, *inputs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in VIEWS]
    + [(name, torch.float32) for name in ("sliced", "padded", "a number", "converted")],
    ids=str,
)
def test_operands_through_views(product, name, dtype):
    function, *shapes = VIEWS[name]
    module, inputs = Spelled(function), [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    check(product(module, *inputs)(*inputs), module, *inputs)


@DTYPES
def test_epilogue(product, dtype):
    """Bias, GELU, a residual; two results."""
    module = Linear(40, 33, dtype, "gelu")
    x, residual = random(2, 20, 40, dtype=dtype), random(20, 33, dtype=dtype, seed=1)
    check(product(module, x, residual)(x, residual), module, x, residual)
    both = Spelled(lambda a, b: ((y := a @ b).relu(), y - 1))
    a, b = random(20, 40, dtype=dtype), random(40, 33, dtype=dtype, seed=1)
    check(product(both, a, b)(a, b), both, a, b)


def test_rows_of_constants_are_filled_up(product):
    """To 16 bytes; a matrix [K, N] is turned. What needs neither is taken as it lies."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(random(63, 33, dtype=torch.float16, seed=1))

        def forward(self, x):
            return x @ self.w

    x = random(20, 63, dtype=torch.float16)
    for module, shape, packing in (
        (Linear(63, 33, torch.float16), (33, 64), "rows"),
        (Constant(), (33, 64), "columns"),
        (Linear(64, 33, torch.float16), (33, 64), None),
    ):
        x = random(20, 64 if packing is None else 63, dtype=torch.float16)
        kernel = product(module, x)
        weight = next(item for item in kernel.constants.constants if len(item.shape) == 2)
        assert (weight.shape, weight.packing and weight.packing.name) == (shape, packing)
        check(kernel(x), module, x)


@DTYPES
@pytest.mark.parametrize("m", [1, 3, 4, 5, 8])
def test_few_rows(product, dtype, m):
    """Weights are streamed past a few rows; sizes that divide nothing, and a step that does not divide the terms."""
    module, x = Linear(300, 37, dtype, "gelu"), random(m, 300, dtype=dtype)
    kernel = product(module, x)
    assert ("ROWS" in kernel.step.variants[0].tiles[0].values()) == (m <= (8 if dtype == torch.float32 else 4))
    for tile in kernel.tiles(0):
        check(kernel(x, tile=tile), module, x)


def test_few_rows_of_several_matrices(product):
    function = Spelled(lambda a, b: a @ b.mT)
    a, b = random(3, 2, 70), random(3, 21, 70, seed=1)
    kernel = product(function, a, b)
    assert "ROWS" in kernel.step.variants[0].tiles[0].values()
    check(kernel(a, b), function, a, b)


@DTYPES
def test_rows_vary(product, dtype):
    """One step for all numbers of rows: each has the variant that is for it, and its results."""
    module, sample = Linear(72, 96, dtype), random(30, 72, dtype=dtype)
    kernel = product(module, sample, shapes=({0: torch.export.Dim("rows", min=1, max=1000)},))
    kinds = {}
    for rows in (1, 2, 4, 5, 16, 17, 63, 129):
        x = random(rows, 72, dtype=dtype, seed=rows)
        check(kernel(x), module, x)
        kinds[rows] = kernel.ran[-1].partition(":")[0]
    expected = ["0", "1", "1", "1" if dtype == torch.float32 else "2"]
    expected += ["2"] * 4 if dtype == torch.float32 else ["2", "3", "3", "3"]
    assert list(kinds.values()) == expected


def test_rows_of_two_axes_vary(product):
    """Rows are taken apart again for a residual that is broadcast."""
    module = Spelled(lambda x, w, r: functional.linear(x, w) + r)
    batch, length = torch.export.Dim("batch", min=1, max=20), torch.export.Dim("length", min=1, max=100)
    weight = random(24, 40, seed=1)
    kernel = product(
        module, random(3, 5, 40), weight, random(5, 24), shapes=(({0: batch, 1: length}, None, {0: length}),)
    )  # fmt: skip
    for b, t in ((1, 1), (2, 3), (1, 9), (3, 50)):
        inputs = random(b, t, 40, seed=b), weight, random(t, 24, seed=t)
        check(kernel(*inputs), module, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_columns_and_terms_vary(product, dtype):
    """As in attention that is written out: the number of keys is that of columns, then that of terms."""
    length = torch.export.Dim("length", min=1, max=300)
    scores = Spelled(lambda q, k: q @ k.mT)
    q, k = random(2, 5, 24, dtype=dtype), random(2, 7, 24, dtype=dtype, seed=1)
    for_scores = product(scores, q, k, shapes=((None, {1: length}),))
    values = Spelled(lambda p, v: p @ v)
    p, v = random(2, 5, 7, dtype=dtype), random(2, 7, 24, dtype=dtype, seed=2)
    for_values = product(values, p, v, shapes=(({2: length}, {1: length}),))
    for keys in (1, 33, 130):
        k, v = (random(2, keys, 24, dtype=dtype, seed=keys + i) for i in range(2))
        check(for_scores(q, k), scores, q, k)
        p = random(2, 5, keys, dtype=dtype)
        check(for_values(p, v), values, p, v)


@DTYPES
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(product, dtype):
    module, sample = Linear(200, 64, dtype), random(30, 200, dtype=dtype)
    kernel = product(module, sample, shapes=({0: torch.export.Dim("rows", min=1, max=1000)},))
    x = random(70, 200, dtype=dtype)
    for tile in kernel.tiles():
        whole = kernel(x, variant=-1, tile=tile)
        assert torch.equal(kernel(x[5:6], variant=-1, tile=tile), whole[5:6])
        assert torch.equal(kernel(x[60:], variant=-1, tile=tile), whole[60:])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_split_sums(product, dtype):
    """Programs share a tile: any order gives the same bits, and the counters are zero again."""
    module, x = Linear(1100, 70, dtype, "gelu"), random(40, 1100, dtype=dtype)
    kernel = product(module, x)
    [tile] = [name for name in kernel.tiles() if "k" in name]
    first = kernel(x, tile=tile)
    check(first, module, x)
    assert torch.equal(first, kernel(x, tile=tile, reverse=True))


def test_split_sums_where_rows_vary(product):
    """The scratch memory is large enough at every size that the tile's guard admits."""
    module, sample = Linear(2048, 80, torch.float16), random(30, 2048, dtype=torch.float16)
    kernel = product(module, sample, shapes=({0: torch.export.Dim("rows", min=17, max=100000)},))
    variant = kernel.step.variants[-1]
    tile = next(item for item in variant.tiles if item.values()["SPLIT_K"] > 1)
    constants = tile.values()
    [partials] = [kernel.lowered.draft.buffers[ref.index] for ref in variant.operands if ref.kind == "buffer"]
    admitted = [rows for rows in range(17, 5000) if sizes.evaluate(tile.guard, {"rows": rows})]
    assert admitted[0] == 17 and admitted[-1] < 4999
    for rows in admitted:
        programs = sizes.evaluate(variant.units, {"rows": rows, **constants})
        needed = 4 * programs * constants["BLOCK_M"] * constants["BLOCK_N"]
        assert programs // constants["SPLIT_K"] <= COUNTERS
        assert needed <= sizes.evaluate(partials.bytes, {"rows": rows})
    x = random(130, 2048, dtype=torch.float16)
    check(kernel(x, tile=tile.name), module, x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_persistent(product, dtype):
    """Programs take several tiles each; sizes that divide no block."""
    module, x = Linear(72, 264, dtype, "gelu"), random(530, 72, dtype=dtype)
    kernel = product(module, x)
    persistent = [item for item in kernel.step.variants[-1].tiles if item.values().get("PERSISTENT")]
    assert {item.architectures for item in persistent} == {("sm_90",), ("sm_100",), ("sm_120",)}
    for tile in (persistent[0], persistent[-1]):
        check(kernel(x, tile=tile.name, programs=3), module, x)
    check(kernel(x), module, x)


def test_persistent_reads_matrices_as_they_lie(product):
    """[K, N] on the right, rows that start further on, and TensorFloat-32."""
    function = Spelled(lambda a, b: a[:, 8:] @ b)
    a, b = random(520, 80, dtype=torch.float16), random(72, 256, dtype=torch.float16, seed=1)
    kernel = product(function, a, b)
    tile = next(item.name for item in kernel.step.variants[-1].tiles if item.values().get("PERSISTENT"))
    check(kernel(a, b, tile=tile, programs=2), function, a, b)
    assert "x0 + 8, [520, 72], [80, 1]" in kernel.source()
    module, x = Linear(40, 256), random(512, 40)
    assert "PERSISTENT" in product(module, x, precision="tf32").source()
    assert "PERSISTENT" not in product(module, x).source()


@pytest.mark.parametrize(
    "function",
    [lambda a, b: a[:, 4:] @ b[4:], lambda a, b: a[:, :75] @ b[:75], lambda a, b: torch.relu(a) @ b],
    ids=["starts between 16 bytes", "fits", "has a prologue"],
)
def test_descriptors_need_aligned_operands(product, function):
    a, b = random(520, 80, dtype=torch.float16), random(80, 256, dtype=torch.float16)
    fits = "75" in str(function.__code__.co_consts)
    assert ("PERSISTENT" in product(Spelled(function), a, b).source()) == fits


def test_indices_of_64_bits(product, monkeypatch):
    monkeypatch.setattr("tilewright.codegen.triton.anchors.index_type", lambda *arguments: "i64")
    monkeypatch.setattr("tilewright.codegen.triton.matmul.index_type", lambda *arguments: "i64")
    module, sample = Linear(600, 264, torch.float16), random(30, 600, dtype=torch.float16)
    kernel = product(module, sample, shapes=({0: torch.export.Dim("rows", min=1, max=1000)},))
    for rows in (1, 3, 9, 40):
        x = random(rows, 600, dtype=torch.float16)
        check(kernel(x), module, x)
        assert "tl.int64" in kernel.source()
    assert "PERSISTENT" not in kernel.source()


@pytest.mark.parametrize("sizes_", [(0, 9, 5), (5, 9, 0)], ids=["no rows", "no terms"])
def test_nothing(product, sizes_):
    m, n, k = sizes_
    function = Spelled(lambda c, a, b: torch.addmm(c, a, b))
    inputs = random(9), random(m, k), random(k, n)
    got = product(function, *inputs)(*inputs)
    assert torch.equal(got, function(*inputs))


def test_other_dtypes_are_plain_reductions(product):
    for dtype in (torch.float64, torch.int64):
        inputs = (random(5, 7) * 10).to(dtype), (random(7, 3, seed=1) * 10).to(dtype)
        kernel = product(Spelled(torch.mm), *inputs)
        assert kernel.step.variants[-1].kernel.startswith("loop")
        assert error_of(torch.mm(*inputs), kernel(*inputs)) < 1e-14


CUBINS = {
    "float32": (torch.float32, "ieee", 300, 768, 768),
    "tf32": (torch.float32, "tf32", 300, 768, 768),
    "bfloat16": (torch.bfloat16, "ieee", 300, 768, 768),
    "float16, small": (torch.float16, "ieee", 40, 96, 1000),
    "float16, 16 rows": (torch.float16, "ieee", 13, 1000, 768),
    "float16, narrow": (torch.float16, "ieee", 1000, 10, 768),
    "float16, a row": (torch.float16, "ieee", 1, 4096, 4096),
    "bfloat16, 4 rows": (torch.bfloat16, "ieee", 4, 4096, 4096),
    "float32, 8 rows": (torch.float32, "ieee", 8, 1000, 2048),
}


@pytest.mark.parametrize("name", CUBINS)
def test_compiles(product, compile_cubin, name):
    """The default tile has neither spills nor too much shared memory on sm_80 and sm_90."""
    dtype, precision, m, n, k = CUBINS[name]
    kernel = product(Linear(k, n, dtype, "gelu"), random(m, k, dtype=dtype), precision=precision)
    for variant in kernel.step.variants:
        code = kernel.kernels[variant.kernel]
        compile_cubin.good(code.text, code.name, code.signature, variant.tiles[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_persistent_compiles(product, compile_cubin, dtype):
    """With a descriptor of each operand, in scratch memory of the program, which the copy engine reads through."""
    kernel = product(Linear(1024, 1024, dtype, "gelu"), random(1000, 1024, dtype=dtype), precision="tf32")
    variant = kernel.step.variants[-1]
    code = kernel.kernels[variant.kernel]
    for tile in variant.tiles:
        if tile.architectures == ("sm_90",):
            compile_cubin.good(code.text, code.name, code.signature, tile, "sm_90")
            binary = compile_cubin(code.text, code.name, code.signature, tile, "sm_90")
            assert binary.global_scratch >= 2 * 128
            assert "wgmma" in binary.ptx and "cp.async.bulk.tensor" in binary.ptx


def test_split_sums_are_ordered_in_memory(product, compile_cubin):
    """Between the stores of the sums and the loads of others': a barrier of the program, and an atomic in between."""
    kernel = product(Linear(1100, 70, torch.float16), random(40, 1100, dtype=torch.float16))
    variant = kernel.step.variants[-1]
    code = kernel.kernels[variant.kernel]
    tile = next(item for item in variant.tiles if item.values()["SPLIT_K"] > 1)
    compile_cubin.good(code.text, code.name, code.signature, tile)
    ptx = compile_cubin(code.text, code.name, code.signature, tile, "sm_90").ptx
    stores, _, after = ptx.partition("atom.global.gpu.acq_rel.add")
    assert "bar.sync" in stores[stores.rindex("st.global.cg") :]
    assert "bar.sync" in after[: after.index("ld.global.cg")]

"""The files of GPU targets: cubins with their table, PTX where newer GPUs accept it, and calls that fit the kernels."""

import pytest

from tilewright.codegen.architectures import architecture
from tilewright.codegen.kernel_table import KernelSource
from tilewright.codegen.targets import GpuTarget
from tilewright.codegen.triton.backend import build, check_calls, sources
from tilewright.codegen.triton.compiler import headers
from tilewright.codegen.triton.pool import Pool
from tilewright.runtime import binaries
from tilewright.runtime.errors import CompileError, UsageError
from tilewright.runtime.plan import Buffer, Plan, Port, Ref, Step, Tile, TileConstant, Variant

TEXT = """import triton
import triton.language as tl


@triton.jit
def turn(x, y, fault, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(x + i, mask=i < n, other=0)
    tl.store(fault, 1, mask=tl.max(j, 0) >= n)
    a = tl.load(y + i, mask=i < n, other=0)
    tl.store(y + j, a / tl.sum(a, 0), mask=i < n)
"""
SIGNATURE = ("*i64", "*fp32", "*i32", "i32")


def tile(block):
    return Tile(f"b{block}", (TileConstant("BLOCK", block),), 4, 1)


KERNEL = KernelSource("turn", "indexing", TEXT, (tile(64), tile(32)), SIGNATURE)


def targets(*names):
    return [GpuTarget(architecture(name)) for name in names]


@pytest.fixture(scope="module")
def workers():
    """Processes for all tests here."""
    with Pool({}, workers=2) as workers:
        yield workers


def test_files_and_their_table(workers):
    said = []
    built = build([KERNEL], targets("sm_90", "sm_80"), None, said.append, pool=workers)
    assert [one.name for one in built] == ["cuda:sm_90", "cuda:sm_80"] and len(said) == 4
    for one in built:
        table = binaries.parse(one.files["binaries.json"], "binaries.json")
        assert f"cuda:{table.architecture}" == one.name and table.compiler.startswith("Triton 3.")
        [kernel] = table.kernels
        assert kernel.name == "turn" and kernel.parameters == SIGNATURE and list(kernel.tiles) == ["b64", "b32"]
        assert sorted(one.files) == ["binaries.json", "turn.b32.cubin", "turn.b64.cubin"]
        for binary in kernel.binaries:
            assert one.files[binary.cubin].startswith(b"\x7fELF") and not binary.ptx
            assert binary.function == "turn" and binary.warps == 4 and binary.registers > 8
    assert built == build([KERNEL], targets("sm_90", "sm_80"), None, pool=workers)


def test_ptx_where_newer_gpus_accept_it(workers):
    built = build([KERNEL], targets("sm_90", "sm_80", "sm_86"), None, ptx=True, pool=workers)
    assert [[name for name in one.files if name.endswith(".ptx")] for one in built] == [
        [],
        [],
        ["turn.b64.ptx", "turn.b32.ptx"],
    ]
    table = binaries.parse(built[2].files["binaries.json"], "binaries.json")
    for binary in table.kernels[0].binaries:
        text = built[2].files[binary.ptx].decode()
        assert ".target sm_86\n" in text and "/" not in text.replace("//", "")
    with pytest.raises(UsageError, match="cuda:sm_90, cuda:sm_120 runs on no newer GPU.*cuda:sm_80"):
        build([KERNEL], targets("sm_90", "sm_120"), None, ptx=True, pool=workers)


def test_rejected_tiles_are_listed(workers):
    wasteful = Tile("spilling", (TileConstant("BLOCK", 4096),), 1, 1)
    kernel = KernelSource("turn", "indexing", TEXT, (wasteful, tile(32)), SIGNATURE)
    [built] = build([kernel], targets("sm_80"), None, pool=workers)
    table = binaries.parse(built.files["binaries.json"], "binaries.json")
    assert list(table.kernels[0].tiles) == ["b32"]
    [rejected] = table.rejected
    assert (rejected.kernel, rejected.tile) == ("turn", "spilling") and rejected.reason.startswith("spills")
    assert sorted(built.files) == ["binaries.json", "turn.b32.cubin"]


def test_sources_hold_what_they_import():
    assert sources([KERNEL]) == {"turn.py": TEXT.encode()} | {
        f"{name}.py": text.encode() for name, text in headers().items()
    }
    assert "tw_math" in headers()


def plan(*operands, sizes=("n",), dtype="int64"):
    variant = Variant("turn", operands, sizes, 1, tiles=KERNEL.tiles)
    buffer = Buffer("b", "float32", ("n",), "rows", 4, 0, 0)
    step = Step("step", "indexing", (variant,), (1,))
    return Plan("main", (), (Port("x", dtype, ("n",)),), (), None, (), (), (), (buffer,), (step,))


X, Y, FAULT = Ref("input", 0), Ref("buffer", 0), Ref("fault", 0)


def test_calls_fit_the_signatures():
    check_calls([plan(X, Y, FAULT)], [KERNEL])
    with pytest.raises(CompileError, match="step step: there is no kernel turn"):
        check_calls([plan(X, Y, FAULT)], [])


@pytest.mark.parametrize(
    "wrong",
    [
        plan(Y, X, FAULT),
        plan(X, Y),
        plan(X, Y, FAULT, sizes=()),
        plan(X, Y, FAULT, sizes=("n", 3)),
        plan(X, Y, FAULT, dtype="int32"),
        plan(X, Y, FAULT, FAULT, sizes=()),
    ],
)
def test_calls_that_do_not_fit(wrong):
    with pytest.raises(
        CompileError, match=r"step step calls kernel turn with \(.*but it takes \(\*i64, \*fp32, \*i32, i32\)"
    ):
        build([KERNEL], targets("sm_80"), None, plans=[wrong])

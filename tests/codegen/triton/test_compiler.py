"""Compiling ahead of time: what comes out, what is refused and why, that bytes repeat, and that the cache serves."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tilewright.codegen.architectures import architecture
from tilewright.codegen.cache import Cache
from tilewright.codegen.kernel_table import KernelSource
from tilewright.codegen.triton import compiler, pool, ptx
from tilewright.codegen.triton.compiler import Job, compile_for, compile_jobs
from tilewright.codegen.triton.pool import Pool
from tilewright.runtime.errors import CompileError
from tilewright.runtime.gpus import ARCHITECTURES
from tilewright.runtime.plan import Tile, TileConstant

POINTWISE = """import triton
import triton.language as tl


@triton.jit
def pointwise(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0)
    tl.store(y + i, tl.exp(a) + tl.erf(a), mask=i < n)
"""
PRODUCT = """import triton
import triton.language as tl


@triton.jit
def product(a, b, y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        p = tl.load(a + m[:, None] * 512 + k[None, :], mask=m[:, None] < M, other=0)
        q = tl.load(b + k[:, None] * 512 + n[None, :], mask=k[:, None] < K, other=0)
        acc = tl.dot(p, q, acc)
    tl.store(y + m[:, None] * 512 + n[None, :], acc.to(tl.float16), mask=(m[:, None] < M) & (n[None, :] < N))
"""
GREEDY = """import triton
import triton.language as tl


@triton.jit
def greedy(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    tl.store(y + i, a / tl.sum(a))
"""


def tile(warps=4, stages=1, name="", architectures=(), **constants):
    name = name or "x".join(str(value) for value in constants.values())
    pairs = tuple(TileConstant(key, value) for key, value in constants.items())
    return Tile(name, pairs, warps, stages, architectures=architectures)


TILES = (tile(BLOCK=1024), tile(BLOCK=256, warps=2))


def pointwise(text=POINTWISE, tiles=TILES, signature=("*fp32", "*fp32", "i32")):
    return KernelSource("pointwise", "loop", text, tuple(tiles), signature)


LARGE = tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, warps=8, stages=5)
SMALL = tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, stages=3)
SM80, SM86, SM90 = architecture("sm_80"), architecture("sm_86"), architecture("sm_90")


def product(*tiles):
    return KernelSource("product", "matmul", PRODUCT, tiles, ("*fp16", "*fp16", "*fp16", "i32", "i32", "i32"))


@pytest.fixture(scope="module")
def workers():
    """Two processes for all tests here."""
    with Pool({}, workers=2) as workers:
        yield workers


def failure(kernel, workers, *architectures):
    with pytest.raises(CompileError) as error:
        compile_for([kernel], architectures or [SM80], pool=workers)
    return str(error.value)


# ---- what comes out ----


def test_every_architecture(workers):
    results = compile_for([pointwise()], list(ARCHITECTURES.values()), pool=workers)
    assert [result.architecture for result in results] == list(ARCHITECTURES.values())
    for result in results:
        assert list(result.tiles["pointwise"]) == ["1024", "256"] and not result.rejected
        for name, warps in (("1024", 4), ("256", 2)):
            binary = result.tiles["pointwise"][name]
            assert binary.cubin.startswith(b"\x7fELF") and f".target {result.architecture.name}" in binary.ptx
            assert (binary.function, binary.warps, binary.cluster) == ("pointwise", warps, 1)
            assert 8 <= binary.registers <= 255
            assert (binary.shared, binary.static_shared, binary.global_scratch, binary.profile_scratch) == (0, 0, 0, 0)


def test_products_use_the_tensor_cores_of_the_architecture(workers):
    results = compile_for([product(LARGE)], [SM80, SM90], pool=workers)
    old, new = (result.tiles["product"][LARGE.name] for result in results)
    assert "mma.sync" in old.ptx and "wgmma" not in old.ptx
    assert "wgmma" in new.ptx
    for binary, chip in ((old, SM80), (new, SM90)):
        assert 48 << 10 < binary.shared <= chip.shared_limit and not binary.problem(chip)


def test_sizes_of_64_bits_and_every_storage_dtype(workers):
    dtypes = ("fp64", "fp32", "fp16", "bf16", "i64", "i32", "i16", "i8", "u8")
    arguments = ", ".join(f"x{i}" for i in range(len(dtypes)))
    text = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
    text += f"def copies({arguments}, n, m):\n    i = tl.arange(0, 32)\n    keep = i < n + m\n"
    text += "".join(f"    tl.store(x{i} + i, tl.load(x{i} + i + 32), mask=keep)\n" for i in range(len(dtypes)))
    kernel = KernelSource("copies", "loop", text, (tile(name="t"),), (*(f"*{d}" for d in dtypes), "i64", "i32"))
    [result] = compile_for([kernel], [SM80], pool=workers)
    parameters = ptx.parse_entry(result.tiles["copies"]["t"].ptx).parameters
    pointers = ["u64 pointer"] * len(dtypes)
    assert list(parameters) == [*pointers, "u64", "u32", "u64 pointer", "u64 pointer"]


def test_headers_are_found_by_name():
    text = POINTWISE.replace("tl\n", "tl\nimport extra\n", 1).replace("tl.erf(a)", "extra.twice(a)")
    extra = "import triton\n\n\n@triton.jit\ndef twice(x):\n    return x + x\n"
    with Pool({"extra": extra}, workers=1) as one:
        assert compile_for([pointwise(text)], [SM80], pool=one)[0].tiles


def test_a_tile_is_compiled_only_for_its_architectures(workers):
    tiles = (tile(BLOCK=512, name="new", architectures=("sm_90",)), tile(BLOCK=256))
    results = compile_for([pointwise(tiles=tiles)], [SM80, SM90], pool=workers)
    assert [list(result.tiles["pointwise"]) for result in results] == [["256"], ["new", "256"]]


# ---- refusals ----


def test_a_tile_without_enough_shared_memory_gives_way(workers):
    results = compile_for([product(LARGE, SMALL)], [SM80, SM86], pool=workers)
    assert [list(result.tiles["product"]) for result in results] == [[LARGE.name, SMALL.name], [SMALL.name]]
    assert not results[0].rejected
    [rejected] = results[1].rejected
    assert (rejected.kernel, rejected.tile, rejected.architecture) == ("product", LARGE.name, "sm_86")
    assert rejected.reason.startswith("needs ") and rejected.reason.endswith("sm_86 has 101376")


def test_no_tile_is_left(workers):
    message = failure(product(LARGE), workers, SM86)
    assert "kernel product: no tile can be used on sm_86" in message
    assert f"{LARGE.name}: needs " in message
    assert "none of its tiles is meant" in failure(pointwise(tiles=[tile(architectures=("sm_90",))]), workers, SM86)


def test_spills_are_refused(workers):
    kernel = KernelSource("greedy", "row", GREEDY, (tile(BLOCK=16384, warps=1),), ("*fp32", "*fp32"))
    message = failure(kernel, workers)
    assert "no tile can be used on sm_80" in message and "16384: spills registers (" in message


@pytest.mark.parametrize(("second", "kept"), [(0, "without"), (4, "first")])
def test_spills_that_ptxas_chose_are_taken_back(monkeypatch, second, kept):
    """ptxas spills for the sake of occupancy; told the number of registers that there are, it need not."""
    specification = importlib.util.spec_from_file_location("worker", pool.SCRIPT)
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)

    def compile_fake(kernel, request, options):
        assert options in ({}, {"maxnreg": 128 if request["warps"] == 16 else 255})
        print(f"0 bytes stack frame, {second if options else 8} bytes spill stores, 0 bytes spill loads")
        name = "without" if options else "first"
        facts = dict.fromkeys(worker.METADATA, name)
        return SimpleNamespace(asm={"cubin": b"", "ptx": name}, metadata=SimpleNamespace(**facts))

    monkeypatch.setattr(worker, "_compile", compile_fake)
    monkeypatch.setattr(worker, "load", lambda name, text: SimpleNamespace(pointwise=SimpleNamespace(arg_names=["B"])))
    for warps in (1, 8, 16):
        answer = worker.compile_kernel(Job(pointwise(signature=()), tile(B=1, warps=warps), SM80).request())
        assert answer["ptx"] == kept and f" {second if kept == 'without' else 8} bytes spill stores" in answer["log"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def pointwise", "def point wise", ('File "kernels/triton/pointwise.py", line 6', "SyntaxError")),
        ("tl.exp(a)", "tl.expo(a)", ("tl.store(y + i, tl.expo(a)", "no attribute 'expo'")),
        ("i < n, other", "i[:, None] < j, other", ("a = tl.load(x + i", "j is not defined")),
        ("tl.arange(0, BLOCK)", "tl.arange(0, 100)", ("tl.arange(0, 100)", "power of 2")),
        ("import triton\n", "import no_such_module\n", ("No module named 'no_such_module'",)),
        ("def pointwise", "def other", ("no attribute 'pointwise'",)),
    ],
)
def test_errors_in_a_kernel_show_its_line(workers, old, new, expected):
    message = failure(pointwise(POINTWISE.replace(old, new, 1)), workers)
    assert message.startswith("kernel pointwise [1024] for sm_80: cannot be compiled\n")
    for part in expected:
        assert part in message
    assert "site-packages" not in message


def test_arguments_that_are_not_those_of_the_call(workers):
    wrong = POINTWISE.replace("n, BLOCK", "n, m, BLOCK")
    assert "takes the arguments (x, y, n, m, BLOCK); expected are 3" in failure(pointwise(wrong), workers)
    assert "then the constants (BLOCK)" in failure(pointwise(POINTWISE.replace("BLOCK", "SIZE")), workers)


def test_parameters_that_differ_in_the_binary(workers, monkeypatch):
    monkeypatch.setattr(ptx, "SCRATCH", ("*i8",))
    message = failure(pointwise(), workers)
    assert "kernel pointwise [1024] for sm_80: its compiled parameters are not those" in message
    assert "expected: *fp32, *fp32, i32, *i8\n" in message


@pytest.mark.parametrize(
    ("signature", "fits"),
    [
        (("*fp16", "i32", "i64"), True),
        (("*fp16", "i64", "i32"), False),
        (("i64", "i32", "*fp16"), False),
        (("*fp16", "i32"), False),
        (("*fp16", "i32", "i64", "i32"), False),
        (("*fp16", "fp32", "i64"), False),
    ],
)
def test_parameters_are_compared_one_by_one(signature, fits):
    text = """.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1,
	.param .u64 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3,
	.param .u64 .ptr .global .align 1 k_param_4
)
.reqntid 128
{
"""
    if fits:
        assert ptx.check_abi("k", text, signature, 4) == "k"
        with pytest.raises(CompileError, match="kernel k: compiled for 128 threads, but Triton states 8 warps"):
            ptx.check_abi("k", text, signature, 8)
    else:
        with pytest.raises(CompileError, match="kernel k: its compiled parameters"):
            ptx.check_abi("k", text, signature, 4)


def test_descriptors_by_value_are_seen():
    entry = ptx.parse_entry(".entry k(\n .param .align 64 .b8 k_param_0[128],\n .param .f32 k_param_1\n)\n{")
    assert entry.parameters == ("b8[128]", "f32") and entry.threads == 0
    with pytest.raises(ValueError, match="0 kernels"):
        ptx.parse_entry("")


def test_what_ptxas_says():
    log = """ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
    448 bytes stack frame, 92 bytes spill stores, 108 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 448 bytes cumulative stack size, 4096 bytes smem, 400 bytes cmem[0]
"""
    assert ptx.parse_log(log) == ptx.Resources(255, 92, 108, 448, 4096)
    with pytest.raises(ValueError, match="did not say"):
        ptx.parse_log("")


# ---- processes ----


@pytest.mark.parametrize(
    ("signal", "words"), [("SIGKILL", "was killed (is there enough memory?)"), ("SIGSEGV", "SIGSEGV")]
)
def test_a_worker_that_dies(workers, signal, words):
    deadly = f"import os, signal\nos.write(2, b'last words')\nos.kill(os.getpid(), signal.{signal})\n"
    message = failure(pointwise(deadly), workers)
    assert "kernel pointwise: Triton " in message and "compute capability 8.0" in message
    assert words in message and message.endswith("last words")
    assert compile_for([pointwise()], [SM80], pool=workers)  # others are still there, or started


def test_idle_workers_may_die(workers):
    compile_for([pointwise()], [SM80], pool=workers)
    for worker in workers._all:
        worker.process.kill()
        worker.process.wait()
    assert compile_for([pointwise()], [SM80], pool=workers)


def test_what_kernels_print_does_not_disturb(workers):
    noisy = "import os\nprint('noise')\nos.write(1, b'more')\n" + POINTWISE
    assert compile_for([pointwise(noisy)], [SM80], pool=workers)


def test_stopping_ends_the_processes():
    def stop(message):
        raise KeyboardInterrupt

    one = Pool({}, workers=1)
    with pytest.raises(KeyboardInterrupt):
        compile_for([pointwise()], [SM80, SM90], pool=one, progress=stop)
    folders = [Path(worker.folder.name) for worker in one._all]
    assert one.started == 1 and [worker.process.wait() for worker in one._all] == [-9]
    one.close()
    assert not any(folder.exists() for folder in folders)


def test_workers_end_and_clean_up_without_their_parent():
    one = Pool({}, workers=1)
    compile_for([pointwise()], [SM80], pool=one)
    [worker] = one._all
    worker.process.stdin.close()
    assert worker.process.wait(timeout=60) == 0 and not Path(worker.folder.name).exists()
    one.close()


def test_no_driver_and_no_torch(tmp_path):
    """The worker's own code, in a process where making a GPU driver raises."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import importlib.util, sys\n"
        f"from triton.backends.nvidia import driver\n"
        f"def refuse(*_):\n    raise AssertionError('asked the driver')\n"
        f"driver.CudaDriver.__init__ = driver.CudaUtils.__new__ = refuse\n"
        f"specification = importlib.util.spec_from_file_location('worker', {str(pool.SCRIPT)!r})\n"
        f"worker = importlib.util.module_from_spec(specification)\n"
        f"specification.loader.exec_module(worker)\n"
        f"answer = worker.compile_kernel({Job(pointwise(), tile(BLOCK=64), SM90).request()!r})\n"
        f"assert 'cubin' in answer, answer\n"
        f"assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_triton(monkeypatch, tmp_path):
    find = pool.find_triton.__wrapped__
    root, version = find()
    assert (root / "triton").is_dir() and version
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"pip install 'tilewright\[compile\]'"):
        find()
    (tmp_path / "triton").mkdir()
    origin = tmp_path / "triton" / "__init__.py"
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(origin)}))
    origin.write_text("__version__ = '3.5.1'\n")
    with pytest.raises(CompileError, match=r"Triton 3.5.1 is too old; install 3.6"):
        find()
    origin.write_text("")
    with pytest.raises(CompileError, match="does not say"):
        find()


# ---- the same bytes, and the cache ----


def test_bytes_depend_on_nothing_around(monkeypatch, tmp_path):
    """Other folders, another order, another number of processes, another environment."""
    jobs = [Job(pointwise(), tile(BLOCK=64), SM90), Job(product(SMALL), SMALL, SM80), Job(product(SMALL), SMALL, SM90)]
    found = []
    for name, workers in (("a", 2), ("another/much/longer/one", 1)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        with Pool({}, workers) as own:
            found.append(dict(zip(jobs, compile_jobs(jobs, pool=own), strict=True)))
        assert not list(folder.iterdir())
        jobs.reverse()
        for variable in (
            "TRITON_INTERPRET",
            "TRITON_KERNEL_DUMP",
            "DISABLE_PTXAS_OPT",
            "TRITON_FORCE_DISABLE_FP_FUSION",
        ):
            monkeypatch.setenv(variable, "1")
    assert found[0] == found[1]
    assert not (tmp_path / "home").exists()
    for binary in found[0].values():
        for text in (str(tmp_path), tempfile.gettempdir(), "site-packages", "libdevice", str(Path.cwd())):
            assert text.encode() not in binary.cubin and text not in binary.ptx


def test_the_cache_serves_without_processes(workers, monkeypatch, tmp_path):
    cache = Cache(tmp_path / "cache")
    said = []
    first = compile_for([pointwise(), product(SMALL)], [SM80], cache=cache, pool=workers, progress=said.append)
    assert sorted(line.partition(": ")[2] for line in said) == [
        "pointwise [1024] for sm_80",
        "pointwise [256] for sm_80",
        f"product [{SMALL.name}] for sm_80",
    ]
    assert [line.partition(":")[0] for line in said] == ["1 of 3", "2 of 3", "3 of 3"]
    said.clear()
    with Pool({}) as idle:
        again = compile_for([pointwise(), product(SMALL)], [SM80], cache=cache, pool=idle, progress=said.append)
        assert idle.started == 0
    assert again == first and len(said) == 3


def test_what_a_cached_binary_depends_on(workers, monkeypatch, tmp_path):
    cache = Cache(tmp_path / "cache")
    entries = set()

    def added(kernel=None, chip=SM80, pool=workers):
        compile_for([kernel or pointwise(tiles=[tile(BLOCK=64)])], [chip], cache=cache, pool=pool)
        before = set(entries)
        entries.update(cache.directory.glob("??/*"))
        return len(entries - before)

    assert added() == 1 and added() == 0
    assert added(chip=SM90) == 1
    assert added(pointwise(POINTWISE + "\n", [tile(BLOCK=64)])) == 1
    assert added(pointwise(tiles=[tile(BLOCK=64, warps=2)])) == 1
    assert added(pointwise(tiles=[tile(BLOCK=64, stages=2)])) == 1
    assert added(pointwise(tiles=[tile(BLOCK=32)])) == 1
    assert added(pointwise(tiles=[tile(BLOCK=64)], signature=("*fp32", "*fp32", "i64"))) == 1
    assert added(pointwise(tiles=[tile(BLOCK=64, name="renamed")])) == 0
    with Pool({"extra": "x = 1\n"}, workers=1) as other:
        assert added(pool=other) == 1
    monkeypatch.setattr(compiler, "find_triton", lambda: (Path(), "3.99"))
    assert added() == 1


def test_a_damaged_entry_is_made_again(workers, tmp_path):
    cache = Cache(tmp_path / "cache")
    job = Job(pointwise(), tile(BLOCK=64), SM80)
    [first] = compile_jobs([job], cache=cache, pool=workers)
    [entry] = cache.directory.glob("??/*")
    entry.write_bytes(entry.read_bytes()[:-1])
    assert compile_jobs([job, job], cache=cache, pool=workers) == [first, first]

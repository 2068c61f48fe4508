"""The templates of matrix products with holes filled by hand, interpreted, against PyTorch in double precision."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.codegen.templating import render_triton

IMPORTS = "import triton\nimport triton.language as tl\n\nimport tw_math as tw\n\n\n@triton.jit\n"
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def source(template: str, arguments: str, constants: tuple[str, ...], **context) -> str:
    """A kernel ``product`` of operands, sizes and constants."""
    context = {"INDEX": "tl.int32", "BATCH": "1", "clamp_m": False, "clamp_n": False, "precision": "ieee"} | context
    head = ", ".join([arguments, *(f"{name}: tl.constexpr" for name in constants)])
    return f"{IMPORTS}def product({head}):\n{render_triton(template, **context)}"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= 1e-5 * max(np.abs(expected).max(), 1e-3)


def load(name: str, place: str, mask: str) -> str:
    return f"{name} = tl.load({place}, mask={mask}, other=0.0)"


def masked(batch: str) -> dict[str, object]:
    """Rows of x [M, K] and v [K, N], both masked at every end; y = 2 x v + 1."""
    m, n, across, down = "(m < M)[:, None]", "(n < N)[None, :]", "(k < K)[None, :]", "(k < K)[:, None]"
    store = f"tl.store(y + ({batch} * M + m[:, None]) * N + n[None, :], acc, mask={m} & {n})"
    return {
        "read_a": load("a", f"x + ({batch} * M + m[:, None]) * K + k[None, :]", f"{m} & {across}"),
        "read_w": load("w", f"v + ({batch} * K + k[:, None]) * N + n[None, :]", f"{down} & {n}"),
        "epilogue": f"acc = 2.0 * acc + 1.0\n{store}",
    }


@pytest.mark.parametrize("index", ["tl.int32", "tl.int64"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 63, 33), (40, 16, 32), (150, 33, 20)])
def test_sizes_at_run_time(interpret, m, n, k, index):
    text = source(
        "matmul.py.jinja", "x, v, y, B, M, N, K", BLOCKS,
        INDEX=index, BATCH="B", M="M", N="N", K="K", split=False, **masked("b"),
    )  # fmt: skip
    x, w = random(2, m, k), random(2, k, n, seed=1)
    grid = 2 * -(-m // 16) * -(-n // 32)
    arrays = [x, w, np.full((2, m, n), np.nan, np.float32)]
    *_, y = interpret(text, "product", arrays, [2, m, n, k], dict(zip(BLOCKS, (16, 32, 16), strict=True)), grid)
    check(y, 2 * x.astype(np.float64) @ w + 1)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_split(interpret, parts):
    """More parts than blocks of terms: some have none."""
    m, n, k = 40, 33, 50
    text = source(
        "matmul.py.jinja", "x, v, partials, counters, y", (*BLOCKS, "SPLIT_K", "M", "N", "K"),
        M="M", N="N", K="K", split=True, **masked("0"),
    )  # fmt: skip
    constants = dict(zip((*BLOCKS, "SPLIT_K", "M", "N", "K"), (16, 32, 16, parts, m, n, k), strict=True))
    x, w = random(m, k), random(k, n, seed=1)
    tiles = 3 * 2
    grid = tiles * parts
    results = []
    for order in ("tl.program_id(0)", f"({grid - 1} - tl.program_id(0))", f"(tl.program_id(0) * 7 % {grid})"):
        if order.endswith(f"% {grid})") and grid % 7 == 0:
            continue
        arrays = [
            x, w, np.full((tiles, parts, 16, 32), np.nan, np.float32), np.zeros(tiles, np.int32),
            np.full((m, n), np.nan, np.float32),
        ]  # fmt: skip
        after = interpret(text.replace("tl.program_id(0)", order), "product", arrays, (), constants, grid)
        assert not after[3].any()
        results.append(after[4])
        assert np.array_equal(after[4], results[0])
    check(results[0], 2 * x.astype(np.float64) @ w + 1)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("programs", [1, 4, 100])
def test_persistent(interpret, turned, programs):
    """Descriptors give zeros beyond the ends; tiles are taken in turn."""
    m, n, k = 70, 56, 44
    rows, columns = (n, k) if turned else (k, n)
    epilogue = masked("0")["epilogue"]
    text = source(
        "matmul_both.py.jinja", "x, v, y, M, N, K", (*BLOCKS, "PERSISTENT", "PROGRAMS"),
        M="M", N="N", K="K", split=False, **masked("0"), epilogue_half=epilogue,
        tensors=(
            {"base": "x", "rows": "M", "columns": "K", "stride": k, "turned": False},
            {"base": "v", "rows": rows, "columns": columns, "stride": columns, "turned": turned},
        ),
    )  # fmt: skip
    constants = dict(zip((*BLOCKS, "PERSISTENT", "PROGRAMS"), (16, 32, 16, 1, programs), strict=True))
    x, w = random(m, k), random(k, n, seed=1)
    arrays = [x, np.ascontiguousarray(w.T) if turned else w, np.full((m, n), np.nan, np.float32)]
    *_, y = interpret(text, "product", arrays, [m, n, k], constants, min(programs, 5 * 2), size_type="i32")
    check(y, 2 * x.astype(np.float64) @ w + 1)


def test_every_tile_is_taken_once(interpret):
    """Bands of 8 tiles down, the last one lower."""
    for down, across in ((1, 1), (8, 3), (19, 5), (3, 11)):
        text = source(
            "matmul.py.jinja", "y, M, N", BLOCKS, M="M", N="N", K="0", split=False,
            read_a="a = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)",
            read_w="w = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)",
            epilogue="tl.atomic_add(y + (top // BLOCK_M) * across + left // BLOCK_N, 1)",
        )  # fmt: skip
        grid = np.zeros((down, across), np.int32)
        sizes = [down * 16 - 3, across * 16 - 15]
        [taken] = interpret(text, "product", [grid], sizes, dict.fromkeys(BLOCKS, 16), down * across)
        assert (taken == 1).all()


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (3, 2), (4, 1)])
def test_few_rows(interpret, rows, batch):
    """Weights [N, K]; rows beyond the last are read as the last one and not stored."""
    n, k, entry = 9, 75, "b" if batch > 1 else "0"
    inside = f"(k < {k})[None, None, :]"
    text = source(
        "matvec.py.jinja", "x, v, y, M", ("ROWS", "BLOCK_N", "BLOCK_K"), BATCH=str(batch), M="M", N=n, K=k,
        clamp_m=True, clamp_n=True,
        read_a=load("a", f"x + ({entry} * M + row[:, None, None]) * {k} + k[None, None, :]", inside),
        read_w=load("w", f"v + column[None, :, None] * {k} + k[None, None, :]", inside),
        epilogue=f"to = y + ({entry} * M + m[:, None]) * {n} + n[None, :]\n"
        f"tl.store(to, acc, mask=(m < M)[:, None] & (n < {n})[None, :])",
    )  # fmt: skip
    x, w = random(batch, rows, k), random(n, k, seed=1)
    arrays = [x, w, np.full((batch, rows, n), np.nan, np.float32)]
    *_, y = interpret(text, "product", arrays, [rows], {"ROWS": 4, "BLOCK_N": 2, "BLOCK_K": 32}, batch * 5)
    check(y, x.astype(np.float64) @ w.T)

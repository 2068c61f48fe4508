"""The model that blocks matrix products: what it chooses is legal everywhere, and no choice changes a bit."""

import random

import numpy as np
import pytest

from tilewright.codegen.c import blocking, machine
from tilewright.codegen.c.blocking import Blocking, Cut, Problem
from tilewright.codegen.c.packing import NARROW_PANEL, PANEL, matmul_units, pack_bytes, pack_matmul, pack_words
from tilewright.runtime import sizes

LEFT = ("direct", "copied", "converted", "gathered")
BASES = ("x86-64-v3", "x86-64-v4")


def some_size(generator, most):
    return generator.choice((1, 2, 3, 31, 32, 33, generator.randint(1, most), generator.randint(1, 64)))


def problems(seed, count=60):
    generator = random.Random(seed)
    for _ in range(count):
        m = generator.choice((some_size(generator, 5000), "n_rows"))
        words = generator.choice((some_size(generator, 20000), 0, "n_terms"))
        n = generator.choice((some_size(generator, 60000), "n_columns"))
        packed = generator.choice((True, False)) or isinstance(n, int) and generator.random() < 0.3
        left, panel = generator.choice(LEFT), generator.choice((NARROW_PANEL, PANEL))
        yield Problem(generator.choice((1, 12, "n_batch")), m, n, words, left, packed, panel=panel)


def check_legal(problem, chosen):
    assert len(chosen.cuts) == len(machine.MACHINES) and chosen.block >= 1
    for cut in chosen.cuts:
        assert cut.depth >= 1 and cut.group >= 1
        assert problem.packed or cut.group == 1, "only one panel is packed at a time"
        assert blocking.scratch(problem, chosen.block, cut) <= blocking.SCRATCH


@pytest.mark.parametrize("seed", [1, 2])
def test_choices_are_legal(seed):
    for problem in problems(seed):
        check_legal(problem, blocking.choose(problem))
        for base in BASES:
            others = blocking.alternatives(problem, base)
            assert len(others) <= blocking.ALTERNATIVES and blocking.choose(problem) not in others
            assert len(set(others)) == len(others)
            for other in others:
                check_legal(problem, other)
    assert blocking.alternatives(problem, "") == []


def test_units_are_counted_as_blocks_and_panels():
    generator = random.Random(3)
    for _ in range(40):
        batch, m, n, block = (generator.randint(0, most) for most in (3, 300, 100, 200))
        block += 1
        counted = batch * len(range(0, m, block)) * len(range(0, n, 32))
        assert matmul_units(batch, m, n, block) == counted
        symbolic = matmul_units("b", "m", "n", block)
        assert sizes.evaluate(symbolic, {"b": batch, "m": m, "n": n}) == counted


def test_large_layers_are_multiplied_in_one_go():
    """Their panels fit the second-level cache of AVX-512 processors; small ones give every thread a unit."""
    for m, n, k in ((128, 3072, 768), (128, 768, 3072), (512, 1536, 384), (197, 2304, 768)):
        chosen = blocking.choose(Problem(1, m, n, k))
        assert chosen.cuts[-1] == Cut(k, 1), chosen
    narrow = blocking.choose(Problem(1, 96, 32, 512))
    assert matmul_units(1, 96, 32, narrow.block) >= 4
    gathered = blocking.choose(Problem(1, 512, 768, 768, "gathered"))
    assert gathered.cuts[-1].group > 1, "rows are packed once for several panels"


def test_reads_the_machines_cache(tmp_path):
    wide = machine.MACHINES[-1]
    assert machine.measured(wide, tmp_path) == wide
    for level, kind, size in (("1", "Data", "48K"), ("2", "Unified", "2M"), ("x", "Odd", "?")):
        folder = tmp_path / f"index{level}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert machine.measured(wide, tmp_path).l2 == 2 << 20


M, N, K = 61, 150, 1100
BLOCKINGS = [
    Blocking(96, (Cut(8192, 1), Cut(8192, 1))),
    Blocking(12, (Cut(16, 1), Cut(48, 4))),
    Blocking(61, (Cut(300, 8), Cut(1024, 2))),
    Blocking(7, (Cut(1024, 3), Cut(33, 5))),
    Blocking(48, (Cut(64, 2), Cut(64, 2))),
]


@pytest.mark.parametrize("target", ["v3", "v4base", "v4"])
@pytest.mark.parametrize(
    ("kind", "gathered"), [("float32", False), ("float32", True), ("bfloat16", False), ("int8", False)]
)
def test_every_blocking_gives_the_same_bits(native, target, kind, gathered):
    """One file with a kernel per blocking, over rows 4 KB apart: K is cut or not, panels go alone or together."""
    item, sums = {"float32": ("float", "float"), "bfloat16": ("uint16_t", "float"), "int8": ("int8_t", "int32_t")}[kind]
    stride = {"float32": 2048, "bfloat16": 2048, "int8": 4096}[kind]
    if gathered:
        left = {"pack_a": native.Hole(f"const float *from = x + m * {stride};", "const float a_value = from[k];")}
    else:
        left = {"a_direct": True, "a_base": "x", "a_stride": stride}
    text = ""
    for number, chosen in enumerate(BLOCKINGS):
        text += native.render(
            "matmul.c.jinja", name=f"product{number}", kind=kind, BATCH=1, M=M, N=N, K=K,
            prelude=f"const {item} *x = buf[0]; const {item} *w = buf[1]; {sums} *restrict y = buf[2];",
            b_packed=True, b_base="w", **chosen.context, **left,
            epilogue=native.Hole(f"{sums} *restrict to = y + m * {N};", "to[n] = acc;"),
        )  # fmt: skip
    generator = np.random.default_rng(0)
    if kind == "int8":
        x, weight = (generator.integers(-128, 128, shape, np.int8) for shape in ((M, stride), (K, N)))
        packed, y = pack_bytes(weight), np.zeros((M, N), np.int32)
    else:
        x, weight = (generator.standard_normal(shape, np.float32) for shape in ((M, stride), (K, N)))
        if kind == "bfloat16":
            x, weight = ((array.view(np.uint32) >> 16).astype(np.uint16) for array in (x, weight))
        packed = pack_words(weight) if kind == "bfloat16" else pack_matmul(weight)
        y = np.zeros((M, N), np.float32)
    expected = None
    for number, chosen in enumerate(BLOCKINGS):
        kernel = native.build(text, f"product{number}", target)
        y.view(np.uint8)[...] = 0xFF
        kernel([x, packed, y], [], matmul_units(1, M, N, chosen.block))
        expected = y.copy() if expected is None else expected
        np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32), err_msg=chosen.name)

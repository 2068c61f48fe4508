"""cache_append.c.jinja against its eager reference."""

import numpy as np
import pytest
import torch

from tilewright.codegen.c.cache_append import TILE
from tilewright.passes.graph.cache_ops import BLOCK

EVERY = pytest.mark.parametrize(
    ("target", "compiler"), [("v3", "gcc"), ("v4", "gcc"), ("v3", "zig"), ("v4", "zig")], ids=lambda text: text
)
KINDS = pytest.mark.parametrize("transposed", [False, True], ids=["values", "keys"])
PRELUDE = """const float *restrict rows = buf[0];
const int32_t *restrict positions = buf[1], *restrict starts = buf[2], *restrict table = buf[3];
ELEMENT *restrict cache = buf[4];
const int64_t TOKENS = dim[0], SEQUENCES = dim[1], WIDTH = dim[2], BLOCKS = dim[3];"""


class Append:
    """A kernel for rows [tokens, heads, d], read in two pieces where ``d`` is even."""

    def __init__(self, native, heads, d, transposed, bf16, target="v3", compiler="gcc"):
        self.heads, self.transposed, self.bf16 = heads, transposed, bf16
        pieces = [(0, d // 2), (d // 2, d // 2)] if d % 2 == 0 else [(0, d)]
        row = f"const float *restrict from = rows + (t * {heads} + h) * {d}"
        source = native.render(
            "cache_append.c.jinja",
            name="append",
            prelude=PRELUDE.replace("ELEMENT", "uint16_t" if bf16 else "float"),
            HEADS=heads, TOKENS="TOKENS", SEQUENCES="SEQUENCES", WIDTH="WIDTH", BLOCKS="BLOCKS", D=d, tile=TILE,
            bf16=bf16, transposed=transposed, cache="cache", positions="positions", starts="starts", table="table",
            rows=[
                {"first": first, "count": count,
                 "hole": native.Hole(f"{row} + {first};", "const float element = from[d];")}
                for first, count in pieces
            ],
        )  # fmt: skip
        self.kernel = native.build(source, "append", target, compiler)

    def run(self, cache, rows, positions, starts, table, split=None):
        """(fault, new cache)"""
        cache = cache.clone()
        memory = (cache.view(torch.int16) if self.bf16 else cache).numpy()
        units = self.heads * -(-len(rows) // TILE)
        fault = 0
        for begin, end in split or [(0, units)]:
            arrays = [rows.numpy(), positions.numpy(), starts.numpy(), table.numpy(), memory]
            fault |= self.kernel(arrays, [len(rows), *table.shape, len(cache)], begin, end)
        return fault, cache


def problem(heads, d, transposed, bf16, lengths, padding=3, seed=0):
    """A cache, and tokens of sequences of the given (position of the first, number) in blocks that lie anywhere."""
    print("seed", seed)
    torch.manual_seed(seed)
    width = max(-(-(first + count) // BLOCK) for first, count in lengths) + 1
    table = torch.randperm(len(lengths) * width + 3)[: len(lengths) * width].reshape(len(lengths), width)
    shape = (len(lengths) * width + 3, heads, *((d, BLOCK) if transposed else (BLOCK, d)))
    cache = torch.randn(shape).to(torch.bfloat16 if bf16 else torch.float32)
    starts = torch.tensor([0, *np.cumsum([count for _, count in lengths])])
    positions = torch.cat(
        [torch.arange(first, first + count) for first, count in lengths] + [torch.full((padding,), -9)]
    )
    rows = torch.randn(len(positions), heads, d)
    return cache, rows, positions.int(), starts.int(), table.int()


LENGTHS = [(0, 1), (31, 2), (5, 0), (40, 70), (64, 1), (0, 0)]


@pytest.mark.sanitize("gcc")
@EVERY
@pytest.mark.parametrize(
    ("heads", "d", "transposed", "bf16"),
    [(1, 8, False, False), (3, 33, True, True), (2, 128, True, False), (2, 20, False, True)],
)
def test_matches_reference(native, target, compiler, heads, d, transposed, bf16):
    append = Append(native, heads, d, transposed, bf16, target, compiler)
    given = problem(heads, d, transposed, bf16, LENGTHS)
    given[1][0, 0, :2] = torch.tensor([torch.inf, 1 + 2**-8])  # half-way between two bfloat16: to even
    expected = torch.ops.tilewright.cache_append(*given, transposed)
    fault, got = append.run(*given)
    assert fault == 0 and torch.equal(got, expected)
    units = heads * -(-len(given[1]) // TILE)
    assert torch.equal(append.run(*given, split=[(unit, unit + 1) for unit in reversed(range(units))])[1], expected)


@pytest.mark.sanitize
@KINDS
def test_faults(native, transposed):
    """A token whose place is out of range writes nothing and sets the fault word; all others are written."""
    append = Append(native, 2, 16, transposed, False)
    lengths = [(30, 4), (100, 3)]
    cache, rows, positions, starts, table = problem(2, 16, transposed, False, lengths)
    for name, place, value in (
        ("positions", 4, -1), ("positions", 4, 32 * 5), ("positions", 4, 2**31 - 1), ("table", (1, 3), -1),
        ("table", (1, 3), len(cache)), ("table", (1, 3), 2**31 - 1),
    ):  # fmt: skip
        given = {"positions": positions.clone(), "starts": starts, "table": table.clone()}
        given[name][place] = value
        fault, got = append.run(cache, rows, **given)
        kept = torch.tensor([4], dtype=torch.int32) if name == "table" else starts
        if name == "table":  # no token of the second sequence has a place
            expected = torch.ops.tilewright.cache_append(
                cache, rows[:4], positions[:4], torch.tensor([0, *kept], dtype=torch.int32), table[:1], transposed
            )
        else:  # all but its first token
            chosen = [0, 1, 2, 3, 5, 6]
            expected = torch.ops.tilewright.cache_append(
                cache, rows[chosen], positions[chosen], torch.tensor([0, 4, 6]).int(), table, transposed
            )
        assert fault == 1 and torch.equal(got, expected), (name, place, value)
    for wrong in ([0, 5, 4], [1, 4, 7], [0, 4, 11], [0, -1, 7]):
        fault, got = append.run(cache, rows, positions, torch.tensor(wrong).int(), table)
        assert fault == 1 and torch.equal(got, cache)

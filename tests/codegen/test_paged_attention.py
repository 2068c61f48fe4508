"""paged_attention.c.jinja against its eager reference in double precision, and against itself in other company."""

import numpy as np
import pytest
import torch

from tilewright.codegen.c.paged_attention import paged_units, tokens_of
from tilewright.passes.graph import ops  # noqa: F401 - registers the operator
from tilewright.passes.graph.cache_ops import BLOCK

EVERY = pytest.mark.parametrize(
    ("target", "compiler"), [("v3", "gcc"), ("v4", "gcc"), ("v3", "zig"), ("v4", "zig")], ids=lambda text: text
)
BOTH = pytest.mark.parametrize("target", ["v3", "v4"])
CACHES = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
PRELUDE = """const float *restrict q = buf[0];
const ELEMENT *restrict keys = buf[1], *restrict values = buf[2];
const int32_t *restrict positions = buf[3], *restrict starts = buf[4], *restrict contexts = buf[5];
const int32_t *restrict table = buf[6];
float *restrict o = buf[7];
const int64_t TOKENS = dim[0], SEQUENCES = dim[1], WIDTH = dim[2], BLOCKS = dim[3], WINDOW = dim[4];"""


class Paged:
    """A kernel for queries [tokens, shared * group, d]; called with a :class:`Step`."""

    def __init__(self, native, shared, group, d, target="v3", compiler="gcc", bf16=False, scale=None):
        self.shared, self.group, self.d, self.bf16 = shared, group, d, bf16
        self.scale = d**-0.5 if scale is None else scale
        row = f"(t * {shared * group} + h) * {d}"
        source = native.render(
            "paged_attention.c.jinja",
            name="paged",
            prelude=PRELUDE.replace("ELEMENT", "uint16_t" if bf16 else "float"),
            SHARED=shared, GROUP=group, D=d, tokens=tokens_of(group),
            TOKENS="TOKENS", SEQUENCES="SEQUENCES", WIDTH="WIDTH", BLOCKS="BLOCKS",
            keys="keys", values="values", positions="positions", starts="starts", contexts="contexts", table="table",
            bf16=bf16, scale=float(np.float32(self.scale)).hex() + "f", scaled=self.scale <= 0, window="WINDOW",
            q=[{"first": 0, "count": d,
                "hole": native.Hole(f"const float *restrict from = q + {row};", "const float element = from[d];")}],
            store=native.Hole(f"float *restrict to = o + {row};", "to[d] = acc;"),
        )  # fmt: skip
        self.kernel = native.build(source, "paged", target, compiler)

    def run(self, step, q, window=0, split=None):
        """(fault, result)"""
        caches = [c.view(torch.int16).numpy() if self.bf16 else c.numpy() for c in (step.keys, step.values)]
        q, out = np.ascontiguousarray(q), np.full(q.shape, np.nan, np.float32)
        sequences, width = step.table.shape
        units = paged_units(len(q), sequences, self.shared, self.group)
        arrays = [q, *caches, step.positions, step.starts, step.contexts, step.table, out]
        fault = 0
        for begin, end in split or [(0, units)]:
            fault |= self.kernel(arrays, [len(q), sequences, width, len(step.keys), window], begin, end)
        return fault, out

    def __call__(self, step, q, window=0, split=None):
        fault, out = self.run(step, q, window, split)
        assert fault == 0
        return out

    def expected(self, step, q, window=0):
        q = torch.from_numpy(q).double()
        ragged = (step.positions, step.starts, step.contexts, step.table)
        arguments = (step.keys, step.values, *map(torch.from_numpy, ragged), self.scale, window)
        return torch.ops.tilewright.paged_attention(q, *arguments).numpy()


class Step:
    """Sequences with their caches: ``lengths`` are (context, new tokens), blocks lie anywhere in a larger pool.

    What no token has written is NaN, in the blocks of others and behind the context's end.
    """

    def __init__(self, lengths, shared, d, bf16=False, padding=0, seed=0):
        print("seed", seed)
        generator = np.random.default_rng(seed)
        self.lengths = lengths
        needed = [-(-context // BLOCK) for context, _ in lengths]
        count = sum(needed) + 2
        numbers = iter(generator.permutation(count).tolist())
        self.table = np.full((len(lengths), max([*needed, 1]) + 1), 10**6, np.int32)
        values = np.full((count, shared, BLOCK, d), np.nan, np.float32)
        keys = np.full((count, shared, d, BLOCK), np.nan, np.float32)
        for row, (context, _) in zip(self.table, lengths, strict=True):
            for start in range(0, context, BLOCK):
                row[start // BLOCK] = block = next(numbers)
                used = min(BLOCK, context - start)
                values[block, :, :used] = generator.standard_normal((shared, used, d))
                keys[block, :, :, :used] = generator.standard_normal((shared, d, used))
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.keys, self.values = (torch.from_numpy(array).to(dtype) for array in (keys, values))
        self.contexts = np.array([context for context, _ in lengths], np.int32)
        self.starts = np.cumsum([0, *(new for _, new in lengths)]).astype(np.int32)
        places = [range(context - new, context) for context, new in lengths]
        self.positions = np.array([p for place in places for p in place] + [-7] * padding, np.int32)

    def queries(self, heads, d, seed=1):
        """One for every token, also for padding."""
        return np.random.default_rng(seed).standard_normal((len(self.positions), heads, d)).astype(np.float32)

    def part(self, sequence, first, last):
        """The step of some tokens of one sequence alone, and where those tokens are in this step."""
        alone = object.__new__(Step)
        alone.keys, alone.values = self.keys, self.values
        where = slice(self.starts[sequence] + first, self.starts[sequence] + last)
        alone.positions = np.ascontiguousarray(self.positions[where])
        alone.table = np.ascontiguousarray(self.table[sequence : sequence + 1])
        alone.starts = np.array([0, last - first], np.int32)
        alone.contexts = np.array([alone.positions[-1] + 1], np.int32)
        return alone, where


def check(got, expected):
    """Means of values of size 1 with weights from scores of size 16."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=16 * 2**-22 * max(1, np.abs(expected).max(initial=0)))


LENGTHS = [(1, 1), (300, 1), (0, 0), (33, 33), (257, 20), (64, 1), (500, 140), (31, 31), (128, 128)]
SHAPES = [  # shared heads, group, d, bf16
    (1, 1, 8, False), (3, 2, 64, True), (2, 8, 128, False), (1, 7, 40, True), (2, 4, 20, False), (1, 3, 96, True),
    (1, 1, 1, False), (1, 50, 16, True),
]  # fmt: skip


@pytest.mark.sanitize("40", "96")
@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(native, target, shape):
    shared, group, d, bf16 = shape
    paged = Paged(native, shared, group, d, target, bf16=bf16)
    for window, lengths in ((0, LENGTHS), (50, LENGTHS[::-1])):
        step = Step(lengths, shared, d, bf16, padding=5)
        q = step.queries(shared * group, d)
        got = paged(step, q, window)
        check(got, paged.expected(step, q, window))
        assert (got[-5:] == 0).all()


@EVERY
@CACHES
def test_a_token_has_the_same_bits_in_any_company(native, target, compiler, bf16):
    """Alone, in chunks of a prompt, with other sequences, in other blocks, in any order of the units."""
    shared, group, d = 2, 3, 48
    paged = Paged(native, shared, group, d, target, compiler, bf16)
    step = Step(LENGTHS, shared, d, bf16)
    q = step.queries(shared * group, d)
    units = paged_units(len(q), len(LENGTHS), shared, group)
    for window in (0, 70):
        whole = paged(step, q, window)
        backwards = [(unit, unit + 1) for unit in reversed(range(units))]
        np.testing.assert_array_equal(paged(step, q, window, backwards), whole)
        for sequence, (_, new) in enumerate(LENGTHS):
            for size in (1, 17, 64, new) if new else ():
                for first in range(0, new, size) if size > 1 else (0, new - 1):
                    alone, where = step.part(sequence, first, min(first + size, new))
                    np.testing.assert_array_equal(paged(alone, q[where], window), whole[where])
    order = np.random.default_rng(5).permutation(len(step.keys))
    step.keys, step.values = step.keys[order].contiguous(), step.values[order].contiguous()
    step.table[step.table < len(order)] = np.argsort(order)[step.table[step.table < len(order)]]
    np.testing.assert_array_equal(paged(step, q, window), whole)


@pytest.mark.sanitize
@BOTH
@CACHES
def test_single_tokens_of_many_sequences(native, target, bf16):
    """Heads of a sequence follow each other then: the same bits as alone, in any order of the units; faults as ever."""
    lengths, shared, group, d = [(300, 1), (0, 0), (33, 1), (1, 1), (200, 1)], 3, 2, 24
    paged = Paged(native, shared, group, d, target, bf16=bf16)
    for padding in (0, 1):
        step = Step(lengths, shared, d, bf16, padding=padding)
        q = step.queries(shared * group, d)
        whole = paged(step, q)
        check(whole, paged.expected(step, q))
        units = paged_units(len(q), len(lengths), shared, group)
        cuts = [(unit, min(unit + 4, units)) for unit in range(0, units, 4)]
        np.testing.assert_array_equal(paged(step, q, 0, cuts[::-1]), whole)
        for sequence in (0, 2, 3, 4):
            alone, where = step.part(sequence, 0, 1)
            np.testing.assert_array_equal(paged(alone, q[where]), whole[where])
    step.table[4, 0] = -1
    fault, got = paged.run(step, q)
    assert fault == 1
    np.testing.assert_array_equal(got[:3], whole[:3])


@BOTH
def test_few_tokens_see_nothing(native, target):
    """A context that ends before a token hides what follows; without any position the result is zero."""
    paged = Paged(native, 1, 2, 16, target)
    step = Step([(100, 3), (40, 2)], 1, 16)
    step.contexts[:] = 95, 0
    q = step.queries(2, 16)
    got = paged(step, q, window=8)
    check(got, paged.expected(step, q, window=8))
    assert (got[:3] != 0).any() and (got[3:] == 0).all()


@BOTH
def test_scales(native, target):
    """Large scores overflow nothing; a negative scale turns them around."""
    step = Step([(90, 90), (200, 1)], 2, 32)
    q = step.queries(4, 32)
    for scale in (100.0, -0.3):
        paged = Paged(native, 2, 2, 32, target, scale=scale)
        np.testing.assert_allclose(paged(step, q), paged.expected(step, q), rtol=0, atol=max(1, abs(scale)) * 1e-4)


@pytest.mark.sanitize
@BOTH
def test_faults(native, target):
    """What is out of range is never read, sets the fault word, and leaves other sequences as they are."""
    paged = Paged(native, 2, 2, 24, target, bf16=True)
    lengths = [(70, 2), (100, 40)]
    good = Step(lengths, 2, 24, True)
    q = good.queries(4, 24)
    whole = paged(good, q)
    for name, place, value in (
        ("table", (1, 1), -1), ("table", (1, 3), 10**6), ("table", (1, 0), 2**31 - 1), ("positions", 20, -1),
        ("contexts", 1, 10**6), ("starts", 1, 50), ("starts", 2, 43), ("starts", 2, -5), ("starts", 0, 1),
    ):  # fmt: skip
        step = Step(lengths, 2, 24, True)
        getattr(step, name)[place] = value
        if name == "contexts":
            step.positions[20] = 10**6
        fault, got = paged.run(step, q)
        assert fault == 1, (name, place, value)
        if name != "starts":
            np.testing.assert_array_equal(got[:2], whole[:2])


@BOTH
def test_numbers_that_are_not_finite_stay_with_their_sequence(native, target):
    """Whatever stands in one sequence's blocks and queries, in any place of a step, the others have the same bits."""
    paged = Paged(native, 2, 2, 24, target, bf16=True)
    lengths = [(70, 2), (100, 40), (33, 1), (5, 5)]
    clean = Step(lengths, 2, 24, True)
    q = clean.queries(4, 24)
    whole = paged(clean, q)
    for bad in range(len(lengths)):
        step, given = Step(lengths, 2, 24, True), q.copy()
        where = slice(step.starts[bad], step.starts[bad + 1])
        blocks = torch.from_numpy(step.table[bad, : -(-lengths[bad][0] // BLOCK)]).long()
        step.values[blocks], step.keys[blocks], given[where] = torch.inf, -torch.inf, np.nan
        got = paged(step, given)
        assert not np.isfinite(got[where]).any()
        others = np.delete(np.arange(len(q)), np.arange(len(q))[where])
        np.testing.assert_array_equal(got[others], whole[others])


def test_units():
    """Every sequence finds slots for all its tokens."""
    generator = np.random.default_rng(3)
    for _ in range(200):
        tile = tokens_of(int(generator.integers(1, 60)))
        counts = generator.integers(0, 60, generator.integers(1, 6))
        starts = np.cumsum([0, *counts])
        slots = [int(start) // tile + place for place, start in enumerate(starts)]
        for place, count in enumerate(counts):
            assert slots[place] + -(-int(count) // tile) <= slots[place + 1]
    assert paged_units(17, 3, 4, 8) == 4 * (17 // 6 + 3 + 1)


class Rotated(torch.nn.Module):
    """Queries out of a fused projection, rotated."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(24, 4 * 16 + 8)

    def forward(self, x, cos, sin, keys, values, positions, starts, contexts, table):
        q = self.project(x)[:, 4:-4].unflatten(-1, (4, 16))
        q = torch.ops.tilewright.rotary_embedding(q, cos[:, None], sin[:, None])
        return torch.ops.tilewright.paged_attention(q, keys, values, positions, starts, contexts, table, 0.25, 0)


def test_queries_are_rotated_inside(compiled, assert_same):
    step = Step([(40, 3), (70, 8)], 2, 16)
    torch.manual_seed(0)
    angles = torch.randn(11, 8)
    ragged = (torch.from_numpy(array) for array in (step.positions, step.starts, step.contexts, step.table))
    given = (torch.randn(11, 24), angles.cos(), angles.sin(), step.keys, step.values, *ragged)
    module = Rotated().eval()
    model = compiled(module, given)
    (plan,) = model.artifact.plans.values()
    assert [step.family for step in plan.steps] == ["matmul", "paged_attention"]
    assert_same(model, module, given)

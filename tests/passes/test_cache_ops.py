import random

import pytest
import torch

from tilewright.passes.graph.cache_ops import BLOCK, CACHE_APPEND, PAGED_ATTENTION

KV_HEADS, DIM, SCALE = 2, 8, 0.3


class Ragged:
    """Sequences with keys and values, some of them in the cache already, their blocks scattered over it."""

    def __init__(self, seed, old, new, *, heads=4, padding=0, dtype=torch.float32, cache=torch.float32):
        random.seed(seed)
        torch.manual_seed(seed)
        contexts = [a + b for a, b in zip(old, new, strict=True)]
        width = max(-(-context // BLOCK) for context in contexts) + 1
        free = list(range(len(old) * width + 3))
        random.shuffle(free)
        table = torch.tensor([[free.pop() for _ in range(width)] for _ in old], dtype=torch.int32)
        self.key = [torch.randn(n, KV_HEADS, DIM, dtype=dtype) for n in contexts]
        self.value = [torch.randn(n, KV_HEADS, DIM, dtype=dtype) for n in contexts]
        self.query = [torch.randn(n, heads, DIM, dtype=dtype) for n in new]
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.old, self.new, self.table = old, new, table
        self.keys = torch.full((len(free) + table.numel(), KV_HEADS, DIM, BLOCK), torch.nan, dtype=cache)
        self.values = torch.full((len(free) + table.numel(), KV_HEADS, BLOCK, DIM), torch.nan, dtype=cache)
        self.append([0] * len(old), old)
        self.before = self.keys.clone()
        self.positions, self.starts = self.append(old, contexts, padding)
        filler = torch.full((padding, heads, DIM), torch.inf, dtype=dtype)
        self.tokens = torch.cat([*self.query, filler])

    def append(self, begin, end, padding=0):
        """Write positions begin[s] up to end[s] of every sequence s."""
        spans = list(zip(begin, end, strict=True))
        positions = torch.cat([torch.arange(*span) for span in spans] + [torch.full((padding,), -5)]).int()
        starts = torch.tensor([0, *(b - a for a, b in spans)]).cumsum(0).int()
        for rows, name in ((self.key, "keys"), (self.value, "values")):
            new = [row[a:b] for row, (a, b) in zip(rows, spans, strict=True)]
            filler = torch.full((padding, KV_HEADS, DIM), torch.inf, dtype=rows[0].dtype)
            arguments = (torch.cat([*new, filler]), positions, starts, self.table, name == "keys")
            setattr(self, name, CACHE_APPEND(getattr(self, name), *arguments))
        return positions, starts

    def attend(self, window=0):
        metadata = (self.positions, self.starts, self.contexts, self.table)
        return PAGED_ATTENTION(self.tokens, self.keys, self.values, *metadata, SCALE, window)

    def dense(self, window=0):
        """What PyTorch's attention gives for each sequence by itself, its keys and values rounded as the caches do."""
        rows = []
        for query, key, value, old in zip(self.query, self.key, self.value, self.old, strict=True):
            key, value = (x.to(self.keys.dtype).double().transpose(0, 1) for x in (key, value))
            p, j = torch.arange(old, old + len(query))[:, None], torch.arange(key.shape[1])
            mask = (j <= p) & ((p - j < window) if window else True)
            heads = torch.nn.functional.scaled_dot_product_attention(
                query.double().transpose(0, 1), key, value, mask, scale=SCALE, enable_gqa=True
            )
            rows.append(heads.transpose(0, 1))
        return torch.cat(rows)


CASES = {
    "one token of one sequence": ([40], [1]),
    "a whole prompt": ([0], [67]),
    "prompts and single tokens, one sequence without a token": ([0, 31, 100, 64, 5], [33, 1, 0, 1, 70]),
    "a chunk that begins inside a block": ([30], [5]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [0, 1, 40])
def test_agrees_with_plain_attention(case, heads, window):
    old, new = CASES[case]
    ragged = Ragged(3, old, new, heads=heads, padding=2)
    got = ragged.attend(window)
    torch.testing.assert_close(got[:-2].double(), ragged.dense(window), rtol=1e-5, atol=1e-6)
    assert torch.equal(got[-2:], torch.zeros_like(got[-2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_takes_caches_and_rows_of_other_dtypes(dtype):
    ragged = Ragged(4, [0, 20], [40, 1], dtype=dtype, cache=torch.bfloat16)
    got = ragged.attend()
    assert got.dtype == dtype and ragged.keys.dtype == torch.bfloat16
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), ragged.dense(), rtol=limit, atol=limit)


def test_appends_nothing_else():
    ragged = Ragged(5, [3, 50], [2, 1], padding=3)
    changed = (ragged.keys.nan_to_num(0) != ragged.before.nan_to_num(0)).any(1).any(1).nonzero().tolist()
    blocks = {(int(ragged.table[s, p // BLOCK]), p % BLOCK) for s, p in ((0, 3), (0, 4), (1, 50))}
    assert set(map(tuple, changed)) == blocks


def test_does_not_read_blocks_that_no_window_reaches():
    ragged = Ragged(6, [100], [2])
    expected = ragged.attend(40)
    ragged.table[0, 0] = -1
    assert torch.equal(ragged.attend(40), expected)
    with pytest.raises(ValueError, match="block -1 to position 0 of sequence 0"):
        ragged.attend()


def test_are_proper_operators():
    ragged = Ragged(7, [0, 10], [5, 1], padding=1)
    rows = torch.randn(7, KV_HEADS, DIM)
    metadata = (ragged.positions, ragged.starts, ragged.table)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(CACHE_APPEND, (ragged.keys, rows, *metadata, True), test_utils=checks)
    torch.library.opcheck(CACHE_APPEND, (ragged.values, rows.bfloat16(), *metadata, False), test_utils=checks)
    arguments = (ragged.tokens, ragged.keys.nan_to_num(), ragged.values.nan_to_num(), ragged.positions, ragged.starts)
    torch.library.opcheck(PAGED_ATTENTION, (*arguments, ragged.contexts, ragged.table, SCALE, 3), test_utils=checks)


def test_keeps_symbolic_sizes():
    class Step(torch.nn.Module):
        def forward(self, query, rows, keys, values, positions, starts, contexts, table):
            keys = CACHE_APPEND(keys, rows, positions, starts, table, True)
            values = CACHE_APPEND(values, rows, positions, starts, table, False)
            attended = PAGED_ATTENTION(query, keys, values, positions, starts, contexts, table, SCALE, 0)
            return attended, keys, values

    ragged = Ragged(8, [0, 10, 4], [5, 1, 1])
    tokens, sequences, width, blocks = (torch.export.Dim(n, max=99) for n in ("tokens", "sequences", "width", "blocks"))
    rows = torch.randn(7, KV_HEADS, DIM)
    arguments = (ragged.tokens, rows, ragged.keys, ragged.values, ragged.positions, ragged.starts, ragged.contexts)
    dims = ({0: tokens}, {0: tokens}, {0: blocks}, {0: blocks}, {0: tokens}, {0: sequences + 1}, {0: sequences})
    exported = torch.export.export(
        Step(), (*arguments, ragged.table), dynamic_shapes=(*dims, {0: sequences, 1: width}), strict=False
    )
    inputs = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
    attended, keys, values = (node.meta["val"] for node in exported.graph.output_node().args[0])
    assert attended.shape == inputs["query"].shape and keys.shape == inputs["keys"].shape
    assert values.shape == inputs["values"].shape and not isinstance(keys.shape[0], int)


def test_says_what_does_not_fit():
    ragged = Ragged(9, [0, 10], [5, 1])
    rows, other = torch.randn(6, KV_HEADS, DIM), torch.randn(6, KV_HEADS, DIM + 1)
    metadata = (ragged.positions, ragged.starts, ragged.table)
    for message, arguments in {
        r"cache is float32 \[7, 2, 8, 32\]; expected .*BLOCK, dim\]": (ragged.keys, rows, *metadata, False),
        r"cache is float16": (ragged.keys.half(), rows, *metadata, True),
        r"rows are float32 \[6, 2, 9\]; the cache takes .*\[tokens, 2, 8\]": (ragged.keys, other, *metadata, True),
        r"positions are int32 \[5\]; expected int32 \[6\]": (ragged.keys, rows, metadata[0][:5], *metadata[1:], True),
        r"starts are int32 \[2\]; expected int32 \[3\]": (
            (ragged.keys, rows, metadata[0], metadata[1][:2], metadata[2], True)
        ),
        r"starts \[0, 7, 6\] are no partition of 6 tokens": (
            (ragged.keys, rows, metadata[0], torch.tensor([0, 7, 6]).int(), metadata[2], True)
        ),
        r"position 64 of sequence 0 is outside its 2 blocks": (
            (ragged.keys, rows, metadata[0] + 64, *metadata[1:], True)
        ),
        r"gives block 7 to position 0 of sequence 0; the cache has 7": (
            (ragged.keys, rows, *metadata[:2], torch.full_like(ragged.table, 7), True)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            CACHE_APPEND(*arguments)
    arguments = [ragged.tokens, ragged.keys, ragged.values, *metadata[:2], ragged.contexts, ragged.table, SCALE, 0]
    for position, wrong, message in (
        (0, torch.randn(6, 3, DIM), "a multiple of 2 heads"),
        (2, ragged.values.bfloat16(), r"so values must be float32 \[7, 2, 32, 8\], not bfloat16"),
        (5, ragged.contexts.long(), r"contexts are int64 \[2\]; expected int32 \[2\]"),
        (8, -1, "the window is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            PAGED_ATTENTION(*arguments[:position], wrong, *arguments[position + 1 :])

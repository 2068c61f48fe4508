"""Appending to paged caches and attention over them in Triton, interpreted, against their eager references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.codegen.triton.attention_tiles import head_block
from tilewright.codegen.triton.families import FAMILIES
from tilewright.codegen.triton.paged import LEAST_SPLIT, MOST_SPLIT, cache_append_family
from tilewright.passes.graph.cache_ops import BLOCK

F32, BF16 = torch.float32, torch.bfloat16


class Append(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.transposed = transposed

    def forward(self, cache, rows, positions, starts, table):
        return torch.ops.tilewright.cache_append(cache, rows, positions, starts, table, self.transposed)


class Attend(nn.Module):
    def __init__(self, dim, window=0):
        super().__init__()
        self.scale, self.window = dim**-0.5, window

    def forward(self, query, keys, values, positions, starts, contexts, table):
        ragged = positions, starts, contexts, table
        return torch.ops.tilewright.paged_attention(query, keys, values, *ragged, self.scale, self.window)


def in_place(task):
    """The family as the lowering calls it for a state: the result has the memory of the cache."""
    cache = next(node for node in task.nested.graph.nodes if "cache_append" in str(node.target)).args[0]
    task.operands[task.placeholders().index(cache)] = task.results[0]
    return cache_append_family(task)


class Step:
    """Sequences given as (context, new tokens) whose blocks lie anywhere; what was never written is NaN."""

    def __init__(self, lengths, heads, dim, dtype, padding=0, seed=0):
        print("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-context // BLOCK) for context, _ in lengths]
        numbers = iter(torch.randperm(sum(needed) + 1, generator=generator).tolist())
        self.table = torch.full((len(lengths), max([*needed, 1]) + 1), 10**6, dtype=torch.int32)
        self.keys = torch.full((sum(needed) + 1, heads, dim, BLOCK), torch.nan)
        self.values = torch.full((sum(needed) + 1, heads, BLOCK, dim), torch.nan)
        for row, (context, _) in zip(self.table, lengths, strict=True):
            for start in range(0, context, BLOCK):
                row[start // BLOCK] = block = next(numbers)
                used = min(BLOCK, context - start)
                self.keys[block, :, :, :used] = torch.randn(heads, dim, used, generator=generator)
                self.values[block, :, :used] = torch.randn(heads, used, dim, generator=generator)
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        self.contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
        self.starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0).int()
        places = [place for context, new in lengths for place in range(context - new, context)]
        self.positions = torch.tensor(places + [-7] * padding, dtype=torch.int32)
        self.generator = generator

    def rows(self, heads, dim, dtype=F32):
        return torch.randn(len(self.positions), heads, dim, generator=self.generator).to(dtype)


APPENDED = [(1, 1), (33, 2), (5, 0), (110, 70), (65, 1)]


@pytest.mark.parametrize(
    ("heads", "dim", "transposed", "dtype"),
    [(1, 8, False, F32), (3, 33, True, BF16), (2, 64, True, F32), (2, 20, False, BF16)],
    ids=str,
)
def test_appends(lowered, heads, dim, transposed, dtype):
    step = Step(APPENDED, heads, dim, dtype, padding=2)
    rows = step.rows(heads, dim)
    cache = torch.zeros_like(step.keys if transposed else step.values)
    given = (cache, rows, step.positions, step.starts, step.table)
    model = lowered(Append(transposed), given, families={"cache_append": in_place})
    (got,) = model(*given)
    assert torch.equal(got, torch.ops.tilewright.cache_append(*given, transposed)) and not model.faults
    wrong_table = step.table.clone()
    wrong_table[1, 1] = len(cache)
    for change in ({2: step.positions - 200}, {3: step.starts.flip(0)}, {4: wrong_table}):
        changed = [change.get(index, tensor) for index, tensor in enumerate(given)]
        model(*changed)
        assert model.faults == 1, change.keys()


ATTENDED = [(1, 1), (40, 1), (300, 3), (7, 0), (64, 64)]


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(
    ("shared", "group", "dim", "dtype"), [(2, 4, 64, F32), (1, 1, 33, BF16), (2, 3, 16, BF16)], ids=str
)
def test_attends(lowered, monkeypatch, shared, group, dim, dtype, window):
    """Split and whole: one step has few tokens, the other more than are split, which are as few as possible here."""
    monkeypatch.setattr("tilewright.codegen.triton.paged.MOST_SPLIT", most := 48)
    for lengths in (ATTENDED[:4], [*ATTENDED, (400, most // shared)]):
        step = Step(lengths, shared, dim, dtype, padding=2)
        query = step.rows(shared * group, dim, dtype).float()
        given = (query, step.keys, step.values, step.positions, step.starts, step.contexts, step.table)
        if len(lengths) > 4:
            step.positions[-2 - most // shared : -2] = torch.arange(most // shared) * 8 % 400
        module = Attend(dim, window)
        model = lowered(module, given, families=FAMILIES)
        assert len(model.plan.steps[0].variants) == 1
        assert bool(model.plan.steps[0].variants[0].tiles[0].values().get("SPLIT")) == (len(lengths) <= 4)
        wide = module(query.double(), *given[1:])
        for tile in range(2):
            (got,) = model(*given, tile=tile)
            assert not model.faults
            error = float((got - wide).abs().max() / wide.abs().max())
            assert error <= (1e-5 if dtype == F32 else 1e-2), f"{len(lengths)} sequences, tile {tile}: {error:.2e}"


def test_sizes_choose_the_variant(lowered):
    """One kernel for any sizes; few tokens split their positions, many do not; both agree with the reference."""
    step = Step([(200, 3), (17, 2)], 2, 16, F32)
    given = (step.rows(4, 16), step.keys, step.values, step.positions, step.starts, step.contexts, step.table)
    tokens = torch.export.Dim("tokens", min=1, max=2048)
    shapes = ({0: tokens}, None, None, {0: tokens}, None, None, None)
    model = lowered(Attend(16), given, shapes, families=FAMILIES)
    assert [bool(item.tiles[0].values().get("SPLIT")) for item in model.plan.steps[0].variants] == [True, False]
    many = Step([(200, 3), (300, MOST_SPLIT // 2)], 2, 16, F32)
    many = (many.rows(4, 16), many.keys, many.values, many.positions, many.starts, many.contexts, many.table)
    assert len(many[1]) != len(given[1])
    (got,) = model(*given)
    torch.testing.assert_close(got, Attend(16)(*given), rtol=1e-5, atol=1e-5)


def test_faults(lowered):
    """What is seen has to lie in the table and in the cache; what is not seen may be anywhere."""
    step = Step([(40, 1), (70, 2)], 1, 16, F32, padding=1)
    given = [step.rows(2, 16), step.keys, step.values, step.positions, step.starts, step.contexts, step.table]
    model = lowered(Attend(16), tuple(given), families=FAMILIES)
    model(*given)
    assert not model.faults
    wrong_table, contexts = step.table.clone(), step.contexts.clone()
    wrong_table[1, 1] = -1
    contexts[0] = 10**6
    positions = step.positions.clone()
    positions[0] = 10**6
    for change in ({6: wrong_table}, {3: positions, 5: contexts}, {3: -step.positions - 1}, {4: step.starts.flip(0)}):
        model(*[change.get(index, tensor) for index, tensor in enumerate(given)])
        assert model.faults == 1, change.keys()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_compiles_for_gpus(lowered, compile_cubin, dtype):
    step = Step([(200, 3)], 2, 64, dtype)
    query = step.rows(8, 64, dtype)
    given = (query, step.keys, step.values, step.positions, step.starts, step.contexts, step.table)
    tokens = torch.export.Dim("tokens", min=1, max=2048)
    model = lowered(Attend(64), given, ({0: tokens}, None, None, {0: tokens}, None, None, None), families=FAMILIES)
    for kernel in model.kernels.values():
        compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0])
    cache = (step.keys, step.rows(2, 64), step.positions, step.starts, step.table)
    for kernel in lowered(Append(True), cache, families={"cache_append": in_place}).kernels.values():
        compile_cubin.good(kernel.text, kernel.name, kernel.signature, kernel.tiles[0])


def test_scratch_fits():
    assert LEAST_SPLIT % BLOCK == 0 and head_block(33) == 64

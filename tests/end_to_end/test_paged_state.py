"""Inputs that are states: caches that are appended to in place, whose size a session chooses."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tilewright
from tilewright.codegen.c import families
from tilewright.codegen.kernel_table import KernelTable
from tilewright.codegen.lower import lower
from tilewright.codegen.roles import fusion_roles
from tilewright.codegen.storage import ConstantTable
from tilewright.compiler.kernel_verification import verify_kernels
from tilewright.compiler.options import Entry
from tilewright.compiler.sources import open_source
from tilewright.passes.graph.cache_ops import BLOCK, CACHE_APPEND, PAGED_ATTENTION
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime.errors import CompileError, InputError, ShapeError, UsageError

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 3
SHAPES = {
    "q": f"tokens:1..64,{HEADS},{DIM}", "k": f"tokens,{KV_HEADS},{DIM}", "v": f"tokens,{KV_HEADS},{DIM}",
    "positions": "tokens", "starts": "sequences+1:1..4", "contexts": "sequences",
    "table": f"sequences,width:1..{WIDTH}", "keys": f"blocks:1..100000,{KV_HEADS},{DIM},{BLOCK}",
    "values": f"blocks,{KV_HEADS},{BLOCK},{DIM}",
}  # fmt: skip


class Attention(nn.Module):
    """One layer's step over its cache."""

    def forward(self, q, k, v, positions, starts, contexts, table, keys, values):
        keys = CACHE_APPEND(keys, k, positions, starts, table, True)
        values = CACHE_APPEND(values, v, positions, starts, table, False)
        return PAGED_ATTENTION(q, keys, values, positions, starts, contexts, table, 0.3, 0), keys, values


class ReadsTheOldValue(Attention):
    def forward(self, q, k, v, positions, starts, contexts, table, keys, values):
        attended, new_keys, new_values = super().forward(q, k, v, positions, starts, contexts, table, keys, values)
        return attended + (keys.sum() * q.mean()), new_keys, new_values


class GivesTheOldValue(Attention):
    def forward(self, q, k, v, positions, starts, contexts, table, keys, values):
        return keys, *super().forward(q, k, v, positions, starts, contexts, table, keys, values)[1:]


class GivesTheNewValue(Attention):
    """The new value by name, as a result too, and appended to twice."""

    def forward(self, q, k, v, positions, starts, contexts, table, keys, values):
        _, keys, values = super().forward(q, k, v, positions, starts, contexts, table, keys, values)
        keys = CACHE_APPEND(keys, k + 1, positions, starts, table, True)
        return {"seen": keys, "keys": keys, "more": {"sum": keys.sum()}, "values": values}


def step(sizes, past=None, blocks=None, seed=0) -> dict[str, Tensor]:
    """Inputs of a step: every sequence has its share of the tokens, after ``past`` others, and blocks of its own."""
    torch.manual_seed(seed)
    tokens, sequences = sizes["tokens"], sizes["sequences"]
    past = past or [0] * sequences
    new = [(tokens + i) // sequences for i in range(sequences)]
    order = torch.randperm(blocks or sizes["blocks"])[: sequences * WIDTH].reshape(sequences, -1)
    return {
        "q": torch.randn(tokens, HEADS, DIM), "k": torch.randn(tokens, KV_HEADS, DIM),
        "v": torch.randn(tokens, KV_HEADS, DIM),
        "positions": torch.cat([torch.arange(a, a + b) for a, b in zip(past, new, strict=True)]).int(),
        "starts": torch.tensor([0, *new]).cumsum(0).int(),
        "contexts": torch.tensor([a + b for a, b in zip(past, new, strict=True)]).int(),
        "table": order[:, : sizes["width"]].int(),
    }  # fmt: skip


def caches(blocks):
    return torch.zeros(blocks, KV_HEADS, DIM, BLOCK), torch.zeros(blocks, KV_HEADS, BLOCK, DIM)


TABLE = torch.randperm(17, generator=torch.Generator().manual_seed(1))[:9].reshape(3, 3).int()
SAMPLE = {"tokens": 5, "sequences": 2, "width": WIDTH, "blocks": 13}


def entry(**changes) -> Entry:
    make = partial(step, blocks=SAMPLE["blocks"])
    args = (*step(SAMPLE).values(), *caches(SAMPLE["blocks"]))
    given = Entry("forward", args, dynamic_shapes=SHAPES, make=make, states=("keys", "values"))
    return replace(given, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("paged") / "model.tw"
    tilewright.compile(Attention().eval(), output=path, entries={"main": entry()})
    return path


@pytest.fixture
def model(folder):
    with tilewright.load(folder, threads=2) as loaded:
        yield loaded


def arrays(inputs):
    return [tensor.numpy() for tensor in inputs.values()]


def test_sessions_append_in_place(model, same):
    eager, cache = Attention(), caches(17)
    session = model.session(sizes={"blocks": 17})
    assert session.sizes == {"blocks": 17}
    past = [0, 0, 0]
    for tokens in (64, 3, 1, 7):
        inputs = step({"tokens": tokens, "sequences": 3, "width": WIDTH}, past, 17) | {"table": TABLE}
        past = inputs["contexts"].tolist()
        want, *cache = eager(*inputs.values(), *cache)
        same(session(*arrays(inputs)), want)
    session.reset()
    fresh = step(SAMPLE)
    same(session(*arrays(fresh)), eager(*fresh.values(), *caches(17))[0])
    same(model(*arrays(fresh)), eager(*fresh.values(), *caches(13))[0])  # a plain call starts from the initial state
    plan = model.entry("main").plan
    written = [item.variants[0].operands[item.writes[0]].kind for item in plan.steps]
    families = [item.family for item in plan.steps]
    assert list(zip(families, written, strict=True)) == [
        ("cache_append", "state"), ("cache_append", "state"), ("paged_attention", "output"),
    ]  # fmt: skip
    assert not plan.buffers


def test_memory_is_known_before_and_not_touched(model):
    row = KV_HEADS * DIM * BLOCK * 4
    assert model.state_bytes() == 2 * 13 * row
    assert model.state_bytes({"blocks": 100000}) == 2 * 100000 * row
    before = resident()
    session = model.session({"blocks": 100000})
    session(*arrays(step(SAMPLE)))
    session.reset()
    assert resident() - before < 2 * 100000 * row / 4
    session.close()


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_says_which_sizes_there_are(model):
    with pytest.raises(ShapeError, match="size 'blocks' of the states must be 1 to 100000, got 0"):
        model.session({"blocks": 0})
    with pytest.raises(UsageError, match="no state whose size is called 'block'; the sizes of its states are blocks"):
        model.state_bytes({"block": 3})
    with pytest.raises(UsageError, match="must be a whole number, got 1.5"):
        model.session({"blocks": 1.5})
    inputs = step(SAMPLE)
    with pytest.raises(ShapeError, match=r"'starts', axis 0.*expected 3, got 4 \(sequences \+ 1; sequences comes from"):
        model(*arrays(inputs | {"starts": torch.zeros(4, dtype=torch.int32)}))


def test_a_block_that_is_not_there_is_an_error(model, same):
    session, inputs = model.session({"blocks": 9}), step(SAMPLE, blocks=9)
    wrong = inputs | {"table": torch.full_like(inputs["table"], 9)}
    with pytest.raises(InputError, match="out of range"):
        session(*arrays(wrong))
    session.reset()
    same(session(*arrays(inputs)), Attention()(*inputs.values(), *caches(9))[0])


def lowered(module, **changes):
    """The programs after all passes and after lowering."""
    (program,) = open_source(module.eval(), entries={"main": entry(**changes)})
    PassManager(pipeline(fusion_roles("cpu"), "cpu", "auto")).run(program)
    return program, lower(program, KernelTable(), ConstantTable(), families.FAMILIES)


def test_kernels_in_place_are_verified(model):
    program, _ = lowered(Attention())
    found = verify_kernels(model.entry("main"), program)
    assert [error.kernel for error in found] == [item.name for item in model.entry("main").plan.steps]
    assert all(error.ok for error in found)


def test_refuses_to_overwrite_what_is_still_read():
    with pytest.raises(CompileError, match="updates the state 'keys' in place, but.* reads it afterwards"):
        lowered(ReadsTheOldValue())
    with pytest.raises(CompileError, match="updates the state 'keys' in place, but.*given out as a result"):
        lowered(GivesTheOldValue())


def test_new_values_by_name_and_updates_one_after_the_other(make, same):
    model, eager = make(GivesTheNewValue(), entries={"main": entry()}), GivesTheNewValue()
    session, (keys, values) = model.session({"blocks": 9}), caches(9)
    for past in ([0, 0], [3, 2]):
        inputs = step(SAMPLE, past, 9)
        want = eager(*inputs.values(), keys, values)
        keys, values = want["keys"], want["values"]
        same(session(*arrays(inputs)), {"seen": want["seen"], "more": want["more"]}, 1e-4)


def test_says_what_does_not_fit_a_state():
    def declare(module=Attention, **changes):
        return open_source(module().eval(), entries={"main": entry(**changes)})

    with pytest.raises(UsageError, match="declares the state 'cache'; its inputs are q, k, v"):
        declare(states=("keys", "cache"))
    with pytest.raises(UsageError, match="declares a state twice"):
        declare(states=("keys", "keys"))
    with pytest.raises(UsageError, match=r"of the state .values..*is float32\[blocks, 2, 8, 32\], but the state"):
        declare(states=("values", "keys"))
    with pytest.raises(UsageError, match="new value for the state 'keys' by name, but none for 'k'"):
        declare(GivesTheNewValue, states=("keys", "k"))
    ones = (*step(SAMPLE).values(), *(cache + 1 for cache in caches(13)))
    with pytest.raises(UsageError, match="'keys' of entry point 'main' has a size that varies, so it starts as zeros"):
        declare(args=ones)
    other = entry(args=(*step(SAMPLE).values(), *caches(11)))
    with pytest.raises(UsageError, match="the state 'keys' is .*blocks in 1..100000; .*but .* in 'other'"):
        open_source(Attention().eval(), entries={"main": entry(), "other": other})

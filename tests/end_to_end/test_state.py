"""Several entry points over one set of weights, and state that lasts from call to call."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilewright.compiler.options import Entry
from tilewright.models.initialize import initialize
from tilewright.runtime.errors import UsageError


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def encode(self, ids):
        return F.gelu(self.up(self.table(ids))).mean(1)

    def forward(self, ids):
        return self.down(self.encode(ids)) @ self.table.weight.t()


def test_entry_points_share_weights(make, same):
    module = initialize(TwoTowers(), 0)
    ids = torch.randint(0, 50, (2, 5))
    shapes = {"ids": "batch:1..8,seq:1..16"}
    both = make(module, entries={"main": Entry("forward", (ids,), dynamic_shapes=shapes), "encode": Entry("encode",
    (ids,), dynamic_shapes=shapes)})  # fmt: skip
    alone = make(module, (ids,), shapes)
    assert both.entries == ("main", "encode")
    for sizes in ((2, 5), (1, 1), (8, 16)):
        ids = torch.randint(0, 50, sizes)
        same(both(ids.numpy()), module(ids))
        same(both.entry("encode")(ids.numpy()), module.encode(ids))
    weights = [(model.artifact.path / "weights.safetensors").stat().st_size for model in (both, alone)]
    assert weights[0] == weights[1]
    with pytest.raises(UsageError, match="decode.*main"):
        both.entry("decode")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.full((), 10, dtype=torch.int64))

    def forward(self, x):
        self.count.add_(1)
        return x + self.count

    def peek(self, x):
        return self.count * x


def test_two_entry_points_share_a_counter(make):
    x = torch.ones(3)
    model = make(Counter(), entries={"main": Entry("forward", (x,)), "peek": Entry("peek", (x,))})
    for _ in range(2):  # plain calls start from the initial state
        assert model(x.numpy()).tolist() == [12.0] * 3
    session, other = model.session(), model.session()
    assert [session(x.numpy())[0] for _ in range(3)] == [12, 13, 14]
    assert session.entry("peek")(x.numpy()).tolist() == [13.0] * 3
    assert other.entry("peek")(x.numpy()).tolist() == [10.0] * 3


class Ring(nn.Module):
    """The last four rows that it was given, as a ring, and the place of the next one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(4, 3))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        before = self.rows.clone()
        self.rows.index_copy_(0, self.place, x)
        self.place.copy_((self.place + 1) % 4)
        return self.rows.sum(0), before


def test_a_ring_buffer(make, same):
    model, eager = make(Ring(), (torch.randn(1, 3),)), Ring()
    session = model.session()
    for _ in range(11):
        x = torch.randn(1, 3)
        same(session(x.numpy()), eager(x))


class Crossed(nn.Module):
    """States whose new values are each other's old ones, a shifted view of itself,
    and a value that is also given out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.arange(4.0))
        self.register_buffer("b", torch.arange(4.0) * 10)
        self.register_buffer("c", torch.arange(4.0) - 7)

    def forward(self, x):
        a, b = self.a.clone(), self.b.clone()
        self.a.copy_(b)
        self.b.copy_(a)
        self.c.copy_(self.c.flip(0) + x)
        return self.c, self.a + x, b


def test_states_that_exchange_their_values(make, same):
    model, eager = make(Crossed(), (torch.randn(4),)), Crossed()
    session = model.session()
    for _ in range(5):
        x = torch.randn(4)
        same(session(x.numpy()), eager(x))


class Chained(nn.Module):
    """One state takes the old value of the next, as a delay line does."""

    def __init__(self):
        super().__init__()
        for name in ("c", "b", "a"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x):
        oldest = self.c.clone()
        self.c.copy_(self.b)
        self.b.copy_(self.a)
        self.a.copy_(x)
        return oldest


def test_a_delay_line(make, same):
    model, eager = make(Chained(), (torch.randn(3),)), Chained()
    session = model.session()
    for _ in range(6):
        x = torch.randn(3)
        same(session(x.numpy()), eager(x))


def test_equal_weights_are_stored_once(make):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    model = make(initialize(Twice(), 0), (torch.randn(2, 64),))
    plan = json.loads((model.artifact.path / "plan" / "main.json").read_text())
    assert sum(constant["bytes"] for constant in plan["constants"]) < 1.5 * 64 * 64 * 4

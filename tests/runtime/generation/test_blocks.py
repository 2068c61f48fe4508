"""The block allocator, under random operations."""

from __future__ import annotations

import random

import pytest

from tilewright.runtime.generation.blocks import BlockAllocator


def test_a_fresh_cache_is_used_from_its_front():
    allocator = BlockAllocator(4, 32)
    assert allocator.reserve("a", 33)
    assert allocator.table("a").tolist() == [0, 1]
    assert allocator.reserve("b", 1) and allocator.reserve("a", 65)
    assert allocator.table("a").tolist() == [0, 1, 3]
    allocator.release("a")
    assert allocator.reserve("c", 32) and allocator.table("c").tolist() == [0]


def test_what_does_not_fit_changes_nothing():
    allocator = BlockAllocator(3, 32)
    assert allocator.reserve("a", 64)
    assert not allocator.reserve("a", 32 * 4) and not allocator.reserve("b", 33)
    assert allocator.available == 1 and allocator.owners == 1
    assert allocator.table("b").tolist() == []
    allocator.release("b")
    assert allocator.available == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_lost_or_shared(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    blocks, block = chance.randint(1, 40), chance.choice((1, 4, 32))
    allocator = BlockAllocator(blocks, block)
    expected: dict[int, list[int]] = {}
    for _ in range(400):
        owner = chance.randrange(8)
        if chance.random() < 0.7:
            positions = chance.randint(0, blocks * block + block)
            before, free = list(expected.get(owner, [])), allocator.available
            need = -(-positions // block)
            granted = allocator.reserve(owner, positions)
            assert granted == (need - len(before) <= free)
            after = allocator.table(owner).tolist()
            assert after[: len(before)] == before
            assert len(after) == (max(need, len(before)) if granted else len(before))
            if after:
                expected[owner] = after
        else:
            allocator.release(owner)
            expected.pop(owner, None)
        taken = [number for table in expected.values() for number in table]
        assert len(taken) == len(set(taken)) == blocks - allocator.available
        assert all(0 <= number < blocks for number in taken)
        assert allocator.owners == len(expected)
    for owner in list(expected):
        allocator.release(owner)
    assert allocator.available == blocks

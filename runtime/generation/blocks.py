"""Blocks of the key/value cache: which are free, and which ones every sequence has.

A cache holds a fixed number of blocks, each for a fixed number of positions of one sequence (Kwon et al. 2023, paged
attention). Whoever owns blocks has them until they are released; nothing is ever copied or moved.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

_FIRST_CAPACITY = 8


class BlockAllocator:
    """Gives blocks of a cache to owners and takes them back.

    Blocks that were given back last are given out first, and a fresh cache is used from its front: memory that was
    never used is touched last.
    """

    def __init__(self, blocks: int, block: int) -> None:
        """Start with all blocks free.

        Args:
            blocks: how many the cache has.
            block: positions in one.
        """
        self.blocks = blocks
        self.block = block
        self._free = list(range(blocks - 1, -1, -1))
        self._tables: dict[Hashable, np.ndarray] = {}
        self._counts: dict[Hashable, int] = {}

    @property
    def available(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    @property
    def owners(self) -> int:
        """How many owners have blocks."""
        return len(self._tables)

    def needed(self, positions: int) -> int:
        """How many blocks hold that many positions."""
        return -(-positions // self.block)

    def reserve(self, owner: Hashable, positions: int) -> bool:
        """Let an owner have blocks for its first ``positions`` positions, those that it has already included.

        Returns:
            Whether it has them now. If not, there were too few free blocks, and nothing has changed.
        """
        have = self._counts.get(owner, 0)
        more = self.needed(positions) - have
        if more <= 0:
            return True
        if more > len(self._free):
            return False
        table = self._tables.get(owner)
        if table is None or have + more > len(table):
            grown = np.zeros(max(_FIRST_CAPACITY, 2 * have, have + more), np.int32)
            if table is not None:
                grown[:have] = table[:have]
            self._tables[owner] = table = grown
        table[have : have + more] = self._free[: -more - 1 : -1]
        del self._free[-more:]
        self._counts[owner] = have + more
        return True

    def table(self, owner: Hashable) -> np.ndarray:
        """The blocks of an owner in the order of its positions: int32 [blocks], not to be kept or written."""
        table = self._tables.get(owner)
        return np.zeros(0, np.int32) if table is None else table[: self._counts[owner]]

    def release(self, owner: Hashable) -> None:
        """Take all blocks of an owner back; one that has none may be released too."""
        table = self._tables.pop(owner, None)
        if table is not None:
            self._free += table[: self._counts.pop(owner)][::-1].tolist()

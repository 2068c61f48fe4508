"""A toy decoder whose next token depends on all tokens before it, read through a paged cache of its own."""

from __future__ import annotations

import numpy as np
import pytest

VOCABULARY = 300


def mixed(tokens: np.ndarray, positions: np.ndarray) -> int:
    """A number that depends on every token and its position."""
    terms = (tokens.astype(np.int64) * 1_000_003 + 12_345) * (2 * positions.astype(np.int64) + 1)
    return int((terms ^ (terms >> 7)).sum() % (1 << 31))


def logits_after(tokens: np.ndarray, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Logits of the token after these: float32 [vocabulary]."""
    seed = mixed(np.asarray(tokens), np.arange(len(tokens)))
    x = np.arange(1, vocabulary + 1, dtype=np.int64) * (seed | 1) % 1009
    return (x / 100).astype(np.float32)


def greedy(prompt: list[int], count: int, vocabulary: int = VOCABULARY) -> list[int]:
    """What a request alone generates, computed without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(np.array(tokens), vocabulary).argmax()))
    return tokens[len(prompt) :]


class ToyStep:
    """A ``Step`` over blocks of 4 positions; it checks what it is given, and knows what no sequence has written."""

    def __init__(self, blocks: int, block: int = 4, vocabulary: int = VOCABULARY) -> None:
        self.cache = np.full((blocks, block), -1, np.int64)
        self.vocabulary = vocabulary
        self.shapes: list[tuple[int, ...]] = []
        self.refuse: set[int] = set()  # tokens that make a step fail
        self.failures = 0

    def __call__(self, tokens, positions, starts, contexts, table, rows):
        arguments = (tokens, positions, starts, contexts, table, rows)
        assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arguments)
        number = len(contexts)
        assert len(starts) == number + 1 and starts[0] == 0 and starts[-1] == len(tokens) == len(positions)
        assert table.shape[0] == number and len(rows) >= 1
        self.shapes.append((len(tokens), number, table.shape[1], len(rows)))
        block = self.cache.shape[1]
        used: list[int] = []
        for s in range(number):
            mine = slice(starts[s], starts[s + 1])
            where = positions[mine]
            assert len(where) and (np.diff(where) == 1).all() and where[-1] + 1 == contexts[s]
            used += table[s, : -(-contexts[s] // block)].tolist()
            self.cache[table[s, where // block], where % block] = tokens[mine]
        assert len(set(used)) == len(used), "two sequences have one block"
        if self.refuse & set(tokens.tolist()):
            self.failures += 1
            raise RuntimeError("the toy refuses this token")
        logits = np.zeros((len(rows), self.vocabulary), np.float32)
        for place, row in enumerate(rows):
            s = int(np.searchsorted(starts, row, side="right")) - 1
            at = np.arange(positions[row] + 1)
            seen = self.cache[table[s, at // block], at % block]
            assert (seen >= 0).all(), "a position that was never written"
            logits[place] = logits_after(seen, self.vocabulary)
        return logits


@pytest.fixture
def toy():
    """The toy's parts: ``toy.Step``, ``toy.greedy``, ``toy.logits``, ``toy.vocabulary``."""

    class Toy:
        Step = ToyStep
        vocabulary = VOCABULARY

    Toy.greedy, Toy.logits = staticmethod(greedy), staticmethod(logits_after)
    return Toy

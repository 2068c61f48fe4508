"""Continuous batching: which tokens of which sequences the next step computes, within the blocks that there are.

Every step takes the next token of every running sequence, and fills the rest of its token limit with parts of prompts.
Sequences are admitted in the order in which they came. One that needs a block when none is free takes it from the one
that came last; that one waits, and later computes its keys and values again. What was generated stays, so it goes on
as if nothing had happened. The oldest sequence can take every block, so there is always progress.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

import numpy as np

from .blocks import BlockAllocator


class Step(Protocol):
    """The model: one step over the tokens of several sequences, whose keys and values it keeps."""

    def __call__(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        starts: np.ndarray,
        contexts: np.ndarray,
        table: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """Run a step; all arguments are int32.

        Args:
            tokens: [tokens], sequence after sequence.
            positions: [tokens], of each token in its sequence.
            starts: [sequences + 1]; the tokens of sequence s are ``starts[s]`` to ``starts[s + 1] - 1``.
            contexts: [sequences], positions in the cache with the new tokens.
            table: [sequences, width], the blocks of every sequence.
            rows: [rows], the tokens whose logits are wanted.

        Returns:
            float32 [rows, vocabulary].
        """


class Sequence:
    """Token ids of a prompt and what was generated after it, and how many of them the cache holds."""

    def __init__(self, prompt: Items[int] | np.ndarray, limit: int) -> None:
        """Start with a prompt.

        Args:
            prompt: token ids, at least one.
            limit: how many tokens there may be in all.
        """
        self.length = len(prompt)
        self.cached = 0
        self.preempted = 0
        self.running = False
        self._tokens = np.empty(max(limit, self.length), np.int32)
        self._tokens[: self.length] = prompt

    @property
    def tokens(self) -> np.ndarray:
        """All tokens so far: int32 [length]."""
        return self._tokens[: self.length]

    def append(self, token: int) -> None:
        """Add a generated token."""
        self._tokens[self.length] = token
        self.length += 1


class Results(NamedTuple):
    """What came out of a step.

    Attributes:
        sequences: those that are at their last token.
        logits: of their next tokens, float32 [sequences, vocabulary].
        failed: sequences that were removed, with the errors that ended them.
    """

    sequences: list[Sequence]
    logits: np.ndarray
    failed: list[tuple[Sequence, Exception]]


class Share(NamedTuple):
    """How many tokens of a sequence a step computes."""

    sequence: Sequence
    size: int


class Scheduler:
    """Runs sequences step by step."""

    def __init__(
        self, step: Step, allocator: BlockAllocator, *, max_tokens: int, max_sequences: int, max_width: int
    ) -> None:
        """Start without sequences.

        Args:
            step: the model.
            allocator: the blocks of its cache.
            max_tokens: the most tokens of a step; longer prompts are cut into parts.
            max_sequences: the most sequences that run at the same time.
            max_width: the most columns that the step's table may have.
        """
        self.allocator = allocator
        self.running: list[Sequence] = []  # in the order in which they came
        self.waiting: deque[Sequence] = deque()
        self.steps = 0
        self._step = step
        self._max_tokens = max_tokens
        self._max_sequences = min(max_sequences, max_tokens)
        self._max_width = max_width

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn. The caller has checked that it fits the cache when it is alone there."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and take its blocks back; one that is not there may be removed too."""
        if sequence in self.running:
            self.running.remove(sequence)
            sequence.running = False
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.allocator.release(sequence)

    def run(self) -> Results:
        """Compute one step.

        If it fails, each of its sequences is tried alone: those that are to blame are removed, the others unharmed.

        Returns:
            What came out. To go on with a sequence, append a token to it; to end it, remove it.
        """
        shares = self._choose()
        if not shares:
            return _NOTHING
        self.steps += 1
        try:
            return Results(*self._compute(shares), [])
        except Exception as error:
            if len(shares) == 1:
                return self._gathered([], [(shares[0].sequence, error)])
        done: list[tuple[list[Sequence], np.ndarray]] = []
        failed: list[tuple[Sequence, Exception]] = []
        for share in shares:
            try:
                done.append(self._compute([share]))
            except Exception as error:
                failed.append((share.sequence, error))
        return self._gathered([one for one in done if one[0]], failed)

    def _gathered(
        self, done: list[tuple[list[Sequence], np.ndarray]], failed: list[tuple[Sequence, Exception]]
    ) -> Results:
        for sequence, _ in failed:
            self.remove(sequence)
        sequences = [sequence for part, _ in done for sequence in part]
        return Results(sequences, np.concatenate([rows for _, rows in done]) if done else _NOTHING.logits, failed)

    def _choose(self) -> list[Share]:
        """The parts of the next step: single tokens first, then prompts, each from the oldest sequence on."""
        left = self._max_tokens
        shares: list[Share] = []
        for sequence in [one for one in self.running if one.length - one.cached == 1]:
            if left and self._reserve(sequence):
                shares.append(Share(sequence, 1))
                left -= 1
        if not left:
            return shares
        for sequence in self.running:
            if (pending := sequence.length - sequence.cached) > 1 and left:
                shares.append(Share(sequence, min(pending, left)))  # its blocks were reserved when it was admitted
                left -= shares[-1].size
        while left and self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            # A block to spare for each that runs already: else the newcomer would soon have to make room again.
            enough = self.allocator.needed(sequence.length) + len(self.running) <= self.allocator.available
            if not enough or not self.allocator.reserve(sequence, sequence.length):
                break
            self.running.append(self.waiting.popleft())
            sequence.running = True
            shares.append(Share(sequence, min(sequence.length, left)))
            left -= shares[-1].size
        return shares

    def _reserve(self, sequence: Sequence) -> bool:
        """Get the block for a sequence's next position, if need be from those that came last.

        Returns:
            False if it had to stop running itself, now or for an older one before.
        """
        if not sequence.running:
            return False
        while not self.allocator.reserve(sequence, sequence.length):
            last = self.running.pop()
            self.allocator.release(last)
            last.running, last.cached = False, 0
            last.preempted += 1
            self.waiting.appendleft(last)
            if last is sequence:
                return False
        return True

    def _compute(self, shares: Items[Share]) -> tuple[list[Sequence], np.ndarray]:
        arguments, finished = self._arguments(shares)
        logits = self._step(*arguments)
        for share in shares:
            share.sequence.cached += share.size
        return finished, logits[: len(finished)]

    def _arguments(self, shares: Items[Share]) -> tuple[tuple[np.ndarray, ...], list[Sequence]]:
        """The arrays of a step, and the sequences that its rows belong to."""
        number = len(shares)
        starts = np.zeros(number + 1, np.int32)
        np.cumsum([share.size for share in shares], out=starts[1:])
        total = int(starts[-1])
        tokens, positions = np.empty(total, np.int32), np.empty(total, np.int32)
        contexts = np.empty(number, np.int32)
        tables, rows, finished = [], [], []
        begin = 0
        for place, (sequence, count) in enumerate(shares):
            first, end = sequence.cached, begin + count
            context = first + count
            contexts[place] = context
            if count == 1:
                tokens[begin] = sequence.tokens[first]
                positions[begin] = first
            else:
                tokens[begin:end] = sequence.tokens[first:context]
                positions[begin:end] = np.arange(first, context)
            tables.append(self.allocator.table(sequence)[: self.allocator.needed(context)])
            if context == sequence.length:
                rows.append(end - 1)
                finished.append(sequence)
            begin = end
        # Widths are powers of two: what the runtime works out per combination of shapes is then seldom new.
        widest = max([len(blocks) for blocks in tables])
        table = np.zeros((number, min(1 << (widest - 1).bit_length(), self._max_width)), np.int32)
        for place, blocks in enumerate(tables):
            table[place, : len(blocks)] = blocks
        # A model always gives a row; if all tokens are amid prompts, that of the last is not looked at.
        wanted = np.array(rows or [total - 1], np.int32)
        return (tokens, positions, starts, contexts, table, wanted), finished


_NOTHING = Results([], np.zeros((0, 0), np.float32), [])

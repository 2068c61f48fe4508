"""Inputs for one step of a decoder: sequences of different lengths, some beginning and some going on.

A step's inputs depend on each other (a sequence's tokens follow its context, its blocks hold it, no block belongs to
two), so they cannot be drawn one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...models.decoder import Config
from ...passes.graph.cache_ops import BLOCK


def step_inputs(config: Config, context: int, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Legal inputs of ``Decoder.step`` but for the caches, by name.

    Blocks are dealt out evenly and in random order; every sequence that has one gets a token, the first ones as many of
    the rest as they can hold. Behind them, part of what is left of its blocks is taken for a sequence's past. Tokens
    that no sequence can hold are padding.

    Args:
        config: of the decoder.
        context: most positions of a sequence.
        sizes: of ``tokens``, ``sequences``, ``width``, ``rows`` and ``blocks``.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator)

    tokens, sequences, blocks = sizes["tokens"], sizes["sequences"], sizes["blocks"]
    order = torch.randperm(blocks, generator=generator)
    held: list[int] = []
    for sequence in range(sequences):
        share = -(-(blocks - sum(held)) // (sequences - sequence))
        held.append(min(share, sizes["width"], -(-context // BLOCK)))
    room = [min(count * BLOCK, context) for count in held]
    new, left = [0] * sequences, tokens
    for most in (1, context):
        for sequence in range(sequences):
            more = min(most, room[sequence] - new[sequence], left)
            new[sequence], left = new[sequence] + more, left - more
    past = [int(draw(0, room[sequence] - new[sequence])) for sequence in range(sequences)]
    positions = [torch.arange(past[sequence], past[sequence] + new[sequence]) for sequence in range(sequences)]
    table = torch.zeros(sequences, sizes["width"], dtype=torch.int64)
    for sequence, count in enumerate(held):
        table[sequence, :count], order = order[:count], order[count:]
    made = {
        "tokens": draw(0, config.vocabulary - 1, tokens),
        "positions": torch.cat((*positions, torch.zeros(left, dtype=torch.int64))),
        "starts": torch.tensor([0, *new]).cumsum(0),
        "contexts": torch.tensor(past) + torch.tensor(new),
        "table": table,
        "rows": draw(0, tokens - 1, sizes["rows"]),
    }
    return {name: tensor.to(torch.int32) for name, tensor in made.items()}

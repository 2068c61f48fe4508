"""Continuous batching over the toy decoder: every sequence comes out as when it is alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tilewright.runtime.generation.blocks import BlockAllocator
from tilewright.runtime.generation.scheduler import Scheduler, Sequence


def scheduler(step, **limits):
    blocks, block = step.cache.shape
    options = {"max_tokens": 16, "max_sequences": 8, "max_width": 16} | limits
    return Scheduler(step, BlockAllocator(blocks, block), **options)


def drive(made, sequences, counts, late=()):
    """Run until all sequences have their number of tokens; returns what was generated. Late ones come one per step."""
    late = list(late)
    texts = {sequence: [] for sequence in sequences}
    errors = {}
    for _ in range(2000):
        if late:
            made.add(late.pop(0))
        if not made.running and not made.waiting:
            break
        found = made.run()
        errors.update(found.failed)
        for sequence, logits in zip(found.sequences, found.logits, strict=True):
            token = int(logits.argmax())
            texts[sequence].append(token)
            if len(texts[sequence]) == counts[sequence]:
                made.remove(sequence)
            else:
                sequence.append(token)
    assert not made.running and not made.waiting
    assert made.allocator.available == made.allocator.blocks and made.allocator.owners == 0
    return texts, errors


@pytest.mark.parametrize("seed", range(12))
def test_batches_of_all_kinds_come_out_as_alone(toy, seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    blocks = chance.choice((10, 16, 60))
    step = toy.Step(blocks)
    made = scheduler(step, max_tokens=chance.choice((3, 16, 64)), max_sequences=chance.choice((1, 3, 8)))
    sequences, counts = [], {}
    for _ in range(14):
        prompt = [chance.randrange(toy.vocabulary) for _ in range(chance.randint(1, 25))]
        count = chance.randint(1, 40 - len(prompt))
        sequences.append(Sequence(prompt, len(prompt) + count))
        counts[sequences[-1]] = count
    prompts = {sequence: sequence.tokens.tolist() for sequence in sequences}
    for sequence in sequences[:7]:
        made.add(sequence)
    texts, errors = drive(made, sequences, counts, sequences[7:])
    assert not errors
    for sequence in sequences:
        assert texts[sequence] == toy.greedy(prompts[sequence], counts[sequence])
    if blocks == 10 and made._max_sequences > 1:
        assert any(sequence.preempted for sequence in sequences)
    assert all(tokens <= made._max_tokens for tokens, *_ in step.shapes)
    assert {width for _, _, width, _ in step.shapes} <= {1, 2, 4, 8, 16}


def test_a_chunked_prompt_is_a_whole_prompt(toy):
    prompt = list(range(50))
    for limit in (1, 7, 50, 64):
        step = toy.Step(20)
        made = scheduler(step, max_tokens=limit)
        sequence = Sequence(prompt, 60)
        made.add(sequence)
        texts, _ = drive(made, [sequence], {sequence: 10})
        assert texts[sequence] == toy.greedy(prompt, 10)
        assert step.shapes[0][0] == min(limit, 50)


def test_the_youngest_makes_room_and_goes_on_later(toy):
    step = toy.Step(6)  # 24 positions
    made = scheduler(step)
    old, young = Sequence([1, 2, 3, 4], 20), Sequence([5, 6, 7, 8, 9], 20)
    for sequence in (old, young):
        made.add(sequence)
    texts, _ = drive(made, [old, young], {old: 16, young: 15})
    assert texts[old] == toy.greedy([1, 2, 3, 4], 16) and texts[young] == toy.greedy([5, 6, 7, 8, 9], 15)
    assert (old.preempted, young.preempted) == (0, 1)


def test_decoding_goes_on_while_a_long_prompt_comes_in(toy):
    step = toy.Step(40)
    made = scheduler(step, max_tokens=8)
    first = Sequence([1, 2, 3], 40)
    made.add(first)
    made.run().sequences[0].append(9)
    made.add(Sequence(list(range(30)), 31))
    found = made.run()  # its next token, and 7 tokens of the prompt
    assert found.sequences == [first] and step.shapes[-1] == (8, 2, 2, 1)


def test_steps_amid_a_prompt_want_no_rows(toy):
    step = toy.Step(20)
    made = scheduler(step, max_tokens=4)
    made.add(Sequence(list(range(10)), 11))
    assert [len(made.run().sequences) for _ in range(3)] == [0, 0, 1]


def test_an_error_ends_the_sequence_that_is_to_blame(toy):
    step = toy.Step(40)
    step.refuse = {299}
    made = scheduler(step, max_tokens=64)
    prompts = [[1, 2, 3], [4, 299, 5], [6, 7]]
    sequences = [Sequence(prompt, 20) for prompt in prompts]
    for sequence in sequences:
        made.add(sequence)
    texts, errors = drive(made, sequences, dict.fromkeys(sequences, 3))
    assert list(errors) == [sequences[1]] and "refuses" in str(errors[sequences[1]])
    assert texts[sequences[0]] == toy.greedy(prompts[0], 3) and texts[sequences[2]] == toy.greedy(prompts[2], 3)
    assert step.failures == 2  # in the batch, and alone


def test_a_removed_sequence_gives_its_blocks_back(toy):
    step = toy.Step(20)
    made = scheduler(step)
    kept, gone, waits = (Sequence([n, n + 1, n + 2], 20) for n in (1, 5, 9))
    for sequence in (kept, gone):
        made.add(sequence)
    found = made.run()
    for sequence, logits in zip(found.sequences, found.logits, strict=True):
        sequence.append(int(logits.argmax()))
    made.add(waits)
    made.remove(gone)
    made.remove(waits)
    made.remove(waits)
    assert made.allocator.owners == 1
    texts, _ = drive(made, [kept], {kept: 4})
    assert texts[kept] == toy.greedy([1, 2, 3], 5)[1:]
    assert made.run().sequences == []


def test_decode_steps_have_few_shapes(toy):
    step = toy.Step(100)
    made = scheduler(step, max_width=20)
    sequences = [Sequence([n], 70) for n in range(3)]
    for sequence in sequences:
        made.add(sequence)
    drive(made, sequences, dict.fromkeys(sequences, 69))
    assert len(set(step.shapes)) == 6  # widths 1, 2, 4, 8, 16, 20
    assert np.array(step.shapes)[:, 2].max() == 20

"""Requests over the toy decoder: text, stops, limits, cancelling, errors, and what is refused."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.generation.calls import Need, default_blocks, params_for
from tilewright.runtime.generation.description import Generation
from tilewright.runtime.generation.generator import Generator
from tilewright.runtime.generation.request import Request
from tilewright.runtime.generation.sampling import SamplingParams
from tilewright.runtime.generation.stream import Stream
from tilewright.runtime.generation.text import ByteText

BYTES = ByteText(None)
PARAMS = SamplingParams(max_tokens=12)


def described(**changes) -> Generation:
    values = {"entry": "step", "context": 64, "block": 4, "vocabulary": 300, "max_tokens": 16, "max_sequences": 8}
    values |= {"bos": None, "eos": (), "layers": 1, "kv_heads": 1, "head_size": 8, "cache_dtype": "float32"}
    return Generation(**values | {"tokenizer": "bytes"} | changes)


@pytest.fixture
def make(toy):
    made = []

    def build(blocks=40, text=BYTES, step=None, **changes) -> Generator:
        made.append(Generator(described(**changes), step or toy.Step(blocks), blocks, text))
        return made[-1]

    yield build
    for generator in made:
        assert not generator.busy and generator.free_blocks == generator.blocks


def as_text(tokens):
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def test_prompts_are_continued(make, toy):
    prompts = ["Hello", [1, 2, 299], np.array([7, 8], np.int64)]
    found = make().generate(prompts, [PARAMS] * 3)
    for completion, prompt in zip(found, [list(b"Hello"), [1, 2, 299], [7, 8]], strict=True):
        expected = toy.greedy(prompt, 12)
        assert completion.tokens == tuple(expected) and completion.text == as_text(expected)
        assert (completion.finish, completion.stopped_by, completion.error) == ("length", None, None)
        assert completion.prompt_tokens == len(prompt) and completion.logprobs is None and completion.seed is None
        assert 0 < completion.first_seconds <= completion.seconds and completion.tokens_per_second > 0


def test_a_stream_gives_the_same(make):
    generator = make()
    (whole,) = generator.generate(["Hello"], [SamplingParams(max_tokens=12, logprobs=2)])
    with Stream(generator, generator.submit("Hello", SamplingParams(max_tokens=12, logprobs=2))) as stream:
        pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == whole.text == stream.completion.text
    assert tuple(piece.token for piece in pieces) == whole.tokens
    assert tuple(piece.logprobs for piece in pieces) == whole.logprobs == stream.completion.logprobs
    assert [piece.finish for piece in pieces] == [None] * 11 + ["length"]
    assert all(entry.chosen == entry.top[0][1] for entry in whole.logprobs)  # greedy takes the likeliest


def test_without_a_tokenizer_there_are_tokens_only(make, toy):
    generator = make(text=None, tokenizer=None)
    (found,) = generator.generate([[5]], [PARAMS])
    assert found.text == "" and list(found.tokens) == toy.greedy([5], 12)
    with pytest.raises(UsageError, match="no tokenizer .* token ids"):
        generator.submit("text", PARAMS)
    with pytest.raises(UsageError, match="stop: the artifact has no tokenizer"):
        generator.submit([5], SamplingParams(stop="x"))


def test_stop_tokens_and_the_end_of_text(make, toy):
    expected = toy.greedy([3, 4], 12)
    end = expected[5]
    first = expected.index(end)
    (found,) = make(eos=(end,)).generate([[3, 4]], [PARAMS])
    assert found.tokens == tuple(expected[: first + 1]) and found.text == as_text(expected[:first])
    assert (found.finish, found.stopped_by) == ("stop", end)
    (found,) = make(eos=(end,)).generate([[3, 4]], [SamplingParams(max_tokens=12, ignore_eos=True)])
    assert list(found.tokens) == expected and found.finish == "length"
    (found,) = make().generate([[3, 4]], [SamplingParams(max_tokens=12, stop=[end])])
    assert found.tokens == tuple(expected[: first + 1]) and found.stopped_by == end


class Script:
    """A step that says a text byte by byte, whatever the prompt."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __call__(self, tokens, positions, starts, contexts, table, rows):
        logits = np.zeros((len(rows), 300), np.float32)
        for place, row in enumerate(rows):
            logits[place, self.content[positions[row]]] = 1  # prompts have one token
        return logits


def said(make, content: bytes, **options):
    generator = make(step=Script(content), blocks=40)
    params = SamplingParams(**{"max_tokens": len(content)} | options)
    with Stream(generator, generator.submit([0], params)) as stream:
        pieces = [piece.text for piece in stream]
    assert "".join(pieces) == stream.completion.text
    return pieces, stream.completion


def test_stop_strings_across_tokens(make):
    pieces, found = said(make, b"one END two", stop=["END", "zzz"])
    assert pieces == ["o", "n", "e", " ", "", "", ""]
    assert (found.text, found.finish, found.stopped_by, len(found.tokens)) == ("one ", "stop", "END", 7)
    pieces, found = said(make, b"one EN", stop="END")  # what was held back belongs to the text after all
    assert pieces[-1] == "EN" and (found.text, found.finish) == ("one EN", "length")


def test_characters_are_never_split(make):
    pieces, found = said(make, "né 中🙂".encode())
    assert pieces == ["n", "", "é", " ", "", "", "中", "", "", "", "🙂"]
    pieces, found = said(make, "a中".encode()[:-1])
    assert pieces == ["a", "", "\ufffd"] and found.text == "a\ufffd"
    pieces, found = said(make, "a中".encode()[:-1], stop="\ufffd")  # found in what the end brings
    assert (found.text, found.stopped_by) == ("a", "\ufffd")
    pieces, found = said(make, b"a\xf0\x9f.", stop=[ord(".")])
    assert found.text == "a\ufffd" and found.stopped_by == ord(".")


def test_seeds_reproduce_in_any_company(make):
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9}
    alone = make().generate([[5, 6]], [SamplingParams(**options, seed=42)])[0]
    assert alone.seed == 42
    mixed = [SamplingParams(**options, seed=1), PARAMS, SamplingParams(**options, seed=42)]
    assert make(blocks=12).generate([[9], [3, 4, 5], [5, 6]], mixed)[2].tokens == alone.tokens
    free = make().generate([[5, 6]], [SamplingParams(**options)])[0]
    again = make().generate([[5, 6]], [SamplingParams(**options, seed=free.seed)])[0]
    assert again.tokens == free.tokens


def test_a_cache_too_small_for_all_at_once(make, toy):
    prompts = [[n, n + 1, n + 2] for n in range(0, 40, 3)]
    found = make(blocks=9).generate(prompts, [SamplingParams(max_tokens=20)] * len(prompts))
    for completion, prompt in zip(found, prompts, strict=True):
        assert list(completion.tokens) == toy.greedy(prompt, 20)
    assert sum(completion.preempted for completion in found) > 0


def test_without_a_number_the_context_or_the_cache_is_filled(make):
    (found,) = make().generate([[1, 2]], [SamplingParams()])
    assert len(found.tokens) == 62 and found.finish == "length"
    (found,) = make(blocks=5).generate([[1, 2]], [SamplingParams()])
    assert len(found.tokens) == 18


@pytest.mark.parametrize(
    "prompt, params, error, message",
    [
        (list(range(64)), PARAMS, InputError, "prompt has 64 tokens, and the model's context is 64"),
        (list(range(60)), PARAMS, InputError, "together 72, .* context is 64; ask for at most 4"),
        (list(range(30)), PARAMS, InputError,
         r"needs 42 positions \(30 of the prompt, 12 to generate\), but the cache has 40 \(10 blocks of 4\); raise "
         "cache_tokens to 42"),
        (list(range(41)), SamplingParams(), InputError, "needs 42 positions .* cache has 40"),
        ("", PARAMS, UsageError, "prompt is empty"),
        ([], PARAMS, UsageError, "prompt is empty"),
        ("a\udcff", PARAMS, InputError, "not valid Unicode: character 1"),
        ([5, 300], PARAMS, InputError, "the token 300, but the model's are 0 to 299"),
        ([-1], PARAMS, InputError, "the token -1"),
        ([1.5], PARAMS, UsageError, "a string or a list of token ids, not list"),
        (b"bytes", PARAMS, UsageError, "not bytes"),
        (7, PARAMS, UsageError, "not int 7"),
        ([1], SamplingParams(stop=300), UsageError, "stop: there is no token 300"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_once(make, toy, prompt, params, error, message):
    generator = make(blocks=10)
    with pytest.raises(error, match=message):
        generator.submit(prompt, params)
    with pytest.raises(error, match=f"prompt 1: .*{message}"):
        generator.generate([[1], prompt], [PARAMS, params])
    assert not generator._step.shapes
    first, second = generator.generate([[1], prompt], [PARAMS, params], keep_errors=True)
    assert list(first.tokens) == toy.greedy([1], 12)
    assert second.finish == "error" and isinstance(second.error, error) and second.tokens == ()


def test_a_failing_request_leaves_the_others_unharmed(make, toy):
    step = toy.Step(40)
    step.refuse = {298}
    generator = make(step=step)
    found = generator.generate([[1, 2], [298], [3]], [PARAMS] * 3, keep_errors=True)
    assert [one.finish for one in found] == ["length", "error", "length"]
    assert "refuses" in str(found[1].error)
    assert list(found[0].tokens) == toy.greedy([1, 2], 12) and list(found[2].tokens) == toy.greedy([3], 12)
    with pytest.raises(RuntimeError, match="refuses"):
        generator.generate([[1, 2], [298], [3]], [PARAMS] * 3)
    assert not generator.busy


def test_numbers_that_are_not_finite_fail_their_request(make, toy):
    inner = toy.Step(40)

    def step(*arguments):
        logits = inner(*arguments)
        logits[arguments[0][arguments[5]] == 77] = math.nan
        return logits

    generator = make(step=step)
    first, second = generator.generate([[77], [3]], [PARAMS] * 2, keep_errors=True)
    assert first.finish == "error" and "largest logit is nan" in str(first.error)
    assert list(second.tokens) == toy.greedy([3], 12)
    with pytest.raises(InputError, match="prompt 0: .*nan"):
        generator.generate([[77], [3]], [PARAMS] * 2)


def test_cancelling_returns_blocks_and_text(make, toy):
    generator = make()
    gone, kept = generator.submit([1, 2], PARAMS), generator.submit([3], PARAMS)
    for _ in range(4):
        generator.step()
    generator.cancel(gone)
    generator.cancel(gone)
    assert gone.completion().finish == "cancelled" and len(gone.tokens) == 4
    late = generator.submit([5], PARAMS)
    while generator.busy:
        generator.step()
    assert kept.tokens == toy.greedy([3], 12) and late.tokens == toy.greedy([5], 12)


@pytest.mark.parametrize("seed", range(6))
def test_requests_come_go_and_fail_at_random(make, toy, seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    step = toy.Step(chance.choice((10, 25)))
    step.refuse = {299}
    generator = make(blocks=len(step.cache), step=step)
    asked: list[tuple[Request, list[int], int]] = []
    while len(asked) < 30 or generator.busy:
        if len(asked) < 30 and chance.random() < 0.6:
            prompt = [chance.randrange(290) for _ in range(chance.randint(1, 20))]
            if chance.random() < 0.1:
                prompt[-1] = 299
            count = chance.randint(1, 15)
            asked.append((generator.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True)), prompt, count))
        if asked and chance.random() < 0.05:
            generator.cancel(chance.choice(asked)[0])
        generator.step()
    assert {request.finish for request, _, _ in asked} <= {"length", "cancelled", "error"}
    for request, prompt, count in asked:
        expected = toy.greedy(prompt, count)
        assert request.tokens == expected[: len(request.tokens)]
        if request.finish == "length":
            assert len(request.tokens) == count
        if request.finish == "error":
            assert "refuses" in str(request.error) and 299 in [*prompt, *request.tokens]


@pytest.mark.parametrize("how", ["close", "with", "drop", "error"])
def test_a_stream_that_ends_early_frees_its_blocks(make, how):
    generator = make()
    stream = Stream(generator, generator.submit([1, 2], PARAMS))
    next(stream)
    assert generator.free_blocks < generator.blocks
    if how == "close":
        stream.close()
        assert stream.completion.finish == "cancelled" and len(stream.completion.tokens) == 1
        assert list(stream) == []
    elif how == "with":
        with stream:
            pass
    elif how == "drop":
        del stream
    else:
        with pytest.raises(ZeroDivisionError), stream:
            raise ZeroDivisionError
    assert generator.free_blocks == generator.blocks


def test_an_interrupt_ends_everything_cleanly(make, toy):
    inner = toy.Step(40)
    calls = []

    def step(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return inner(*arguments)

    generator = make(step=step)
    request = generator.submit([4], PARAMS)
    with pytest.raises(KeyboardInterrupt):
        generator.generate([[1], [2]], [PARAMS] * 2)
    assert request.finish == "cancelled" and len(request.tokens) == 4
    assert list(generator.generate([[1]], [PARAMS])[0].tokens) == toy.greedy([1], 12)


def test_a_closed_generator_says_so(make):
    generator = make()
    generator.submit([1], PARAMS)
    generator.close()
    generator.close()
    with pytest.raises(UsageError, match="generator is closed"):
        generator.submit([1], PARAMS)


def test_parameters_of_many_prompts():
    assert [one.seed for one in params_for(3, {"seed": 7})] == [7, 8, 9]
    assert [one.seed for one in params_for(2, {"seed": [4, 4]})] == [4, 4]
    assert params_for(0, {"seed": 1}) == [] and params_for(2, {}) == [SamplingParams()] * 2
    with pytest.raises(UsageError, match="3 seeds for 2 prompts"):
        params_for(2, {"seed": [1, 2, 3]})
    with pytest.raises(UsageError, match="no parameter 'temp'; there are max_tokens, temperature"):
        params_for(1, {"temp": 1})


def test_the_cache_that_is_made_by_itself():
    model = described(context=4096, block=32, layers=16, kv_heads=8, head_size=64, max_sequences=3)
    assert model.block_bytes == 2 * 16 * 8 * 64 * 32 * 4
    limit = (1 << 30) // model.block_bytes
    assert default_blocks(model, ()) == 128
    assert default_blocks(model, [Need(40, 40)] * 2) == 4
    assert default_blocks(model, [Need(40, 40)] * 5) == 6  # no more run at the same time
    assert default_blocks(model, [Need(2, 4096)] * 9) == 3 * 128
    more = described(context=4096, block=32, layers=16, kv_heads=8, head_size=64)
    assert default_blocks(more, [Need(2, 4096)] * 9) == limit < 8 * 128
    huge = described(context=1 << 20, block=32, layers=64, kv_heads=32, head_size=128)
    assert default_blocks(huge, ()) * huge.block_bytes <= 1 << 30
    assert default_blocks(huge, [Need(100_000, 100_000)]) == 3125

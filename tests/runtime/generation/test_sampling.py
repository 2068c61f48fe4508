"""Sampling against what it says it does, written out slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.generation.sampling import (
    Choice,
    Sampler,
    SamplingParams,
    _filtered,
    _largest,
    _place,
    choose_all,
    logprobs_of,
)


def numbers(size=50, seed=0, spread=2.0):
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def kept(logits, params):
    """Ids that may be drawn, likeliest first, by the definitions of the filters."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = np.exp((logits - logits.max()).astype(np.float64) / params.heat)
    if params.top_k is not None:
        order = order[: params.top_k]
    if params.top_p is not None:
        total, mass = weights[order].sum(), 0.0
        for count, token in enumerate(order):
            if mass >= params.top_p * total:
                order = order[:count]
                break
            mass += weights[token]
    if params.min_p is not None:
        order = [token for token in order if weights[token] >= params.min_p]
    return order


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "filters",
    [{"top_k": 1}, {"top_k": 7}, {"top_k": 5000}, {"top_p": 0.5}, {"top_p": 0.999}, {"min_p": 0.1}, {"min_p": 1.0},
     {"top_k": 20, "top_p": 0.7}, {"top_p": 0.9, "min_p": 0.05}, {"top_k": 9, "min_p": 0.2}],
)  # fmt: skip
def test_filters_keep_what_they_say(filters, seed):
    params = SamplingParams(temperature=0.7, **filters)
    logits = numbers(2000, seed)
    logits[17] = logits[3]  # equal ones go by their ids
    shifted = (logits - logits.max()) / np.float32(0.7)
    ids = _filtered(shifted, params)
    assert (list(range(2000)) if ids is None else ids.tolist()) == sorted(kept(logits, params))


@pytest.mark.parametrize("seed", range(4))
def test_a_place_is_where_the_cumulative_sum_passes(seed):
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for size in (1, 3, 511, 512, 513, 2000):
        weights = random.random(size).astype(np.float32) * (random.random(size) < 0.5)
        weights[random.integers(size)] = 1
        sums = weights.astype(np.float64).cumsum()
        for at in (0.0, 1 - 2**-53, *random.random(30)):
            place = _place(weights, at)
            assert weights[place] > 0
            below = sums[place] - weights[place]
            assert below - 1e-9 <= at * sums[-1] <= sums[place] + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_are_found_with_ties(seed):
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for size in (1, 7, 100):
        values = random.integers(0, 5, size).astype(np.float32)
        for count in range(1, size + 2):
            order = sorted(range(size), key=lambda index: (-values[index], index))  # noqa: B023
            assert _largest(values, count).tolist() == sorted(order[:count])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [1, 2, 50, 10**9])
def test_the_largest_are_found_among_candidates(levels, seed):
    """Enough values that most are passed over; with few levels, nearly all of them are equal."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    for size in (2048, 2500, 20011):
        values = random.integers(0, levels, size).astype(np.float32)
        values[random.random(size) < 0.3] = -np.inf
        values[100:140] += 5  # neighbours
        order = np.argsort(-values, kind="stable")
        for count in (1, 5, 40, 256, 600, size - 1):
            assert (_largest(values, count) == np.sort(order[:count])).all()


@pytest.mark.parametrize("share", [1e-6, 0.4, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 6.0])
def test_a_nucleus_is_found_among_few_and_among_many(spread, share):
    logits = numbers(9001, 5, spread)
    logits[[17, 4000]] = logits[[3, 18]]
    params = SamplingParams(temperature=1.0, top_p=share)
    assert _filtered(logits - logits.max(), params).tolist() == sorted(kept(logits, params))


def test_draws_have_the_right_frequencies():
    logits = numbers(8)
    params = SamplingParams(temperature=1.5, top_k=5, seed=3)
    sampler = Sampler(params, [0], 8)
    counts = np.bincount([sampler.choose(logits).token for _ in range(5000)], minlength=8)
    weights = np.zeros(8)
    ids = kept(logits, params)
    weights[ids] = np.exp(logits[ids] / 1.5)
    expected = 5000 * weights / weights.sum()
    assert (counts[weights == 0] == 0).all()
    chi2 = (((counts - expected) ** 2)[ids] / expected[ids]).sum()
    assert chi2 < 23.5  # four degrees of freedom, one seed: p = 1e-4


def test_greedy_takes_the_first_of_the_largest():
    logits = np.array([[1, 3, 3], [0, 0, 0]], np.float32)
    samplers = [Sampler(SamplingParams(), [0], 3)] * 2
    assert choose_all(samplers, logits) == [Choice(1, None), Choice(0, None)]
    for params in (SamplingParams(temperature=0, top_k=2, top_p=0.5), SamplingParams(temperature=1e-9, seed=1)):
        assert Sampler(params, [0], 50).choose(numbers()).token == int(numbers().argmax())


def test_a_seed_reproduces_whatever_else_runs():
    logits = np.stack([numbers(seed=seed) for seed in range(30)])
    params = SamplingParams(seed=7, top_p=0.95)
    alone = Sampler(params, [0], 50)
    tokens = [alone.choose(row).token for row in logits]
    among = Sampler(params, [0], 50)
    others = [Sampler(SamplingParams(seed=1), [0], 50), Sampler(SamplingParams(), [0], 50)]
    for row, token in zip(logits, tokens, strict=True):
        batch = np.stack([numbers(seed=99), row, row])
        assert choose_all([others[0], among, others[1]], batch)[1].token == token
    again = Sampler(SamplingParams(top_p=0.95), [0], 50)  # its seed comes from the system, and is told
    drawn = [again.choose(row).token for row in logits]
    same = Sampler(SamplingParams(top_p=0.95, seed=again.seed), [0], 50)
    assert [same.choose(row).token for row in logits] == drawn


def test_repetition_penalty_counts_prompt_and_output():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0, 1], 4)
    logits = np.array([5, -1, 3, -1.5], np.float32)
    assert sampler.choose(logits).token == 2  # 5 / 2 < 3
    assert sampler.choose(logits).token == 0  # now 3 / 2 < 5 / 2
    assert logits.tolist() == [5, -1, 3, -1.5]
    low = np.array([-9, -1, -9, -1.5], np.float32)
    assert sampler.choose(low).token == 3  # -1 * 2 < -1.5


def test_logprobs_are_the_models_own():
    logits = numbers(200)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    choice = Sampler(SamplingParams(temperature=3, seed=1, logprobs=3, repetition_penalty=1.5), [4], 200).choose(logits)
    assert choice.logprobs is not None and choice.logprobs.chosen == pytest.approx(exact[choice.token], abs=1e-5)
    best = np.argsort(-logits)[:3]
    assert [token for token, _ in choice.logprobs.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in choice.logprobs.top], exact[best], atol=1e-5)
    assert logprobs_of(logits, 5, 0).top == ()
    assert len(logprobs_of(logits[:2], 1, 5).top) == 2
    wide = np.array([0, -np.inf, -800], np.float32)
    assert [round(value, 3) for _, value in logprobs_of(wide, 0, 3).top] == [0.0, -800.0, -math.inf]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(seed=0), SamplingParams(logprobs=1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_fail_their_row_only(params, bad):
    logits = np.stack([numbers(), numbers()])
    logits[0, 30] = bad
    samplers = [Sampler(params, [0], 50), Sampler(params, [0], 50)]
    first, second = choose_all(samplers, logits)
    assert isinstance(first, InputError) and "overflowed" in str(first)
    assert isinstance(second, Choice)
    assert isinstance(choose_all(samplers, np.full((2, 50), -np.inf, np.float32))[0], InputError)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_tokens": 0}, "max_tokens: expected a whole number at least 1, got 0; leave it out"),
        ({"max_tokens": 2.5}, "max_tokens: expected a whole number"),
        ({"temperature": -1}, "temperature: expected a number at least 0, got -1; 0 takes"),
        ({"temperature": math.nan}, "temperature: expected a number"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        ({"top_k": 0}, "top_k: .* leave it out to keep all"),
        ({"top_k": True}, "top_k: expected a whole number"),
        ({"top_p": 0}, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p: expected a number at least 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"repetition_penalty": None}, "repetition_penalty"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop: the empty string"),
        ({"stop": ["a", 1.5]}, "stop: expected strings and token ids, got 1.5"),
        ({"stop": 1.5}, "stop: expected a string"),
        ({"logprobs": -1}, "logprobs: expected a whole number from 0 to 100"),
        ({"ignore_eos": 1}, "ignore_eos: expected True or False"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(UsageError, match=message):
        SamplingParams(**wrong)


def test_defaults():
    assert SamplingParams(stop="x").stop == ("x",) and SamplingParams(stop=3).stop == (3,)
    assert SamplingParams().heat == 0 and SamplingParams(top_k=np.int64(3)).heat == 1
    assert SamplingParams(seed=1).drawn and not SamplingParams(temperature=0, seed=1).drawn

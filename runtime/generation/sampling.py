"""Choosing the next token from its logits: greedy, or drawn at random after filtering.

What is done, in this order: repetition penalty (Keskar et al. 2019, eq. 1), temperature, top-k, top-p (Holtzman et al.
2020, over what top-k left), min-p (Nguyen et al. 2024), one draw by inverting the cumulative distribution. Every
request draws from a generator of its own, one number per token, so its seed gives the same tokens whatever else runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, UsageError

MAX_LOGPROBS = 100
MAX_SEED = 2**64 - 1
_BINS, _BINS_PER_UNIT = 1024, 16  # of logits, below the largest
_CHUNK = 512
_FEW = 256  # tokens among which a nucleus is looked for at first
_COLUMNS, _COLUMNS_PER_VALUE, _LEAST_ROWS = 512, 4, 4  # of logits, when candidates for the largest are looked for


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens, and when it ends.

    Attributes:
        max_tokens: how many tokens to generate at most; None for as many as the context and the cache hold.
        temperature: 0 takes the likeliest token; higher values flatten the distribution. None is 0, or 1 where
            ``top_k``, ``top_p``, ``min_p`` or ``seed`` is given.
        top_k: draw among this many of the likeliest tokens.
        top_p: draw among the fewest likeliest tokens whose probabilities add up to this.
        min_p: draw among tokens with at least this share of the likeliest token's probability.
        repetition_penalty: tokens of the prompt and of what was generated have positive logits divided, and negative
            ones multiplied, by this.
        seed: of the draws; None takes one from the operating system (a completion tells which).
        stop: strings and token ids that end the text. A stop string is not part of the text.
        logprobs: also give the log-probability of every chosen token and of this many of the likeliest tokens, by
            the model's own distribution (before penalty, temperature and filters).
        ignore_eos: go on after the model's end-of-text tokens.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str | int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check every value; a single stop becomes a tuple.

        Raises:
            UsageError: a value of the wrong type or out of its range.
        """
        stop: Any = self.stop
        if stop is None or isinstance(stop, str | int):
            stop = () if stop is None else (stop,)
        if not isinstance(stop, Sequence):
            raise UsageError(f"stop: expected a string, a token id or a list of them, got {stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        _whole("max_tokens", self.max_tokens, 1, None, "leave it out to generate until the context is full")
        _whole("top_k", self.top_k, 1, None, "leave it out to keep all tokens")
        _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _whole("seed", self.seed, 0, MAX_SEED)
        _number("temperature", self.temperature, 0.0, math.inf, "0 takes the likeliest token")
        _number("top_p", self.top_p, 0.0, 1.0, "1 keeps all tokens", open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0, "0 keeps all tokens")
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 changes nothing", open_low=True)
        if self.repetition_penalty is None:
            raise UsageError("repetition_penalty: expected a number; 1 changes nothing")
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos: expected True or False, got {self.ignore_eos!r}")
        for item in self.stop:
            if isinstance(item, bool) or not isinstance(item, str | int):
                raise UsageError(f"stop: expected strings and token ids, got {item!r}")
            if item == "":
                raise UsageError("stop: the empty string would end every text before it begins; leave it out")

    @property
    def drawn(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.heat > 0

    @property
    def heat(self) -> float:
        """The temperature, where the default has been resolved."""
        if self.temperature is not None:
            return float(self.temperature)
        return 0.0 if all(value is None for value in (self.top_k, self.top_p, self.min_p, self.seed)) else 1.0


NAMES = tuple(field.name for field in fields(SamplingParams))
"""Names of the parameters, as keyword arguments and in files of requests."""


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities at one token: the chosen one's, and the likeliest tokens' with theirs."""

    chosen: float
    top: tuple[tuple[int, float], ...]


class Choice(NamedTuple):
    """A chosen token; ``logprobs`` where they were asked for."""

    token: int
    logprobs: Logprobs | None


class Sampler:
    """What one request remembers between tokens: its random numbers and the tokens that its penalty counts."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] | np.ndarray, vocabulary: int) -> None:
        """Start a request.

        Args:
            params: how to choose.
            prompt: token ids of the prompt.
            vocabulary: how many logits there are.
        """
        self.params = params
        self.seed: int | None = None
        self._heat = params.heat
        self._penalty = float(params.repetition_penalty)
        if params.drawn:
            # Six bytes: also readers of JSON that know only doubles keep every digit.
            self.seed = int.from_bytes(os.urandom(6), "little") if params.seed is None else int(params.seed)
            self._random = np.random.Generator(np.random.PCG64(self.seed))
        if self._penalty != 1.0:
            self._known = np.zeros(vocabulary, bool)
            self._known[np.asarray(prompt, np.int64)] = True
        self.plain = not params.drawn and self._penalty == 1.0 and params.logprobs is None

    def choose(self, logits: np.ndarray) -> Choice:
        """Choose a token.

        Args:
            logits: float32 [vocabulary]; not changed.

        Raises:
            InputError: a logit is NaN or infinite, so that there is nothing to choose by.
        """
        count = self.params.logprobs
        raw = logits
        if self._penalty != 1.0:
            logits = self._penalised(logits)
        if self._heat:
            token = self._draw(logits)
        else:
            token = int(logits.argmax())
            check_best(float(logits[token]))
        if self._penalty != 1.0:
            self._known[token] = True
        return Choice(token, None if count is None else logprobs_of(raw, token, count))

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        known = np.flatnonzero(self._known)
        values = logits[known]
        changed = logits.copy()
        changed[known] = np.where(values > 0, values / self._penalty, values * self._penalty)
        return changed

    def _draw(self, logits: np.ndarray) -> int:
        best = logits.max()
        check_best(float(best))
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to minus infinity, as it should
            shifted = (logits - best) / np.float32(max(self._heat, 1e-30))
        ids = _filtered(shifted, self.params)
        place = _place(np.exp(shifted if ids is None else shifted[ids]), self._random.random())
        return place if ids is None else int(ids[place])


def choose_all(samplers: Sequence[Sampler], logits: np.ndarray) -> list[Choice | InputError]:
    """A token for every row; one ``argmax`` serves all where nothing else is asked for.

    Args:
        samplers: one per row.
        logits: float32 [rows, vocabulary].

    Returns:
        Per row the choice, or the error of :meth:`Sampler.choose`.
    """
    if all([sampler.plain for sampler in samplers]):
        tokens = logits.argmax(axis=1).tolist()
        return [_checked(token, float(row[token])) for token, row in zip(tokens, logits, strict=True)]
    choices: list[Choice | InputError] = []
    for sampler, row in zip(samplers, logits, strict=True):
        try:
            choices.append(sampler.choose(row))
        except InputError as error:
            choices.append(error)
    return choices


def logprobs_of(logits: np.ndarray, token: int, count: int) -> Logprobs:
    """Log-probabilities of a token and of the ``count`` likeliest, in falling order; equal ones by rising id."""
    best = logits.max()
    total = float(best) + math.log(float(np.exp(logits - best).sum(dtype=np.float64)))
    ids = _largest(logits, count) if count else np.zeros(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    top = tuple(zip(ids.tolist(), (logits[ids].astype(np.float64) - total).tolist(), strict=True))
    return Logprobs(float(logits[token]) - total, top)


def check_best(best: float) -> None:
    """Refuse logits whose largest value (NaN where any is) is no number.

    Raises:
        InputError: it is NaN or infinite.
    """
    if not math.isfinite(best):
        raise InputError(
            f"the model's largest logit is {best}: its numbers overflowed; check its weights and compile it in a "
            f"wider precision"
        )


def _checked(token: int, value: float) -> Choice | InputError:
    try:
        check_best(value)
    except InputError as error:
        return error
    return Choice(token, None)


def _filtered(shifted: np.ndarray, params: SamplingParams) -> np.ndarray | None:
    """Ids of the tokens to draw from, rising, or None for all.

    Args:
        shifted: logits over the temperature, less the largest: float32 [vocabulary].
        params: the filters.
    """
    ids: np.ndarray | None = None
    if params.top_k is not None and params.top_k < len(shifted):
        ids = _largest(shifted, params.top_k)
    if params.top_p is not None and params.top_p < 1:
        kept = _nucleus(shifted if ids is None else shifted[ids], params.top_p)
        ids = kept if ids is None else ids[kept]
    if params.min_p:
        kept = np.flatnonzero((shifted if ids is None else shifted[ids]) >= math.log(params.min_p))
        ids = kept if ids is None else ids[kept]
    return ids


def _nucleus(shifted: np.ndarray, share: float) -> np.ndarray:
    """The fewest largest values whose exponentials have a share of the sum: indices, rising; of equal ones the first.

    Mostly few values have it, and only these are sorted. Else values, at most 0, go into bins by size, and the bin in
    which the sum reaches the share is sorted. Sorting all would take many times as long.
    """
    weights = np.exp(shifted)
    wanted = share * float(weights.sum(dtype=np.float64))
    likeliest = _largest(shifted, _FEW)
    if weights[likeliest].sum(dtype=np.float64) >= wanted:
        return np.sort(likeliest[_reaching(shifted[likeliest], weights[likeliest], wanted)])
    bins = np.minimum(shifted * np.float32(-_BINS_PER_UNIT), np.float32(_BINS - 1)).astype(np.int64)
    mass = np.bincount(bins, weights, _BINS).cumsum()
    wanted = min(wanted, float(mass[-1]))  # added in another order
    last = int(np.searchsorted(mass, wanted, side="left"))
    inside = np.flatnonzero(bins == last)
    kept = bins < last
    before = float(mass[last - 1]) if last else 0.0
    kept[inside[_reaching(shifted[inside], weights[inside], wanted - before)]] = True
    return np.flatnonzero(kept)


def _reaching(values: np.ndarray, weights: np.ndarray, wanted: float) -> np.ndarray:
    """Indices of the fewest largest values whose weights add up to what is wanted; of equal ones the first."""
    order = np.argsort(-values, kind="stable")
    sums = weights[order].cumsum(dtype=np.float64)
    return order[: int(np.searchsorted(sums, wanted, side="left")) + 1]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values, rising; of equal ones the first."""
    size = len(values)
    if count >= size:
        return np.arange(size)
    near = _candidates(values, count)
    if near is not None:
        return near[_largest(values[near], count)]
    threshold = np.partition(values, size - count)[size - count]
    ids = np.flatnonzero(values >= threshold)
    if len(ids) > count:
        equal = values[ids] == threshold
        ids = ids[~equal | (np.cumsum(equal) <= count - np.count_nonzero(~equal))]
    return ids


def _candidates(values: np.ndarray, count: int) -> np.ndarray | None:
    """Indices, rising, of few values among which the ``count`` largest are, or None where looking for them is no gain.

    Of so many columns as are wanted, each has a value as large as its maximum: the ``count``-th largest maximum is no
    larger than the ``count``-th largest value. Maxima and a comparison take a tenth of the time of a partition of all.
    """
    columns = max(_COLUMNS, _COLUMNS_PER_VALUE * count)
    rows = len(values) // columns
    if rows < _LEAST_ROWS:
        return None
    maxima = values[: rows * columns].reshape(rows, columns).max(axis=0)
    near = np.flatnonzero(values >= np.partition(maxima, columns - count)[columns - count])
    return near if len(near) < len(values) // 2 else None  # where many are equal, it would go on without end


def _place(weights: np.ndarray, at: float) -> int:
    """The index at which the cumulative sum of weights passes a share ``at`` in [0, 1) of the whole.

    First among sums of chunks, then inside of one: cumulative sums in float64 of all would take several times as long.
    """
    size = len(weights)
    whole = size - size % _CHUNK
    sums = weights[:whole].reshape(-1, _CHUNK).sum(axis=1, dtype=np.float64)
    chunks = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    wanted = at * chunks[-1]
    chunk = min(int(np.searchsorted(chunks, wanted, side="right")), len(chunks) - 1)
    begin = chunk * _CHUNK
    inner = weights[begin : begin + _CHUNK].cumsum(dtype=np.float64)
    place = int(np.searchsorted(inner, wanted - (chunks[chunk - 1] if chunk else 0.0), side="right"))
    if place == len(inner):  # by rounding; what has no weight must not be chosen
        place = int(np.searchsorted(inner, inner[-1], side="left"))
    return begin + place


def _whole(name: str, value: Any, low: int, high: int | None, hint: str = "") -> None:
    if value is None:
        return
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}: expected a whole number {limits}, got {value!r}{f'; {hint}' if hint else ''}")


def _number(name: str, value: Any, low: float, high: float, hint: str, *, open_low: bool = False) -> None:
    if value is None:
        return
    fits = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        above = f"above {low:g}" if open_low else f"at least {low:g}"
        limits = above if math.isinf(high) else f"{above} and at most {high:g}"
        raise UsageError(f"{name}: expected a number {limits}, got {value!r}; {hint}")

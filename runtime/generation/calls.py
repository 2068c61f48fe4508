"""What ``Model.generate`` and ``Model.stream`` do: open a generator with a cache that fits, and run the requests."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import InputError, UsageError
from .completion import Completion
from .description import Generation, describe
from .generator import Generator
from .request import Prompt, prompt_tokens
from .sampling import NAMES, SamplingParams
from .stream import Stream
from .text import Text, open_text

if TYPE_CHECKING:
    from ..model import Model

DEFAULT_CACHE_BYTES = 1 << 30
"""The largest cache that is made without being asked for, unless a single request needs more."""


class Need(NamedTuple):
    """How many positions of the cache a request takes: as few, or as many."""

    least: int
    most: int


def open_generator(
    model: Model, *, cache_tokens: int | None = None, step_tokens: int | None = None, wanted: Sequence[Need] = ()
) -> Generator:
    """A generator for a loaded model, with a cache of its own.

    Args:
        model: of an artifact that generates.
        cache_tokens: how many positions the cache holds, of all sequences together, rounded up to blocks. By default
            as many as the wanted requests may take at once, within :data:`DEFAULT_CACHE_BYTES`, and as few as any
            of them takes.
        step_tokens: the most tokens of one step, if fewer than the model takes.
        wanted: what the expected requests need; by default one that may fill the context.

    Raises:
        UsageError: the model does not generate, or a number that does not fit it.
    """
    described = describe(model.artifact)
    if cache_tokens is None:
        blocks = default_blocks(described, wanted)
    elif isinstance(cache_tokens, bool) or not isinstance(cache_tokens, int | np.integer) or cache_tokens < 1:
        raise UsageError(f"cache_tokens: expected a whole number at least 1, got {cache_tokens!r}")
    else:
        blocks = -(-int(cache_tokens) // described.block)
    most = model.entry(described.entry).plan.ranges()["blocks"][1]
    if blocks > most and cache_tokens is not None:
        raise UsageError(
            f"cache_tokens: the model was compiled for caches of at most {most * described.block} positions "
            f"({most} blocks of {described.block}), got {cache_tokens}"
        )
    text = text_of(model)
    session = model.session(sizes={"blocks": min(blocks, most)})
    entry = session.entry(described.entry)

    def step(
        tokens: np.ndarray, positions: np.ndarray, starts: np.ndarray, contexts: np.ndarray, table: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        result = entry(tokens, positions, starts, contexts, table, rows)
        logits: np.ndarray = result["logits"] if isinstance(result, Mapping) else result
        return logits

    return Generator(described, step, min(blocks, most), text, step_tokens=step_tokens, session=session)


def default_blocks(model: Generation, wanted: Sequence[Need]) -> int:
    """Blocks for requests, when nobody says how many there should be: see :func:`open_generator`."""
    needs = wanted or (Need(1, model.context),)
    most = sorted((-(-need.most // model.block) for need in needs), reverse=True)
    least = max(-(-need.least // model.block) for need in needs)
    return max(min(sum(most[: model.max_sequences]), DEFAULT_CACHE_BYTES // model.block_bytes), least)


_TEXTS: weakref.WeakKeyDictionary[Model, Text | None] = weakref.WeakKeyDictionary()


def text_of(model: Model) -> Text | None:
    """The tokenizer of a loaded model, read once."""
    if model not in _TEXTS:
        _TEXTS[model] = open_text(model.artifact, describe(model.artifact))
    return _TEXTS[model]


def generate(
    model: Model,
    prompts: Prompt | Iterable[Prompt],
    *,
    cache_tokens: int | None = None,
    keep_errors: bool = False,
    **options: Any,
) -> list[Completion]:
    """Continue prompts; ``Model.generate`` says what there is to give."""
    given: Any = [prompts] if _is_one(prompts) else list(prompts)
    params = params_for(len(given), options)
    read = read_prompts(model, given)
    if not read:
        return []
    with open_generator(model, cache_tokens=cache_tokens, wanted=needs_of(model, read, params)) as generator:
        return generator.generate(read, params, keep_errors=keep_errors)


def open_stream(model: Model, prompt: Prompt, params: SamplingParams, *, cache_tokens: int | None = None) -> Stream:
    """Continue a prompt piece by piece, with a generator of its own; raises what :meth:`Generator.submit` does."""
    read = read_prompts(model, [prompt])
    generator = open_generator(model, cache_tokens=cache_tokens, wanted=needs_of(model, read, [params]))
    try:
        return Stream(generator, generator.submit(read[0], params), own=True)
    except BaseException:
        generator.close()
        raise


def params_for(count: int, options: Mapping[str, Any]) -> list[SamplingParams]:
    """Parameters of every request from keyword arguments; request i gets ``seed + i``, or the i-th of a list of seeds.

    Raises:
        UsageError: an unknown name, a wrong value, or not as many seeds as prompts.
    """
    for name in options:
        if name not in NAMES:
            raise UsageError(f"there is no parameter {name!r}; there are {', '.join(NAMES)}")
    seed: Any = options.get("seed")
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise UsageError(f"seed: {len(seed)} seeds for {count} prompts; give one for each, or one for all")
        return [SamplingParams(**{**options, "seed": one}) for one in seed]
    first = SamplingParams(**options)
    if seed is None:
        return [first] * count
    return [first, *(SamplingParams(**{**options, "seed": int(seed) + index}) for index in range(1, count))][:count]


def read_prompts(model: Model, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts as token ids; one that cannot be read stays as it is, and is refused when it is submitted."""
    described = describe(model.artifact)
    read: list[Prompt] = []
    for prompt in prompts:
        try:
            read.append(prompt_tokens(prompt, described, text_of(model)))
        except (InputError, UsageError):
            read.append(prompt)
    return read


def needs_of(model: Model, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Need]:
    """What requests take of the cache; one whose prompt could not be read will be refused, and takes nothing."""
    context = describe(model.artifact).context
    needs = []
    for prompt, one in zip(prompts, params, strict=True):
        if isinstance(prompt, np.ndarray):
            most = context if one.max_tokens is None else min(len(prompt) + one.max_tokens, context)
            needs.append(Need(min(len(prompt) + (one.max_tokens or 1), context), most))
    return needs


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt, rather than several."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1 and prompts.dtype.kind in "iu"
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int | np.integer)

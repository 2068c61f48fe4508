"""One request: its prompt, what has been generated so far, and when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from ..errors import InputError, UsageError
from .completion import Completion, Piece
from .description import Generation
from .sampling import Choice, Logprobs, Sampler, SamplingParams
from .scheduler import Sequence
from .stops import StopFinder
from .text import Detokenizer, Text

Prompt = str | Items[int] | np.ndarray


class Request:
    """A prompt that is being continued; :meth:`Generator.submit` makes it."""

    def __init__(
        self, prompt: Items[int] | np.ndarray, limit: int, params: SamplingParams, model: Generation, text: Text | None
    ) -> None:
        """Start with nothing generated.

        Args:
            prompt: token ids.
            limit: how many tokens there may be, prompt and generated.
            params: how to choose tokens, and when to end.
            model: its special tokens and its vocabulary.
            text: its tokenizer, if it has one.
        """
        self.sequence = Sequence(prompt, limit)
        self.sampler = Sampler(params, prompt, model.vocabulary)
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.stopped_by: str | int | None = None
        self.error: Exception | None = None
        self._limit = limit
        self._ends = frozenset(item for item in params.stop if not isinstance(item, str))
        self._ends |= frozenset(() if params.ignore_eos else model.eos)
        self._stops = StopFinder([item for item in params.stop if isinstance(item, str)])
        self._detokenizer = Detokenizer(text) if text is not None else None
        self._text: list[str] = []
        self._logprobs: list[Logprobs] = []
        self._start = time.perf_counter()
        self._first: float | None = None
        self._end = self._start

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish is not None

    def take(self, choice: Choice) -> Piece:
        """Add the next token, and find out whether it is the last."""
        if self._first is None:
            self._first = time.perf_counter()
        token = choice.token
        self.tokens.append(token)
        if choice.logprobs is not None:
            self._logprobs.append(choice.logprobs)
        found: str | int | None = None
        text = ""
        if token in self._ends:
            found = token
        elif self._detokenizer is not None:
            text, found = self._stops.push(self._detokenizer.push(token))
        if found is None and self.prompt_tokens + len(self.tokens) < self._limit:
            self.sequence.append(token)
        else:
            if not isinstance(found, str):
                tail, late = self._rest()
                text += tail
                found = late if found is None else found
            self.stopped_by = found
            self.end("length" if found is None else "stop")
        if text:
            self._text.append(text)
        return Piece(text, token, choice.logprobs, self.finish)

    def end(self, finish: str, error: Exception | None = None) -> str:
        """Note why nothing more will come.

        Returns:
            Text that had been held back in case it began a stop string.
        """
        held = ""
        if finish in ("cancelled", "error"):
            held, _ = self._rest()
            self._text.append(held)
        self.finish, self.error = finish, error
        self._end = time.perf_counter()
        return held

    def completion(self) -> Completion:
        """What there is now; of a request that is still going on, as if it had been cancelled."""
        asked = self.sampler.params.logprobs is not None
        return Completion(
            text="".join(self._text),
            tokens=tuple(self.tokens),
            finish=self.finish or "cancelled",
            stopped_by=self.stopped_by,
            logprobs=tuple(self._logprobs) if asked else None,
            prompt_tokens=self.prompt_tokens,
            seed=self.sampler.seed,
            preempted=self.sequence.preempted,
            first_seconds=None if self._first is None else self._first - self._start,
            seconds=(self._end if self.done else time.perf_counter()) - self._start,
            error=self.error,
        )

    def _rest(self) -> tuple[str, str | None]:
        """What is left when no more tokens come: half a character, and the beginning of a stop string."""
        if self._detokenizer is None:
            return "", None
        text, found = self._stops.push(self._detokenizer.finish())
        return text + ("" if found else self._stops.finish()), found


def prompt_tokens(prompt: Prompt, model: Generation, text: Text | None) -> np.ndarray:
    """The token ids of a prompt.

    Raises:
        UsageError: a prompt that is neither text nor token ids, an empty one, or text where there is no tokenizer.
        InputError: text that is not valid Unicode, or an id that the model does not have.
    """
    if isinstance(prompt, str):
        if text is None:
            raise UsageError("the artifact has no tokenizer (its checkpoint had none): give prompts as token ids")
        tokens = text.encode(prompt)
        if not tokens and model.bos is not None:
            tokens = [model.bos]
        if not tokens:
            raise UsageError("the prompt is empty: there is nothing to go on from")
        return _checked(np.array(tokens, np.int64), model.vocabulary, "the tokenizer gave")
    if isinstance(prompt, bytes) or not isinstance(prompt, Items | np.ndarray):
        raise UsageError(f"a prompt is a string or a list of token ids, not {_brief(prompt)}")
    if not len(prompt):
        raise UsageError("the prompt is empty: there is nothing to go on from")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(f"a prompt is a string or a list of token ids, not {_brief(prompt)}")
    return _checked(ids, model.vocabulary, "the prompt has")


def _checked(ids: np.ndarray, vocabulary: int, whose: str) -> np.ndarray:
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise InputError(f"{whose} the token {int(wrong[0])}, but the model's are 0 to {vocabulary - 1}")
    return ids


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else f'{text[:37]}...'}"

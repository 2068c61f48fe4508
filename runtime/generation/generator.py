"""Generating text with a model: requests in, tokens out, over one cache.

``Model.generate`` and ``Model.stream`` make a generator for one call. Who serves many requests keeps one, submits
requests when they come, and calls :meth:`Generator.step` while there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InputError, TilewrightError, UsageError
from . import scheduler
from .blocks import BlockAllocator
from .completion import Completion, Piece
from .description import Generation
from .request import Prompt, Request, prompt_tokens
from .sampling import SamplingParams, choose_all
from .scheduler import Scheduler
from .text import Text

if TYPE_CHECKING:
    from ..model import Session


class Event(NamedTuple):
    """What a step gave a request: a piece, or None where it ended with an error."""

    request: Request
    piece: Piece | None


class Generator:
    """Continues prompts with a model. Calls are made from one thread at a time."""

    def __init__(
        self,
        model: Generation,
        step: scheduler.Step,
        blocks: int,
        text: Text | None = None,
        *,
        step_tokens: int | None = None,
        session: Session | None = None,
    ) -> None:
        """Start without requests; ``calls.open_generator`` does this for a loaded model.

        Args:
            model: what the artifact says of it.
            step: runs it.
            blocks: how many its cache has.
            text: its tokenizer, if it has one.
            step_tokens: the most tokens of one step, if fewer than the model takes.
            session: to close at the end.

        Raises:
            UsageError: a number of tokens that no step can have.
        """
        if step_tokens is not None and not 1 <= step_tokens <= model.max_tokens:
            raise UsageError(f"step_tokens: expected 1 to {model.max_tokens}, got {step_tokens}")
        self.model = model
        self.blocks = blocks
        self.text = text
        self._step = step
        self._step_tokens = step_tokens or model.max_tokens
        self._session = session
        self._requests: dict[scheduler.Sequence, Request] = {}
        self._closed = False
        self._restart()

    @property
    def positions(self) -> int:
        """How many positions the cache holds, of all sequences together."""
        return self.blocks * self.model.block

    @property
    def busy(self) -> bool:
        """Whether there are requests to go on with."""
        return bool(self._requests)

    @property
    def free_blocks(self) -> int:
        """How many blocks of the cache are free."""
        return self._scheduler.allocator.available

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Add a request; :meth:`step` goes on with it.

        Raises:
            UsageError: an empty prompt, text without a tokenizer, or the generator is closed.
            InputError: the prompt is longer than the context, has tokens that the model lacks or is no valid Unicode,
                or the request can never fit the cache.
        """
        if self._closed:
            raise UsageError("the generator is closed")
        params = params if params is not None else SamplingParams()
        tokens = prompt_tokens(prompt, self.model, self.text)
        _check_stops(params, self.model, self.text)
        limit = self._limit(len(tokens), params.max_tokens)
        request = Request(tokens, limit, params, self.model, self.text)
        self._requests[request.sequence] = request
        self._scheduler.add(request.sequence)
        return request

    def step(self) -> list[Event]:
        """Compute one step of the model for the requests that are there.

        A request that fails ends with its ``error``; the others go on. An interrupt ends all.

        Returns:
            One event for every request that got a token or ended.
        """
        try:
            return self._advance()
        except BaseException:
            self.cancel_all()
            raise

    def cancel(self, request: Request) -> str:
        """End a request and free its blocks; one that has ended stays as it is.

        Returns:
            Text that had been held back.
        """
        self._scheduler.remove(request.sequence)
        self._requests.pop(request.sequence, None)
        return "" if request.done else request.end("cancelled")

    def cancel_all(self) -> None:
        """End all requests and free all blocks, whatever state an interrupt left them in."""
        for request in self._requests.values():
            if not request.done:
                request.end("cancelled")
        self._requests.clear()
        self._restart()

    def generate(
        self, prompts: Iterable[Prompt], params: Sequence[SamplingParams], *, keep_errors: bool = False
    ) -> list[Completion]:
        """Continue prompts until all have ended.

        Args:
            prompts: texts or lists of token ids.
            params: one for each.
            keep_errors: give a prompt that is refused or fails as a completion with its ``error``, instead of raising
                it and cancelling the others.

        Raises:
            TilewrightError: a prompt was refused (see :meth:`submit`), which names it, or failed.
        """
        slots: list[Request | Completion] = []
        mine: list[Request] = []
        try:
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                try:
                    request = self.submit(prompt, one)
                except TilewrightError as error:
                    if not keep_errors:
                        raise numbered(index, error) from None
                    slots.append(refused(error))
                else:
                    mine.append(request)
                    slots.append(request)
            while not all(request.done for request in mine):
                for request, _ in self.step():
                    if request.error is not None and not keep_errors and request in mine:
                        raise numbered(slots.index(request), request.error) from request.error
        finally:
            for request in mine:
                self.cancel(request)
        return [slot if isinstance(slot, Completion) else slot.completion() for slot in slots]

    def close(self) -> None:
        """Cancel all requests and free the cache; later calls raise ``UsageError``."""
        self.cancel_all()
        self._closed = True
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restart(self) -> None:
        self._scheduler = Scheduler(
            self._step,
            BlockAllocator(self.blocks, self.model.block),
            max_tokens=self._step_tokens,
            max_sequences=self.model.max_sequences,
            max_width=-(-self.model.context // self.model.block),
        )

    def _advance(self) -> list[Event]:
        found = self._scheduler.run()
        events = [self._fail(self._requests[sequence], error) for sequence, error in found.failed]
        if found.sequences:
            asking = [self._requests[sequence] for sequence in found.sequences]
            choices = choose_all([request.sampler for request in asking], found.logits)
            for request, choice in zip(asking, choices, strict=True):
                if isinstance(choice, InputError):
                    events.append(self._fail(request, choice))
                    continue
                events.append(Event(request, request.take(choice)))
                if request.done:
                    self._forget(request)
        return events

    def _fail(self, request: Request, error: Exception) -> Event:
        request.end("error", error)
        self._forget(request)
        return Event(request, None)

    def _forget(self, request: Request) -> None:
        self._scheduler.remove(request.sequence)
        del self._requests[request.sequence]

    def _limit(self, prompt: int, wanted: int | None) -> int:
        """How many tokens a request may have in all."""
        context, cache = self.model.context, self.positions
        if prompt >= context:
            raise InputError(
                f"the prompt has {prompt} tokens, and the model's context is {context}, one of them at least for what "
                f"is generated; shorten the prompt"
            )
        if wanted is not None and prompt + wanted > context:
            raise InputError(
                f"the prompt has {prompt} tokens and max_tokens is {wanted}, together {prompt + wanted}, but the "
                f"model's context is {context}; ask for at most {context - prompt}"
            )
        needed = prompt + (1 if wanted is None else wanted)
        if needed > cache:
            raise InputError(
                f"the request needs {needed} positions ({prompt} of the prompt, {needed - prompt} to generate), but "
                f"the cache has {cache} ({self.blocks} blocks of {self.model.block}); raise cache_tokens to {needed} "
                f"or more"
            )
        return min(context, cache) if wanted is None else needed


def _check_stops(params: SamplingParams, model: Generation, text: Text | None) -> None:
    for item in params.stop:
        if isinstance(item, str) and text is None:
            raise UsageError("stop: the artifact has no tokenizer, so only token ids can stop it, not strings")
        if not isinstance(item, str) and not 0 <= item < model.vocabulary:
            raise UsageError(f"stop: there is no token {item}; the model's are 0 to {model.vocabulary - 1}")


def numbered(index: int, error: Exception) -> Exception:
    """An error that says which prompt it is about."""
    return type(error)(f"prompt {index}: {error}") if isinstance(error, TilewrightError) else error


def refused(error: Exception) -> Completion:
    """The completion of a prompt that was refused before anything ran."""
    return Completion("", (), "error", None, None, 0, None, 0, None, 0.0, error)

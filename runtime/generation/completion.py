"""What generating gives: pieces of text while it runs, and the completion at its end."""

from __future__ import annotations

from ..records import frozen
from .sampling import Logprobs


@frozen
class Piece:
    """What one token added.

    Attributes:
        text: characters that are complete now; often none, as characters can be spread over tokens, and text that may
            begin a stop string is held back.
        token: its id.
        logprobs: its log-probabilities, where they were asked for.
        finish: why this was the last piece, else None; see :class:`Completion`.
    """

    text: str
    token: int
    logprobs: Logprobs | None
    finish: str | None


@frozen
class Completion:
    """The result of one prompt.

    Attributes:
        text: what was generated, without the stop string. Empty where the model has no tokenizer.
        tokens: ids of all generated tokens, those of a stop included.
        finish: ``"stop"`` (a stop string or token, or the end of the text), ``"length"`` (as many tokens as were asked
            for, or as fit), ``"cancelled"`` or ``"error"``.
        stopped_by: the stop string or token, if there was one.
        logprobs: of every generated token, where they were asked for.
        prompt_tokens: how many tokens the prompt has.
        seed: that the draws began with; None where nothing was drawn.
        preempted: how often the sequence had to make room in the cache and was computed again.
        first_seconds: from when the request was made to its first token; None if there was none.
        seconds: from when it was made to its end.
        error: why it failed, if it did.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    stopped_by: str | int | None
    logprobs: tuple[Logprobs, ...] | None
    prompt_tokens: int
    seed: int | None
    preempted: int
    first_seconds: float | None
    seconds: float
    error: Exception | None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, per second; None with fewer than two."""
        if self.first_seconds is None or len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / max(self.seconds - self.first_seconds, 1e-9)

"""``tilewright generate``: text from a decoder language model."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ...runtime.errors import UsageError
from . import options
from .output import emit_json, note, show_seconds

if TYPE_CHECKING:
    from ...runtime.generation.completion import Completion
    from ...runtime.generation.sampling import SamplingParams
    from ...runtime.model import Model

HELP = """Continue a prompt with the decoder language model in DIR. Text is shown as it is made.

Without sampling options the likeliest token is taken every time, until the model ends the text or its context is full.
Needs no PyTorch; text needs tilewright[text], unless the model's tokens are bytes.

\b
Examples:
  tilewright generate llama.tw --prompt "The capital of France is" --max-tokens 32
  tilewright generate llama.tw --prompt - --temperature 0.8 --top-p 0.95 --seed 1 < prompt.txt
  tilewright generate llama.tw --batch-file prompts.txt --max-tokens 64 --json > completions.jsonl

A batch file has one prompt per line; a .jsonl file has objects with "prompt" (text, or a list of token ids) and any of
max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, logprobs and ignore_eos, which override
the options. All prompts run together, within the cache that there is; results come in the order of the file.
"""


@click.command(help=HELP, short_help="Text from a decoder language model.")
@click.argument("artifact", metavar="DIR")
@click.option("-p", "--prompt", metavar="TEXT", help="What to continue; - reads standard input.")
@click.option("--batch-file", metavar="FILE", help="Prompts, one per line (- is standard input), or objects in .jsonl.")
@click.option(
    "-n", "--max-tokens", type=int, metavar="N", help="Tokens to generate. [default: until the context is full]"
)
@click.option("--temperature", type=float, metavar="T", help="0 takes the likeliest token. [default: 0, or 1 if drawn]")
@click.option("--top-k", type=int, metavar="N", help="Draw among the N likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw among the likeliest tokens that have this probability.")
@click.option("--min-p", type=float, metavar="P", help="Draw among tokens with this share of the likeliest one's.")
@click.option(
    "--repetition-penalty", type=float, default=1.0, metavar="R", help="Above 1, tokens that were there get rarer."
)
@click.option("--seed", type=int, metavar="N", help="Of the draws; prompt i of a batch gets N + i. [default: random]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable.")
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json: log-probabilities, also of the N likeliest tokens."
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the model has ended the text.")
@click.option(
    "--cache-tokens", type=int, metavar="N", help="Positions in the cache. [default: enough for all, within 1 GiB]"
)
@options.device
@options.threads
@options.quiet
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document; for a batch one per line.")
def generate(
    artifact: str,
    prompt: str | None,
    batch_file: str | None,
    device: str,
    threads: int | None,
    cache_tokens: int | None,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> int:
    """Generate text."""
    from ...runtime.generation.sampling import SamplingParams
    from ...runtime.model import load
    from .generate_batch import read_batch, read_standard_input, run_batch

    if (prompt is None) == (batch_file is None):
        raise UsageError("give what to continue: either --prompt TEXT or --batch-file FILE")
    if sampling["logprobs"] is not None and not as_json:
        raise UsageError("--logprobs shows nothing without --json")
    params = SamplingParams(**sampling)
    if batch_file is not None:
        lines = read_batch(batch_file, params)
        with load(artifact, threads=threads, device=device) as model:
            return run_batch(model, lines, cache_tokens, as_json=as_json, quiet=quiet)
    if prompt == "-":
        prompt = read_standard_input()
    with load(artifact, threads=threads, device=device) as model:
        _run_one(model, str(prompt), params, cache_tokens, as_json, quiet)
    return 0


def _run_one(
    model: Model, prompt: str, params: SamplingParams, cache_tokens: int | None, as_json: bool, quiet: bool
) -> None:
    from ...runtime.generation.calls import open_stream

    stream = open_stream(model, prompt, params, cache_tokens=cache_tokens)
    shown = 0
    try:
        with stream, deferred_interrupts() as check:
            for piece in stream:
                if piece.text and not as_json:
                    click.echo(piece.text, nl=False)
                    shown += len(piece.text)
                check()
    finally:  # an interrupt ends here, too
        done = stream.completion
        if as_json:
            emit_json(as_data(done))
        else:
            click.echo(done.text[shown:], nl=not done.text.endswith("\n"))
        sys.stdout.flush()
    if not quiet:
        note(speed(done))


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Let an interrupt wait until the given function is called, so that no text is lost or shown twice.

    A second one does not wait.
    """
    pending = False

    def note_it(number: int, frame: object) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    def check() -> None:
        if pending:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield check
        return
    before = signal.signal(signal.SIGINT, note_it)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def as_data(done: Completion) -> dict[str, Any]:
    """A completion as JSON has it."""
    data: dict[str, Any] = {name: getattr(done, name) for name in done.__match_args__}
    data["tokens_per_second"] = done.tokens_per_second
    data["error"] = None if done.error is None else str(done.error)
    if done.logprobs is None:
        del data["logprobs"]
    else:
        data["logprobs"] = [{"chosen": entry.chosen, "top": entry.top} for entry in done.logprobs]
    return data


def speed(done: Completion) -> str:
    """How long a completion took: the prompt (until the first token), and every token after it."""
    count, first = done.prompt_tokens, done.first_seconds
    if first is None:
        return f"prompt: {count} tokens; nothing was generated"
    parts = [f"prompt: {count} tokens in {show_seconds(first)} ({count / max(first, 1e-9):.1f} tokens/s)"]
    after = f"; after the first {done.tokens_per_second:.1f} tokens/s" if done.tokens_per_second else ""
    parts.append(f"generated: {len(done.tokens)} tokens in {show_seconds(done.seconds)}{after}")
    ended = f"ended by {done.stopped_by!r}" if done.stopped_by is not None else f"ended: {done.finish}"
    return "; ".join([*parts, ended])


def total_speed(results: list[Completion], start: float) -> str:
    """How long a batch took, and how much was made in that time."""
    seconds = time.perf_counter() - start
    prompts, tokens = sum(one.prompt_tokens for one in results), sum(len(one.tokens) for one in results)
    text = (
        f"{len(results)} prompts in {show_seconds(seconds)}: {prompts} prompt tokens ({prompts / seconds:.1f}/s), "
        f"{tokens} generated ({tokens / seconds:.1f}/s)"
    )
    again = sum(one.preempted for one in results)
    return text + (f"; the cache was full {again} times, and sequences were computed again" if again else "")

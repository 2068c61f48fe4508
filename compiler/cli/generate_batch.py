"""Many prompts for ``tilewright generate``: reading them, running them together, showing results in their order."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from ...runtime.errors import InputError, TilewrightError, UsageError
from ...runtime.generation.calls import needs_of, open_generator, read_prompts
from ...runtime.generation.completion import Completion
from ...runtime.generation.generator import Generator, refused
from ...runtime.generation.request import Prompt, Request
from ...runtime.generation.sampling import NAMES, SamplingParams
from ...runtime.model import Model
from .generate import as_data, deferred_interrupts, total_speed
from .output import emit_json, note


class Line(NamedTuple):
    """One request of a file: its line number, and what it asks for."""

    number: int
    prompt: Prompt
    params: SamplingParams


def read_standard_input() -> str:
    """The text on standard input, as it is.

    Raises:
        InputError: it is not UTF-8.
    """
    return _decoded(sys.stdin.buffer.read(), "standard input")


def read_batch(path: str, params: SamplingParams) -> list[Line]:
    """The requests of a file: a prompt per line, or in a ``.jsonl`` file an object per line. Blank lines are left out.

    Args:
        path: of the file, or ``-`` for standard input.
        params: what lines do not set themselves; line i gets ``seed + i``.

    Raises:
        UsageError: the file cannot be read, has no prompts, or a line of it is not what it should be.
        InputError: it is not UTF-8.
    """
    if path == "-":
        text = read_standard_input()
    else:
        try:
            text = _decoded(Path(path).read_bytes(), path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
    lines: list[Line] = []
    for number, content in enumerate(text.split("\n"), 1):
        content = content.removesuffix("\r")
        if not content.strip():
            continue
        own = params if params.seed is None else replace(params, seed=params.seed + len(lines))
        prompt: Prompt = content
        if path.endswith(".jsonl"):
            prompt, own = _parsed(content, own, f"{path}, line {number}")
        lines.append(Line(number, prompt, own))
    if not lines:
        raise UsageError(f"{path}: holds no prompts")
    return lines


def run_batch(model: Model, lines: list[Line], cache_tokens: int | None, *, as_json: bool, quiet: bool) -> int:
    """Run requests together and print their completions in order, each as soon as those before it are there.

    Returns:
        1 if a prompt was refused or failed, else 0.
    """
    params = [line.params for line in lines]
    prompts = read_prompts(model, [line.prompt for line in lines])
    start = time.perf_counter()
    results: list[Completion] = []
    with (
        open_generator(model, cache_tokens=cache_tokens, wanted=needs_of(model, prompts, params)) as generator,
        _progress(len(lines), quiet) as moved,
        deferred_interrupts() as check,
    ):
        slots = [_submit(generator, prompt, one) for prompt, one in zip(prompts, params, strict=True)]
        try:
            while generator.busy:
                done = sum(piece is None or piece.finish is not None for _, piece in generator.step())
                moved(done)
                while len(results) < len(slots) and _ended(slots[len(results)]):
                    results.append(_show(lines[len(results)], slots[len(results)], as_json))
                check()
        finally:  # an interrupt shows what there is
            generator.cancel_all()
            for line, slot in list(zip(lines, slots, strict=True))[len(results) :]:
                results.append(_show(line, slot, as_json))
            sys.stdout.flush()
    if not quiet:
        note(total_speed(results, start))
    failed = [(line, one) for line, one in zip(lines, results, strict=True) if one.error is not None]
    for line, one in failed:
        note(f"error: line {line.number}: {one.error}")
    return 1 if failed else 0


def _submit(generator: Generator, prompt: Prompt, params: SamplingParams) -> Request | Completion:
    try:
        return generator.submit(prompt, params)
    except TilewrightError as error:
        return refused(error)


def _ended(slot: Request | Completion) -> bool:
    return isinstance(slot, Completion) or slot.done


def _show(line: Line, slot: Request | Completion, as_json: bool) -> Completion:
    done = slot if isinstance(slot, Completion) else slot.completion()
    if as_json:
        emit_json({"line": line.number, **as_data(done)}, indent=None)
    else:
        click.secho(f"== line {line.number} ({done.finish}) ==", bold=True)
        click.echo(done.text)
    return done


def _parsed(content: str, params: SamplingParams, where: str) -> tuple[Prompt, SamplingParams]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is no JSON: {error}") from None
    if not isinstance(data, dict) or "prompt" not in data:
        raise UsageError(f'{where}: expected an object with "prompt"')
    prompt: Any = data.pop("prompt")
    if unknown := [name for name in data if name not in NAMES]:
        raise UsageError(f"{where}: there is no parameter {unknown[0]!r}; there are {', '.join(NAMES)}")
    try:
        return prompt, replace(params, **data)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{where}: is not UTF-8 text: byte {error.start} (line {line}) is 0x{content[error.start]:02x}, "
            f"{error.reason}; convert it, for example with iconv"
        ) from None


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error that moves with the number of prompts that are done, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # On a terminal, results that are printed meanwhile go above the bar; a file gets them as they are.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("prompts", total=total)
        yield lambda done: progress.advance(task, done)

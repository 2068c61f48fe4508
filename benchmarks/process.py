"""Processes that measure, asked and answering in lines of JSON: one side for the coordinator, one for the process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


class Process:
    """A Python process of its own (``python -m module``) in a process group of its own."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
            start_new_session=True,
        )

    @property
    def ended(self) -> bool:
        """Whether it can no longer be asked."""
        return self.child.poll() is not None

    def ask(self, request: Any, limit: float) -> dict[str, Any]:
        """Its answer, or ``{"error": text}`` where it ends or takes longer than ``limit`` seconds; then it is over."""
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            ready, _, _ = select.select([self.child.stdout], [], [], limit)
            line = self.child.stdout.readline() if ready else ""
        except BrokenPipeError:
            line, ready = "", [True]
        answer: dict[str, Any] = (
            json.loads(line) if line else {"error": "the process ended" if ready else f"no answer in {limit:.0f} s"}
        )
        if "error" in answer:
            self.close()
        return answer

    def stop(self) -> None:
        """Let it do nothing at all, not even wait for work in a loop, as thread pools do for a while."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and what it started."""
        self._signal(signal.SIGKILL)
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was never read
                    continue

    def _signal(self, number: signal.Signals) -> None:
        if not self.ended:
            os.killpg(self.child.pid, number)


def serve(handle: Callable[[Any], dict[str, Any]]) -> None:
    """Answer requests on standard input until it ends, or until one fails: an error may have spoilt the process.

    Args:
        handle: gives the answer to a request; what it prints goes to standard error.
    """
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print does not get between the answers
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:
            answer = {"error": brief(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            return


def forked(handle: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Answer every request in a child of its own: as a new process would, but with all that is imported already.

    The process itself must never have worked on several threads, which would be missing in its children.

    Args:
        handle: runs in the child; what it raises is an error to the caller here.
    """

    def ask_child(request: Any) -> dict[str, Any]:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            die_with_parent()
            answers = os.fdopen(writer, "w")
            try:
                answer = handle(request)
            except Exception as error:
                traceback.print_exc()
                answer = {"raised": brief(error)}
            answers.write(json.dumps(answer))
            answers.close()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answers:
            text = answers.read()
        os.waitpid(child, 0)
        answer = json.loads(text) if text else {"raised": "the process ended"}
        return {"failed": answer["raised"]} if "raised" in answer else answer

    return ask_child


def brief(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:500]


def die_with_parent() -> None:
    """End this process when the one that started it ends, also while it is stopped."""
    import ctypes

    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL))

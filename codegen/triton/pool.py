"""Worker processes that compile Triton kernels side by side; each imports Triton once."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...runtime.errors import CompileError
from ...runtime.threads import default_threads

SCRIPT = Path(__file__).with_name("worker.py")
OLDEST = (3, 6)
INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""Of the environment, what workers get: variables of Triton, LLVM and ptxas must not change what is compiled."""

_STDERR_LINES = 30


@functools.cache
def find_triton() -> tuple[Path, str]:
    """The folder that holds the package ``triton``, and its version; imports nothing.

    Raises:
        CompileError: Triton is not installed or too old.
    """
    specification = importlib.util.find_spec("triton")
    if specification is None or specification.origin is None:
        raise CompileError(
            "GPU kernels are compiled by Triton, which is not installed; pip install 'tilewright[compile]' (Linux only)"
        )
    origin = Path(specification.origin)
    found = re.search(r"""^__version__ = ['"]((\d+)\.(\d+)[^'"]*)""", origin.read_text(), re.MULTILINE)
    if found is None:
        raise CompileError(f"{origin} does not say which version of Triton it is; install Triton again")
    if (int(found[2]), int(found[3])) < OLDEST:
        raise CompileError(f"Triton {found[1]} is too old; install {OLDEST[0]}.{OLDEST[1]} or newer")
    return origin.parent.parent, found[1]


class Pool:
    """Compiles requests in as many processes as there are processors; started when first needed.

    Args:
        headers: module name -> text of what kernels import besides Triton.
        workers: most processes at a time; by default one per processor that this process may use.
    """

    def __init__(self, headers: Mapping[str, str], workers: int | None = None):
        self.headers = dict(headers)
        self.workers = workers or default_threads()
        self.started = 0
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, requests: Sequence[Mapping[str, Any]], finished: Callable[[int, dict[str, Any]], None]
    ) -> list[dict[str, Any]]:
        """The answers to requests, in their order; what a request and an answer are, ``worker.py`` says.

        Args:
            requests: what to compile.
            finished: called with a request's place and its answer as each is done, from several threads.

        Raises:
            CompileError: a worker could not be started or died; names the kernel. What ``finished`` raises passes on.
        """
        stopped = False

        def compile_one(place: int) -> dict[str, Any]:
            nonlocal stopped
            if stopped:
                return {}
            try:
                answer = self._compile(requests[place])
                finished(place, answer)
            except BaseException:
                stopped = True
                raise
            return answer

        with ThreadPoolExecutor(max(1, min(self.workers, len(requests)))) as threads:
            futures = [threads.submit(compile_one, place) for place in range(len(requests))]
            try:
                return [future.result() for future in futures]
            except KeyboardInterrupt:
                stopped = True
                for worker in self._all:
                    worker.process.kill()  # ends the waiting of its thread
                raise

    def close(self) -> None:
        """End all workers; a later :meth:`run` starts new ones."""
        self._idle = queue.SimpleQueue()
        while self._all:
            self._all.pop().close()

    def _compile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        worker = self._take()
        try:
            answer = worker.compile(request)
        except BaseException:
            self._discard(worker)
            raise
        self._idle.put(worker)
        return answer

    def _take(self) -> _Worker:
        """An idle worker that still lives, or a new one."""
        with contextlib.suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.process.poll() is None:
                    return worker
                self._discard(worker)
        worker = _Worker(self.headers)
        self._all.append(worker)
        self.started += 1
        return worker

    def _discard(self, worker: _Worker) -> None:
        self._all.remove(worker)
        worker.close()


class _Worker:
    """One process. Its folder holds what it writes and is removed with it; nothing goes to the user's home."""

    def __init__(self, headers: Mapping[str, str]):
        path, version = find_triton()
        self.folder = tempfile.TemporaryDirectory(prefix="tilewright-triton-", ignore_cleanup_errors=True)
        self.messages = Path(self.folder.name) / "messages.txt"
        self.read_so_far = 0
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= dict.fromkeys(("HOME", "TRITON_HOME", "TMPDIR"), self.folder.name)
        environment |= {
            "PYTHONHASHSEED": "0",
            "TRITON_CACHE_DIR": f"{self.folder.name}/cache",
            "TRITON_DISABLE_LINE_INFO": "1",  # it more than doubles a cubin
            "TRITON_DUMP_PTXAS_LOG": "1",  # registers and spills
        }
        with self.messages.open("wb") as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=environment,
                cwd=self.folder.name,
                text=True,
            )
        answer = self._ask({"path": str(path), "headers": dict(headers), "folder": self.folder.name})
        if answer is None:
            problem = f"the process that compiles with Triton {self._end()}\n{self._said()}".rstrip()
        elif answer["triton"] != version:
            problem = f"found Triton {version}, but {sys.executable} imports {answer['triton']}; install it once"
        else:
            return
        self.close()
        raise CompileError(problem)

    def compile(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, with what the process wrote where it is an error."""
        self._said()
        answer = self._ask(request)
        if answer is None:
            raise CompileError(
                f"kernel {request['name']}: Triton {self._end()} while compiling it for compute capability "
                f"{request['capability'] / 10}\n{self._said()}".rstrip()
            )
        if "error" in answer:
            answer["messages"] = self._said()
        return answer

    def close(self) -> None:
        """End the process and remove its folder."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what is left to write has no reader
                    stream.close()
        self.folder.cleanup()

    def _ask(self, data: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to a line; None when the process ended instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(data) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        return dict(json.loads(line)) if line.endswith("\n") else None

    def _end(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "was killed (is there enough memory?)"
        return f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _said(self) -> str:
        """The last lines that the process wrote since the last call."""
        with contextlib.suppress(OSError), self.messages.open("rb") as file:
            file.seek(self.read_so_far)
            text = file.read()
            self.read_so_far += len(text)
            return "\n".join(text.decode(errors="replace").strip().splitlines()[-_STDERR_LINES:])
        return ""

"""The parent's side of the interpreter: starting the worker, giving it memory and work, and noticing its end."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InterpreterError
from . import messages
from .launch import Launch

WORKER = f"{__package__}.worker"


class Interpreter:
    """A process that runs the kernel sources of one folder. Calls from several threads run one after the other."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Start the process.

        Args:
            folder: what kernel sources, and the modules that they import, lie in.

        Raises:
            InterpreterError: Triton is not installed, or the process does not start.
        """
        if importlib.util.find_spec("triton") is None:
            raise InterpreterError("the interpreter device needs Triton: pip install 'triton>=3.6,<3.10'")
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # nothing may appear in the folder
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), str(Path(folder).absolute())]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()]
            )
        self._connection = ours
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._dropped: list[int] = []
        self._close = weakref.finalize(self, _end, self._process, ours, os.getpid())
        self._ask(["hello"], (), "starting")

    def map(self, file: int, writable: bool) -> int:
        """Let the worker map a whole open file; returns the number that operands name it by."""
        block = next(self._ids)
        self._ask(["map", block, writable], [file], "mapping memory")
        return block

    def unmap(self, block: int) -> None:
        """Let go of a block, before the next launch."""
        self._dropped.append(block)  # may be called by the garbage collector, while a message is on its way

    def run(self, launches: Sequence[Launch]) -> None:
        """Run kernels one after the other.

        Raises:
            InterpreterError: a kernel failed, with its name and line, or the worker ended.
        """
        names = ", ".join(dict.fromkeys(launch.kernel for launch in launches))
        self._ask(["run", [launch.to_json() for launch in launches]], (), f"running {names}")

    def close(self) -> None:
        """End the worker; later calls fail."""
        self._close()

    def _ask(self, message: list[Any], files: Sequence[int], doing: str) -> None:
        if os.getpid() != self._owner:
            raise InterpreterError(
                "the interpreter belongs to the process that started it: load the model after a fork"
            )
        with self._lock:
            if not self._close.alive:
                raise InterpreterError("the interpreter is closed")
            try:
                while self._dropped:
                    messages.send(self._connection, ["unmap", self._dropped.pop()])
                messages.send(self._connection, message, files)
                answer, _ = messages.receive(self._connection)
            except (OSError, EOFError):
                self._close()
                raise InterpreterError(f"the interpreter ended ({self._ending()}) while {doing}") from None
            except BaseException:  # interrupted: its answer would be taken for that of the next message
                self._close()
                raise
        if answer is not None:
            raise InterpreterError(answer)

    def _ending(self) -> str:
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:
        return
    try:
        process.wait(timeout=1)  # it ends by itself when the connection closes
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

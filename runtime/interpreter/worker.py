"""The interpreter's process: ``python -m tilewright.runtime.interpreter.worker SOCKET FOLDER``.

It has TRITON_INTERPRET=1 in its environment, answers every request but ``unmap`` with null or the text of an error,
and ends when the other side of the socket closes, even in the middle of a kernel.
"""

from __future__ import annotations

import importlib.util
import linecache
import mmap
import os
import queue
import select
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from . import messages, patches
from .launch import Launch, Operand

TYPES = {
    "float64": tl.float64,
    "float32": tl.float32,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "int64": tl.int64,
    "int32": tl.int32,
    "int16": tl.int16,
    "int8": tl.int8,
    "uint8": tl.uint8,
    "bool": tl.uint8,
}
SIZE_TYPES = {"i32": (tl.int32, np.int32), "i64": (tl.int64, np.int64)}


class Worker:
    """Mapped memory, loaded kernels and what is done with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks: dict[int, np.ndarray] = {}
        self.kernels: dict[tuple[str, str], Callable[..., None]] = {}
        self.bounds = patches.apply()

    def answer(self, request: list[Any], files: list[int]) -> None:
        """Do what a request asks for."""
        match request:
            case ["hello"]:
                pass
            case ["map", block, writable]:
                self.map(block, files[0], writable)
            case ["unmap", block]:
                self.blocks.pop(block, None)
            case ["run", launches]:
                for data in launches:
                    self.launch(Launch.from_json(data))
            case _:
                raise ValueError(f"unknown request {request[0]!r}")

    def map(self, block: int, file: int, writable: bool) -> None:
        """Map a whole file."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self.blocks[block] = np.frombuffer(mmap.mmap(file, 0, prot=protection), np.uint8)
        finally:
            os.close(file)

    def launch(self, launch: Launch) -> None:
        """Run one kernel over its grid."""
        kernel = self.kernel(launch.file, launch.kernel)
        pointers = [self.pointer(operand) for operand in launch.operands]
        size_type, size_dtype = SIZE_TYPES[launch.size_type]
        sizes = [scalar(np.array([size], size_dtype), size_type) for size in launch.sizes]
        spans = [
            (int(pointer.handle.data[0]), item.size) for pointer, item in zip(pointers, launch.operands, strict=True)
        ]
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(launch.grid, 1, 1)
        self.bounds.operands(spans)
        for program in range(launch.grid):
            builder.set_grid_idx(program, 0, 0)
            try:
                kernel(*pointers, *sizes, **launch.constants)
            except Exception as error:
                raise KernelError(describe(error, launch, program, self.folder)) from error

    def kernel(self, file: str, name: str) -> Callable[..., None]:
        """The kernel's function as the interpreter rewrites it."""
        if (file, name) not in self.kernels:
            module = load(self.folder / file, f"tilewright_kernel_{len(self.kernels)}")
            self.kernels[file, name] = getattr(module, name).rewrite()
        return self.kernels[file, name]

    def pointer(self, operand: Operand) -> tl.tensor:
        """An operand's address, as kernels take it."""
        block = self.blocks[operand.block]
        if operand.offset < 0 or operand.offset + operand.size > len(block):
            raise ValueError(f"an operand of {operand.size} bytes at {operand.offset} in a block of {len(block)}")
        address = np.array([block.ctypes.data + operand.offset], np.uint64)
        return scalar(address, tl.pointer_type(TYPES[operand.dtype]))


class KernelError(Exception):
    """A kernel raised; the text is for the user."""


def scalar(value: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """A scalar argument of a kernel."""
    return tl.tensor(interpreter.TensorHandle(value, dtype), dtype)


def load(path: Path, name: str) -> Any:
    """Import a kernel source by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(error: Exception, launch: Launch, program: int, folder: Path) -> str:
    """What went wrong, and in which lines of the folder's sources."""
    lines = [f"kernel {launch.kernel} failed in program {program} of {launch.grid}: {type(error).__name__}: {error}"]
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).is_relative_to(folder) and frame.lineno is not None:
            text = linecache.getline(frame.filename, frame.lineno).strip()
            lines.append(f"  {Path(frame.filename).name}:{frame.lineno}: {text}")
    return "\n".join(lines)


def listen(connection: socket.socket, requests: queue.SimpleQueue[tuple[Any, list[int]]]) -> None:
    """Queue requests as they come; end the process when no more can come."""
    parent = os.getppid()
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    try:
        while True:
            # another process that inherited the other side keeps it open, so ask for the parent as well
            while not waiting.poll(1000):
                if os.getppid() != parent:
                    os._exit(0)
            requests.put(messages.receive(connection))
    except (EOFError, OSError):
        os._exit(0)


def main() -> None:
    """Serve until the other side closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    folder = Path(sys.argv[2])
    sys.path.insert(0, str(folder))
    requests: queue.SimpleQueue[tuple[Any, list[int]]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, requests), daemon=True).start()
    worker = Worker(folder)
    while True:
        request, files = requests.get()
        answer = None
        try:
            worker.answer(request, files)
        except KernelError as error:
            answer = str(error)
        except Exception:
            answer = f"the interpreter failed:\n{traceback.format_exc()}"
        if request[0] != "unmap":
            messages.send(connection, answer)


if __name__ == "__main__":
    main()

"""Reading what Triton and ptxas give: a kernel's parameters from its PTX, its resources from the log of ptxas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime.errors import CompileError

SCRATCH = ("*i8", "*i8")
"""Two pointers that follow every kernel's own arguments: Triton's scratch in global memory, and its profiler's."""

# Of an argument: the types that it may have in PTX, which knows no signs and need not mark pointers.
_PTX_TYPES = {
    "i8": ("u8", "b8", "s8"),
    "i16": ("u16", "b16", "s16"),
    "i32": ("u32", "b32", "s32"),
    "i64": ("u64", "b64", "s64"),
    "fp32": ("f32", "b32"),
    "fp64": ("f64", "b64"),
}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s*(\.ptr)?[^,]*?([\w$]+)(\[\d+\])?\s*$")


@dataclass(frozen=True)
class Entry:
    """A kernel in PTX.

    Attributes:
        name: of the function.
        parameters: ``"u64 pointer"``, ``"u32"``, ``"b8[128]"``... in order.
        threads: per program; 0 where the PTX does not say.
    """

    name: str
    parameters: tuple[str, ...]
    threads: int


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel uses: registers per thread, bytes per thread spilled to local memory, and bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


def parse_entry(ptx: str) -> Entry:
    """The kernel in a PTX text.

    Raises:
        ValueError: not exactly one kernel, or a parameter that cannot be read.
    """
    entries = _ENTRY.findall(ptx)
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} kernels in the PTX, expected one")
    name, parameters, directives = entries[0]
    types = []
    for text in parameters.split(","):
        if not text.strip():
            continue
        found = _PARAMETER.search(text.strip())
        if found is None:
            raise ValueError(f"cannot read the parameter {text.strip()!r}")
        types.append(f"{found[1]}{found[4] or ''}{' pointer' if found[2] else ''}")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
    return Entry(name, tuple(types), int(threads[1]) if threads else 0)


def check_abi(kernel: str, ptx: str, signature: Sequence[str], warps: int) -> str:
    """Compare a kernel's parameters in PTX with those it will be called with; gives the function's name.

    Args:
        kernel: its name, for messages.
        ptx: the text.
        signature: types of operands and sizes, as in ``KernelCode.signature``.
        warps: per program, as launched.

    Raises:
        CompileError: number, order or types of the parameters differ, or the number of threads.
    """
    try:
        entry = parse_entry(ptx)
    except ValueError as error:
        raise CompileError(f"kernel {kernel}: {error}") from None
    expected = (*signature, *SCRATCH)
    fits = len(expected) == len(entry.parameters) and all(map(_fits, expected, entry.parameters))
    if not fits:
        raise CompileError(
            f"kernel {kernel}: its compiled parameters are not those it is called with (an error of the compiler)\n"
            f"  expected: {', '.join(expected)}\n  compiled: {', '.join(entry.parameters)}"
        )
    if entry.threads not in (0, 32 * warps):
        raise CompileError(f"kernel {kernel}: compiled for {entry.threads} threads, but Triton states {warps} warps")
    return entry.name


def _fits(expected: str, compiled: str) -> bool:
    if expected.startswith("*"):
        return compiled in ("u64", "b64", "u64 pointer", "b64 pointer")
    return compiled in _PTX_TYPES.get(expected, ())


def parse_log(log: str) -> Resources:
    """Resources from what ``ptxas -v`` wrote.

    Raises:
        ValueError: the log does not state them.
    """
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise ValueError(f"ptxas did not say which registers it used: {log.strip()!r}")
    shared = re.search(r"Used .*?(\d+) bytes smem", log)
    return Resources(int(registers[1]), int(spills[2]), int(spills[3]), int(spills[1]), int(shared[1]) if shared else 0)

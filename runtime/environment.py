"""Every environment variable that Tilewright reads, in one table.

Other modules take a variable from here and never name it themselves, so that ``tilewright doctor`` can list them all
with their meaning and present value.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what happens without it and what it means."""

    name: str
    default: str
    meaning: str

    def get(self) -> str | None:
        """The value with surrounding blanks removed; None where it is unset or blank."""
        return os.environ.get(self.name, "").strip() or None


COMPILER = Variable(
    "TILEWRIGHT_CC",
    "cc, gcc or clang on PATH, else the ziglang package",
    "C compiler to use: a command with its options, or 'zig' for the ziglang package",
)
CACHE = Variable(
    "TILEWRIGHT_CACHE",
    "$XDG_CACHE_HOME/tilewright, else ~/.cache/tilewright",
    "directory of the kernel cache, or 'off'",
)
CACHE_SIZE = Variable(
    "TILEWRIGHT_CACHE_SIZE",
    "2GiB",
    "size cap of the kernel cache: bytes, or a number with KiB, MiB or GiB",
)
CACHE_HOME = Variable("XDG_CACHE_HOME", "~/.cache", "where the desktop standard puts caches")
DEBUG = Variable("TILEWRIGHT_DEBUG", "off", "set to 1, commands show the traceback of every error")

VARIABLES = (COMPILER, CACHE, CACHE_SIZE, CACHE_HOME, DEBUG)

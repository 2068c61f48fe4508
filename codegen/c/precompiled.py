"""The processor's intrinsics, precompiled: their header takes as long to read as a kernel takes to compile.

With GCC, kernels for AVX2 read parts of it (``tw_intrinsics.h``), which takes no longer; this is for all others.

A precompiled header fits exactly one compiler and set of flags. This process makes each on the first compilation with
two sources that need it, and keeps it in a temporary directory until it ends. The objects are the same, byte for byte.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from ..targets import CompilerKind

INTRINSICS = "immintrin.h"
_INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]+["<]([^">]+)[">]', re.M)


class Precompiled:
    """The precompiled headers of this process, made as needed; safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._headers: dict[tuple[str, ...], Path | None] = {}

    def options(self, command: Sequence[str], kind: CompilerKind, wanting: int) -> tuple[str, ...]:
        """Options, to stand before all others that include files, that bring the intrinsics.

        Args:
            command: compiler and flags, exactly those that the sources are compiled with.
            kind: of the compiler.
            wanting: how many sources will be compiled with them now. One alone is no reason to make a header.

        Returns:
            No options where a header is not worth it, or this compiler makes none: sources include what they need.
        """
        key = tuple(command)
        if kind == "gcc" and not any("x86-64-v4" in flag for flag in command):
            return ()
        with self._lock:
            header = self._headers.get(key)
            gone = header is not None and not header.exists()  # what is temporary may be tidied up by others
            if gone or key not in self._headers:
                if wanting < 2:
                    return ()
                header = self._headers[key] = self._make(key, len(self._headers))
        if header is None:
            return ()
        # GCC looks for what is precompiled beside a header, and reads the header where that does not fit.
        return ("-include", str(header.with_suffix(""))) if kind == "gcc" else ("-include-pch", str(header))

    def _make(self, command: tuple[str, ...], number: int) -> Path | None:
        if self._folder is None or not Path(self._folder.name).exists():
            self._folder = tempfile.TemporaryDirectory(prefix="tilewright-headers-")
        header = Path(self._folder.name) / f"{number}.h"
        header.write_text(f"#include <{INTRINSICS}>\n")
        arguments = [*command, "-x", "c-header", header.name, "-o", f"{header.name}.gch"]
        done = subprocess.run(arguments, cwd=header.parent, capture_output=True)
        return Path(f"{header}.gch") if done.returncode == 0 else None


PRECOMPILED = Precompiled()


def needs_intrinsics(text: str, include: Path) -> bool:
    """Whether a source includes the intrinsics, itself or through headers of a directory."""
    return any(name == INTRINSICS or name in _headers_with_intrinsics(include) for name in _INCLUDED.findall(text))


@functools.cache
def _headers_with_intrinsics(include: Path) -> frozenset[str]:
    """Names of the directory's headers that include the intrinsics, directly or not."""
    includes = {path.name: _INCLUDED.findall(path.read_text()) for path in include.glob("*.h")}
    found = {INTRINSICS}
    while more := {name for name, names in includes.items() if found.intersection(names)} - found:
        found |= more
    return frozenset(found)

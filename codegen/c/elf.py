"""What a linked library asks of the system: the libraries it needs and the symbol versions it binds to.

Reads 64-bit little-endian ELF; layouts from the System V ABI (gABI chapter 4) and the GNU symbol versioning extension
(LSB core, section "Symbol Versioning").
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from ...runtime.errors import CompileError

_DYNAMIC, _VERSION_NEEDS = 6, 0x6FFFFFFE
_NEEDED = 1


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def needed_libraries(library: bytes) -> tuple[str, ...]:
    """Names of the shared libraries (DT_NEEDED), in file order."""
    names = []
    for section, strings in _sections_of(library, _DYNAMIC):
        for at in range(section.offset, section.offset + section.size, 16):
            tag, value = struct.unpack_from("<qQ", library, at)
            if tag == _NEEDED:
                names.append(_string(library, strings, value))
    return tuple(names)


def required_versions(library: bytes) -> dict[str, tuple[str, ...]]:
    """Library name → versions required of it, such as ``{"libc.so.6": ("GLIBC_2.2.5",)}``."""
    required: dict[str, tuple[str, ...]] = {}
    for section, strings in _sections_of(library, _VERSION_NEEDS):
        at = section.offset
        while True:
            _, count, file, auxiliary, following = struct.unpack_from("<HHIII", library, at)
            versions = []
            entry = at + auxiliary
            for _ in range(count):
                _, _, _, name, step = struct.unpack_from("<IHHII", library, entry)
                versions.append(_string(library, strings, name))
                entry += step
            required[_string(library, strings, file)] = tuple(versions)
            if not following:
                break
            at += following
    return required


def newest_glibc(library: bytes) -> tuple[int, ...]:
    """The newest GLIBC version that any symbol binds to; (0,) where none does.

    Raises:
        CompileError: a symbol binds to a version private to one C library (``GLIBC_PRIVATE``).
    """
    newest: tuple[int, ...] = (0,)
    for name, versions in required_versions(library).items():
        for version in versions:
            if match := re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", version):
                newest = max(newest, tuple(int(part) for part in match[1].split(".")))
            elif version.startswith("GLIBC_PRIVATE"):
                raise CompileError(f"the linked library binds to {version} of {name}, which no other system has")
    return newest


def _sections_of(library: bytes, kind: int) -> list[tuple[_Section, _Section]]:
    """Sections of a kind, each with its string table."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise CompileError("the linker's output is no 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    entry_size, count = struct.unpack_from("<HH", library, 0x3A)
    sections = []
    for index in range(count):
        _, section_kind, _, _, offset, size, link = struct.unpack_from("<IIQQQQI", library, table + index * entry_size)
        sections.append(_Section(section_kind, offset, size, link))
    return [(section, sections[section.link]) for section in sections if section.kind == kind]


def _string(library: bytes, table: _Section, offset: int) -> str:
    start = table.offset + offset
    return library[start : library.index(b"\0", start)].decode()

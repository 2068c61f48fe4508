"""The user's kernel cache: compiled objects by the digest of everything that went into them.

An entry is a file ``<directory>/<first two digits>/<key>`` of the SHA-256 of its content followed by the content. It
appears by renaming, so a reader sees all of it or nothing, and processes may share the directory. An entry that does
not match its digest is removed and counts as absent. Reading refreshes an entry's time; :meth:`Cache.trim` removes the
longest unused ones above the size cap.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..runtime.environment import CACHE, CACHE_HOME, CACHE_SIZE
from ..runtime.errors import UsageError

_DIGEST_BYTES = 32
_ABANDONED_AFTER = 3600.0
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """A directory of compiled objects.

    Attributes:
        directory: where entries are; made on the first write.
        limit: size cap in bytes, kept by :meth:`trim`.
    """

    directory: Path
    limit: int = 2 << 30

    def get(self, key: str) -> bytes | None:
        """The content stored under a key, or None. A damaged entry is removed."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        content = data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != data[:_DIGEST_BYTES]:
            path.unlink(missing_ok=True)
            return None
        try:
            os.utime(path)
        except (FileNotFoundError, PermissionError):
            # Trimmed meanwhile by another process, or a cache shared read-only: the content is good either way.
            return content
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store content under a key, replacing what is there.

        Raises:
            OSError: the directory cannot be written; nothing half-written stays.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix="partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def trim(self) -> None:
        """Remove the longest unused entries until the cap holds, and what interrupted writers left behind."""
        entries: list[tuple[float, int, Path]] = []
        now = time.time()
        for path in self.directory.glob("??/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.name.startswith("partial-"):
                if now - status.st_mtime > _ABANDONED_AFTER:
                    path.unlink(missing_ok=True)
            else:
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / key


def user_cache() -> Cache | None:
    """The cache that the environment asks for; None where it is switched off.

    Raises:
        UsageError: the size cap cannot be read.
    """
    directory = CACHE.get()
    if directory == "off":
        return None
    if directory is None:
        home = CACHE_HOME.get()
        directory = str((Path(home) if home else Path.home() / ".cache") / "tilewright")
    return Cache(Path(directory).expanduser(), parse_size(CACHE_SIZE.get() or CACHE_SIZE.default))


def parse_size(text: str) -> int:
    """Bytes in a size such as ``500MiB`` or ``1.5 GiB``.

    Raises:
        UsageError: neither a number of bytes nor a number with KiB, MiB or GiB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{CACHE_SIZE.name}={text!r} is no size; write bytes, or a number with KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def key_of(parts: Iterable[str | bytes]) -> str:
    """SHA-256 over parts, each with its length before it, so that moving text between parts changes the key."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()

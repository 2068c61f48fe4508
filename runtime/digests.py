"""SHA-256 of files, with OpenSSL's functions where there is much to hash and the interpreter's own where there is not.

OpenSSL hashes five times faster, but loading it takes as long as hashing a megabyte without it; the code and the plans
of a model are smaller than that.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

try:
    _own: Any = import_module("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256
except ImportError:  # an interpreter built without it
    from hashlib import sha256 as _own

_MUCH = 1 << 20


def sha256(expected_bytes: int, content: bytes = b"") -> Any:
    """A hash object as ``hashlib.sha256(content)`` gives it.

    Args:
        expected_bytes: how much will be hashed, roughly.
        content: the first of it.
    """
    if expected_bytes < _MUCH and "_hashlib" not in sys.modules:
        return _own(content)
    import hashlib

    return hashlib.sha256(content)


def hexadecimal(content: bytes) -> str:
    """The digest of some bytes."""
    return str(sha256(len(content), content).hexdigest())

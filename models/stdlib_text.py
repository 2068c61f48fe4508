"""The text of the running interpreter's standard library, split into training and held-out text.

Nothing is copied into the repository: both parts are read from the installed ``.py`` files. The split is by module, so
no held-out file is ever trained on.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HELD_OUT = ("bisect.py", "colorsys.py", "csv.py", "graphlib.py", "queue.py", "sched.py", "shlex.py", "textwrap.py")

# Other people's packages, tests (which repeat the modules they test, held-out ones too), and generated tables.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__")
)


def training_text() -> np.ndarray:
    """All modules that are not held out, in the order of their paths, as one array of bytes (uint8, [n])."""
    return _joined(path for path in _modules() if path.as_posix() not in HELD_OUT)


def held_out_text() -> np.ndarray:
    """The held-out modules, in the order of ``HELD_OUT``, as one array of bytes (uint8, [n])."""
    return _joined(Path(name) for name in HELD_OUT)


def windows(text: np.ndarray, length: int) -> np.ndarray:
    """Cut text into rows of ``length + 1`` bytes (int64) that overlap by one.

    All but the last byte of a row are a model's input, all but the first its targets. The remainder
    that fills no row is dropped.

    Raises:
        ValueError: the text is shorter than one row.
    """
    count = (len(text) - 1) // length
    if count < 1:
        raise ValueError(f"{len(text)} bytes of text do not fill one window of {length + 1}")
    starts = np.arange(count)[:, None] * length
    return text[starts + np.arange(length + 1)].astype(np.int64)


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> Iterator[Path]:
    """Relative paths of the library's modules, sorted, so that every machine reads them in the same order."""
    root = _root()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return iter(sorted((p for p in paths if SKIPPED_FOLDERS.isdisjoint(p.parts)), key=Path.as_posix))


def _joined(modules: Iterator[Path]) -> np.ndarray:
    """Concatenated contents with newlines as LF.

    Raises:
        FileNotFoundError: this Python comes without the sources of its standard library.
    """
    root = _root()
    try:
        data = b"".join((root / module).read_bytes().replace(b"\r\n", b"\n") for module in modules)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename}: the standard library's source is missing; use a Python that is installed with it"
        ) from error
    return np.frombuffer(data, dtype=np.uint8)

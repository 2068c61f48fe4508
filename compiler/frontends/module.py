"""A PyTorch module made by a function in a Python file: ``path/to/file.py:factory``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...runtime.errors import SourceError
from . import Loaded

_FORMS = "a module, (module, args), (module, args, kwargs) or (module, args, kwargs, shapes)"


def is_factory(text: str) -> bool:
    """Whether a source reads as ``file.py:factory``."""
    path, colon, name = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def load_factory(text: str) -> Loaded:
    """Import the file, call the factory without arguments and take what it returns.

    The file's own folder is importable while it runs, as for ``python file.py``.

    Raises:
        SourceError: no such file or function, it fails, or it returns something else.
    """
    path_text, _, name = text.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise SourceError(f"{path}: no such file; a Python source is given as path/to/file.py:factory")
    spec = importlib.util.spec_from_file_location(f"tilewright_source_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    try:
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise SourceError(f"{path} cannot be imported{_line(error, path)}: {_named(error)}") from error
        factory = getattr(module, name, None)
        if not callable(factory):
            functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            known = f"it defines {', '.join(functions)}" if functions else "it defines no functions"
            raise SourceError(f"{path} has no function {name!r}; {known}")
        try:
            made = factory()
        except Exception as error:
            raise SourceError(f"{path}:{name} failed{_line(error, path)}: {_named(error)}") from error
    finally:
        sys.path.remove(folder)
        sys.modules.pop(spec.name, None)
    return _loaded(made, text)


def _loaded(made: Any, text: str) -> Loaded:
    if isinstance(made, nn.Module):
        return Loaded(made, made_up=False)
    if not isinstance(made, tuple) or not 1 <= len(made) <= 4 or not isinstance(made[0], nn.Module):
        raise SourceError(f"{text} returned a {type(made).__name__}; it must return {_FORMS}")
    defaults: tuple[Any, ...] = ((), {}, None)
    module, args, kwargs, shapes = made + defaults[len(made) - 1 :]
    if not isinstance(args, tuple | list):
        raise SourceError(
            f"{text}: the sample args are a {type(args).__name__}; put them in a tuple, as in (module, (x,))"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise SourceError(f"{text}: the sample kwargs are a {type(kwargs).__name__}, not a dict")
    return Loaded(module, args, kwargs or {}, shapes, made_up=False)


def _named(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


def _line(error: Exception, path: Path) -> str:
    """`` at line N`` of the file, where the error passed through it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" at line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f" at line {lines[-1]}" if lines else ""

"""Reading frozen dataclasses from JSON data: exact fields, exact types, and errors that give the path to the field.

The inverse of writing a dataclass as a dictionary of its fields. Understood are ``int``, ``str``, ``bool``,
``Literal``, size expressions, other dataclasses, tuples of any of these, and ``Any`` (taken as it is).
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from . import sizes
from .records import fields_of

Reader = Callable[[Any], Any]

_EXACT = (int, str, bool)

ADDED_LATER = "added later"
"""Metadata of a field that files of older format versions lack; it has its default then."""


class FieldError(ValueError):
    """A value that does not fit its field: the path to it from the outside in, and what was expected."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path: list[str] = []

    def within(self, part: str) -> FieldError:
        """The same error, seen from the object that holds the field."""
        self.path.insert(0, part)
        return self

    def __str__(self) -> str:
        where = "".join(part if part.startswith("[") else f".{part}" for part in self.path).lstrip(".")
        return f"{where}: {self.problem}" if where else self.problem


def read(kind: Any, data: Any) -> Any:
    """An object of the annotated type from JSON data.

    Raises:
        FieldError: a missing or unknown field, or a value of the wrong type.
    """
    return _reader(kind)(data)


@cache
def _reader(kind: Any) -> Reader:
    if kind is Any:
        return lambda data: data
    if kind in _EXACT:
        return _exact(kind)
    if kind == sizes.Size:
        return _size
    if typing.get_origin(kind) is typing.Literal:
        return _choice(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        element, ellipsis = typing.get_args(kind)
        assert ellipsis is ..., kind
        return _sequence(_reader(element), element if element in _EXACT else None)
    if fields_of(kind) is not None:
        return _object(kind)
    raise TypeError(f"no reader for {kind!r}")


def _exact(kind: type) -> Reader:
    def read_exact(data: Any) -> Any:
        if type(data) is not kind:  # a bool is no int here
            raise FieldError(f"expected {kind.__name__}, got {_brief(data)}")
        return data

    return read_exact


def _size(data: Any) -> sizes.Size:
    if type(data) is int:
        return data
    try:
        return sizes.from_json(data)
    except ValueError as error:
        raise FieldError(str(error)) from None


def _choice(options: tuple[Any, ...]) -> Reader:
    def read_choice(data: Any) -> Any:
        if data not in options:
            raise FieldError(f"expected one of {', '.join(map(repr, options))}, got {_brief(data)}")
        return data

    return read_choice


def _sequence(element: Reader, exact: type | None = None) -> Reader:
    def read_sequence(data: Any) -> tuple[Any, ...]:
        if not isinstance(data, list):
            raise FieldError(f"expected a list, got {_brief(data)}")
        if exact is not None and all([type(part) is exact for part in data]):
            return tuple(data)
        parts: list[Any] = []
        try:
            for part in data:
                parts.append(element(part))
        except FieldError as error:
            raise error.within(f"[{len(parts)}]") from None
        return tuple(parts)

    return read_sequence


def _object(kind: type) -> Reader:
    hints: dict[str, Any] = kind.__annotations__
    if any(isinstance(hint, str) for hint in hints.values()):  # each is compiled, which takes a while
        hints = typing.get_type_hints(kind)
    fields = fields_of(kind) or {}
    names = fields.keys()
    later = {name for name, field in fields.items() if field.metadata.get(ADDED_LATER)}
    kinds = [(name, hints[name]) for name in fields]
    readers = [(name, hint in _EXACT, hint, _reader(hint)) for name, hint in kinds]

    def read_object(data: Any) -> Any:
        if not isinstance(data, dict):
            raise FieldError(f"expected an object, got {_brief(data)}")
        if data.keys() != names:
            missing = [name for name in fields if name not in data and name not in later]
            unknown = [name for name in data if name not in names]
            if missing or unknown:
                raise FieldError(f"missing field {missing[0]!r}" if missing else f"unknown field {_brief(unknown[0])}")
        values = {}
        name = ""
        try:
            for name, plain, hint, reader in readers:
                if name in data:
                    value = data[name]
                    values[name] = value if plain and type(value) is hint else reader(value)
        except FieldError as error:
            raise error.within(name) from None
        return kind(**values)

    return read_object


def _brief(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Reading frozen dataclasses from JSON data: exact fields, exact types, and errors that give the path to the field.

The inverse of writing a dataclass as a dictionary of its fields. Understood are ``int``, ``str``, ``bool``,
``Literal``, size expressions, other dataclasses, tuples of any of these, and ``Any`` (taken as it is).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from . import sizes

Reader = Callable[[Any], Any]

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
    if kind in (int, str, bool):
        return _exact(kind)
    if kind == sizes.Size:
        return _size
    if typing.get_origin(kind) is typing.Literal:
        return _choice(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        element, ellipsis = typing.get_args(kind)
        assert ellipsis is ..., kind
        return _sequence(_reader(element))
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind))
    raise TypeError(f"no reader for {kind!r}")


def _exact(kind: type) -> Reader:
    def read_exact(data: Any) -> Any:
        if type(data) is not kind:  # a bool is no int here
            raise FieldError(f"expected {kind.__name__}, got {_brief(data)}")
        return data

    return read_exact


def _size(data: Any) -> sizes.Size:
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


def _sequence(element: Reader) -> Reader:
    def read_sequence(data: Any) -> tuple[Any, ...]:
        if not isinstance(data, list):
            raise FieldError(f"expected a list, got {_brief(data)}")
        parts = []
        for index, part in enumerate(data):
            try:
                parts.append(element(part))
            except FieldError as error:
                raise error.within(f"[{index}]") from None
        return tuple(parts)

    return read_sequence


def _object(kind: type) -> Reader:
    hints = typing.get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}
    later = {field.name for field in dataclasses.fields(kind) if field.metadata.get(ADDED_LATER)}

    def read_object(data: Any) -> Any:
        if not isinstance(data, dict):
            raise FieldError(f"expected an object, got {_brief(data)}")
        if data.keys() != readers.keys():
            missing = [name for name in readers if name not in data and name not in later]
            unknown = [name for name in data if name not in readers]
            if missing or unknown:
                raise FieldError(f"missing field {missing[0]!r}" if missing else f"unknown field {_brief(unknown[0])}")
        values = {}
        for name, reader in readers.items():
            if name not in data:
                continue
            try:
                values[name] = reader(data[name])
            except FieldError as error:
                raise error.within(name) from None
        return kind(**values)

    return read_object


def _brief(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."

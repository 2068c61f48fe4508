"""Frozen dataclasses that cost little to define: what ``@dataclass(frozen=True)`` is, without code made at import.

The decorator of the standard library writes and compiles six methods for every class, half a millisecond each, and its
module imports ``inspect``; a process that loads a model would spend more time on that than on reading the model. Here
all classes share the methods, and ``dataclasses`` is imported when it first asks for the fields of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

MISSING: Any = object()
"""Stands for a default that there is not."""


class Field:
    """What a class says of a field beyond its type; :func:`field` makes it."""

    __slots__ = ("default", "default_factory", "metadata")

    def __init__(self, default: Any, default_factory: Any, metadata: Mapping[str, Any]) -> None:
        self.default, self.default_factory, self.metadata = default, default_factory, metadata


def field(
    *, default: Any = MISSING, default_factory: Callable[[], Any] = MISSING, metadata: Mapping[str, Any] | None = None
) -> Any:
    """A field with a default or a function that makes one, as ``dataclasses.field``."""
    return Field(default, default_factory, metadata or {})


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make a frozen dataclass of a class without slots: ``dataclasses.fields``, ``replace`` and the like take it.

    Equal are objects of one class with equal fields. Defaults and :func:`field` mean what they do for dataclasses.
    """
    fields: dict[str, Field] = {}
    for name in cls.__annotations__:
        value = cls.__dict__.get(name, MISSING)
        fields[name] = item = value if isinstance(value, Field) else Field(value, MISSING, {})
        if item.default is not MISSING:
            setattr(cls, name, item.default)
        elif value is not MISSING:
            delattr(cls, name)
    given: dict[str, Any] = {
        "__record_fields__": fields,
        "__match_args__": tuple(fields),
        "__dataclass_fields__": _DataclassFields(cls),
    }
    given |= {method.__name__: method for method in (__init__, __repr__, __eq__, __hash__, __setattr__, __delattr__)}
    for name, value in given.items():
        setattr(cls, name, value)
    return cls


def fields_of(kind: type) -> Mapping[str, Any] | None:
    """The fields of a record or a dataclass by name, each with ``metadata``; None of another class."""
    found: Mapping[str, Any] | None = getattr(kind, "__record_fields__", None)
    return getattr(kind, "__dataclass_fields__", None) if found is None else found


class _DataclassFields:
    """Gives a record's ``__dataclass_fields__`` as the standard library makes them, when somebody first asks."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __get__(self, record: Any, owner: Any) -> Any:
        import dataclasses

        kind, items = self.kind, []
        for name, item in kind.__record_fields__.items():
            given = {"default": item.default, "default_factory": item.default_factory}
            given = {key: value for key, value in given.items() if value is not MISSING}
            specifier: Any = dataclasses.field(**given, metadata=item.metadata)
            items.append((name, kind.__annotations__[name], specifier))
        made: Any = dataclasses.make_dataclass(kind.__name__, items, init=False, repr=False, eq=False)
        kind.__dataclass_fields__ = made.__dataclass_fields__
        return kind.__dataclass_fields__


def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:  # noqa: N807
    kind = type(self)
    names = kind.__match_args__
    if not args and kwargs.keys() == kind.__record_fields__.keys():  # as readers of files do
        self.__dict__.update(kwargs)
        return
    values = dict(zip(names, args, strict=False))
    if len(values) < len(args):
        raise TypeError(f"{kind.__name__} has {len(names)} fields, got {len(args)} values")
    if kwargs:
        for name in kwargs:
            if name in values or name not in names:
                what = "given twice" if name in values else "no field"
                raise TypeError(f"{kind.__name__}: {name!r} is {what}")
        values |= kwargs
    if len(values) < len(names):
        for name, item in kind.__record_fields__.items():
            if name in values:
                continue
            if item.default is not MISSING:
                values[name] = item.default
            elif item.default_factory is not MISSING:
                values[name] = item.default_factory()
            else:
                raise TypeError(f"{kind.__name__}: {name!r} is missing")
    self.__dict__.update(values)


def __repr__(self: Any) -> str:  # noqa: N807
    values = self.__dict__
    return f"{type(self).__qualname__}({', '.join(f'{name}={values[name]!r}' for name in self.__match_args__)})"


def __eq__(self: Any, other: Any) -> Any:  # noqa: N807
    if type(other) is not type(self):
        return NotImplemented
    mine, theirs = self.__dict__, other.__dict__
    return all(mine[name] == theirs[name] for name in self.__match_args__)


def __hash__(self: Any) -> int:  # noqa: N807
    values = self.__dict__
    return hash(tuple([values[name] for name in self.__match_args__]))


def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def __delattr__(self: Any, name: str) -> None:  # noqa: N807
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")

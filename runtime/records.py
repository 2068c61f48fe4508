"""Frozen dataclasses that cost little to define: what ``@dataclass(frozen=True)`` is, without code made at import.

The decorator of the standard library writes and compiles six methods for every class, half a millisecond each; a
process that loads a model would spend more time on that than on reading the model. Here all classes share the methods.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def frozen(cls: type[T]) -> type[T]:
    """Make a frozen dataclass of a class without slots: ``dataclasses.fields``, ``replace`` and the like take it.

    Equal are objects of one class with equal fields. Defaults and ``field(...)`` mean what they do for dataclasses.
    """
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
    for method in (__init__, __repr__, __eq__, __hash__, __setattr__, __delattr__):
        setattr(made, method.__name__, method)
    return cls


def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:  # noqa: N807
    kind = type(self)
    names = kind.__match_args__
    if not args and kwargs.keys() == kind.__dataclass_fields__.keys():  # as readers of files do
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
        for name, field in kind.__dataclass_fields__.items():
            if name in values:
                continue
            if field.default is not dataclasses.MISSING:
                values[name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                values[name] = field.default_factory()
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
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def __delattr__(self: Any, name: str) -> None:  # noqa: N807
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

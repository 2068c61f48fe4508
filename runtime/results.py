"""Rebuilding the structure that the model returned: tuples, lists and dictionaries of outputs, sizes and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import sizes
from .buffers import duplicate

Arrays = Sequence[Any]
Builder = Callable[[Arrays, Mapping[str, int]], Any]


def compile_results(tree: Any) -> Builder:
    """A function from (output arrays, symbol values) to what the caller gets.

    An output that the tree names more than once is copied for every time after the first, so that no two parts of a
    result share memory.

    Args:
        tree: ``Plan.results``, validated.
    """
    return _builder(tree, set())


def _builder(tree: dict[str, Any], seen: set[int]) -> Builder:
    ((kind, value),) = tree.items()
    if kind == "output":
        if value in seen:
            return lambda arrays, values: _copy(arrays[value])
        seen.add(value)
        return lambda arrays, values: arrays[value]
    if kind == "size":
        size = sizes.from_json(value)
        return lambda arrays, values: sizes.evaluate(size, values)
    if kind == "constant":
        return lambda arrays, values: value
    if kind == "dict":
        items = [(key, _builder(part, seen)) for key, part in value.items()]
        return lambda arrays, values: {key: build(arrays, values) for key, build in items}
    parts = [_builder(part, seen) for part in value]
    make = tuple if kind == "tuple" else list
    return lambda arrays, values: make([build(arrays, values) for build in parts])


def _copy(array: Any) -> Any:
    if isinstance(array, memoryview):
        return duplicate(array)
    return array.copy() if hasattr(array, "copy") else array.clone()

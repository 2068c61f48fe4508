"""Between what a model takes and returns and flat lists of tensors: dotted input names and result trees."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..runtime.errors import SourceError, UsageError


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a tensor in an argument tree: its position among the flat inputs."""

    index: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A call with its tensors taken out.

    Attributes:
        tensors: dotted input name → example tensor, in the order of the function's parameters.
        args: the positional arguments with a :class:`Slot` where a tensor was.
        kwargs: the keyword arguments, likewise.
        trees: parameter name → its tree of slots.
    """

    tensors: dict[str, torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trees: dict[str, Any]

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in their slots."""
        return _fill(self.args, tensors), _fill(self.kwargs, tensors)

    def spread(self, spec: Any) -> dict[str, Any]:
        """A structure like the arguments, as ``torch.export`` takes dynamic shapes, as input name → dimensions.

        Raises:
            UsageError: the structure does not follow the arguments.
        """
        flat: dict[str, Any] = {}
        if spec is None:
            return flat
        names = list(self.tensors)
        if isinstance(spec, Mapping):
            if unknown := [key for key in spec if key not in self.trees]:
                raise UsageError(
                    f"dynamic_shapes names {unknown[0]!r}, but the arguments are: {', '.join(self.trees) or 'none'}"
                )
            pairs = [(self.trees[key], value, str(key)) for key, value in spec.items()]
        else:
            trees = list(self.trees.items())
            if len(spec) > len(trees):
                raise UsageError(f"dynamic_shapes has {len(spec)} entries for {len(trees)} arguments")
            pairs = [(tree, value, key) for (key, tree), value in zip(trees, spec, strict=False)]
        for tree, value, where in pairs:
            _spread(tree, value, where, names, flat)
        return flat


def bind(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Call:
    """Match example arguments with a function's parameters and name every tensor in them.

    A tensor in ``f(x, {"a": (t,)})`` is called after its parameter and its path: ``x``, ``d.a.0``. NumPy arrays count
    as tensors; anything else (numbers, None, strings) is a constant of the program.

    Raises:
        UsageError: the arguments do not fit the function.
    """
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        wanted = ", ".join(signature.parameters)
        raise UsageError(f"the sample arguments do not fit the model: {error}; it takes ({wanted})") from None
    tensors: dict[str, torch.Tensor] = {}
    trees: dict[str, Any] = {}
    positional: list[Any] = []
    keyword: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            for key, item in value.items():
                trees[key] = keyword[key] = _take(item, key, tensors)
            continue
        trees[name] = tree = _take(value, name, tensors)
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional.extend(tree)
        elif kind is inspect.Parameter.KEYWORD_ONLY:
            keyword[name] = tree
        else:
            positional.append(tree)
    # A positional parameter that was skipped (its default holds) would shift those behind it: pass these by name.
    skipped = False
    shifted: list[Any] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            break
        if parameter.kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            continue
        if name not in bound.arguments:
            skipped = True
        elif skipped:
            keyword[name] = trees[name]
            shifted.append(trees[name])
    if shifted:
        positional = positional[: len(positional) - len(shifted)]
    return Call(tensors, tuple(positional), keyword, trees)


def describe(value: Any, leaf: Callable[[Any], int | None], where: str = "the output") -> Any:
    """The result tree of a model's output (see ``Program.results``).

    Args:
        value: what the model returned.
        leaf: gives the index of a tensor or symbolic size in the flat outputs, None for what is neither.
        where: for messages.

    Raises:
        SourceError: an output that is no tensor, number, string, None or container of these.
    """
    index = leaf(value)
    if index is not None:
        return {"leaf": index}
    if value is None or isinstance(value, bool | int | float | str):
        return {"constant": value}
    if isinstance(value, Mapping):  # includes the model outputs of transformers
        for key in value:
            if not isinstance(key, str):
                raise SourceError(f"{where} is a dict with the key {key!r}; only strings can name outputs")
        return {"dict": {key: describe(item, leaf, f"{where}[{key!r}]") for key, item in value.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"dict": {key: describe(item, leaf, f"{where}.{key}") for key, item in fields.items()}}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [describe(item, leaf, f"{where}[{i}]") for i, item in enumerate(value)]}
    raise SourceError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which an artifact cannot return; return "
        f"tensors, numbers, or tuples, lists, dicts and dataclasses of them (for decoders: pass use_cache=False)"
    )


def _take(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree of ``value`` with slots for its tensors, which are added to ``tensors`` under dotted names."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return Slot(len(tensors) - 1)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(getattr(value, key), f"{name}.{key}", tensors) for key in value._fields))
    if isinstance(value, tuple | list):
        return type(value)(_take(item, f"{name}.{index}", tensors) for index, item in enumerate(value))
    if type(value) is dict:
        return {key: _take(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(
            value, **{key: _take(getattr(value, key), f"{name}.{key}", tensors) for key in fields}
        )
    return value


def _fill(tree: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(tree, Slot):
        return tensors[tree.index]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_fill(item, tensors) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_fill(item, tensors) for item in tree)
    if type(tree) is dict:
        return {key: _fill(item, tensors) for key, item in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [field.name for field in dataclasses.fields(tree) if field.init]
        return dataclasses.replace(tree, **{key: _fill(getattr(tree, key), tensors) for key in fields})
    return tree


def _spread(tree: Any, spec: Any, where: str, names: Sequence[str], flat: dict[str, Any]) -> None:
    if isinstance(tree, Slot):
        flat[names[tree.index]] = spec
    elif spec is None:
        return
    elif isinstance(tree, Mapping) and isinstance(spec, Mapping) and set(spec) <= set(tree):
        for key, item in spec.items():
            _spread(tree[key], item, f"{where}.{key}", names, flat)
    elif isinstance(tree, tuple | list) and isinstance(spec, tuple | list) and len(tree) == len(spec):
        for index, (part, item) in enumerate(zip(tree, spec, strict=True)):
            _spread(part, item, f"{where}.{index}", names, flat)
    else:
        raise UsageError(f"dynamic_shapes does not have the structure of the argument {where!r}")

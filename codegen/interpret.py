"""Running a region's graph over values instead of tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ..runtime.errors import CompileError, UnsupportedOperator
from .registry import Region, find_lowering
from .values import Value

Env = dict[fx.Node, Any]


def interpret(region: Region, nodes: Iterable[fx.Node], env: Env) -> Env:
    """Extend ``env`` (node → value, or tuple of values) by the given nodes, skipping those that it already has.

    Raises:
        UnsupportedOperator: an operator has no lowering as an index function.
    """
    for node in nodes:
        if node in env or node.op in ("placeholder", "output"):
            continue
        if is_size(node):
            continue
        if node.target is operator.getitem:
            source, position = node.args
            env[node] = env[source][position]  # type: ignore[index]
            if env[node] is None:
                raise UnsupportedOperator(f"{source}: result {position} of {source.target} is only there for training")  # type: ignore[union-attr]
            continue
        lowering = find_lowering(node.target)
        if lowering is None or lowering.build is None:
            raise UnsupportedOperator(f"{node}: {node.target} has no lowering")
        args = fx.map_arg(node.args, lambda used: operand(env, used))
        kwargs = fx.map_arg(node.kwargs, lambda used: operand(env, used))
        try:
            env[node] = lowering.build(region, node, *args, **_plain(kwargs))
        except CompileError as error:
            raise type(error)(f"{node} ({node.target}): {error}") from error
    return env


def operand(env: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    """A node as an argument: a value, or a size."""
    return node.meta["val"] if is_size(node) else env[node]


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size, not a tensor."""
    return isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    ignored = ("layout", "device", "pin_memory", "memory_format", "dtype", "non_blocking")
    return {name: value for name, value in kwargs.items() if name not in ignored}


def result_values(nested: fx.GraphModule, env: Env) -> list[Value]:
    """The region's results in order."""
    (returned,) = next(node for node in nested.graph.nodes if node.op == "output").args
    nodes = returned if isinstance(returned, tuple | list) else (returned,)
    return [env[node] for node in nodes]  # type: ignore[index]

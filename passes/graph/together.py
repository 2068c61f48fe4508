"""Running a program in eager PyTorch for several sets of inputs at once, node by node.

What depends on weights only (conversions to a wider type, the values of quantized rows) is computed once for all of
them, and products with a weight take the rows of all of them: of a large model these are what a run takes time for. The
values of one weight are in memory at a time, as in a run for one set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .float_activations import in_float_arguments
from .match import aten
from .program import Program
from .quantized_ops import QUANTIZED_LINEAR
from .query import attribute, is_pure, is_random
from .regions import body, is_region

_BY_ROWS = (aten.linear.default, QUANTIZED_LINEAR)
"""Products whose first operand's rows are independent of each other."""

Kernel = Callable[[fx.Node, Sequence[Sequence[Any]], list[Any]], list[Any]]
"""Of a region: its node, the operands and the results of every set of inputs → what to go on with."""


@dataclass(frozen=True)
class _Each:
    """A value that differs between the sets of inputs; one that does not is as it is."""

    values: list[Any]


def run_together(program: Program, inputs: Sequence[Sequence[torch.Tensor]], *, in_float: bool = False,
                 kernel: Kernel | None = None) -> list[tuple[Any, ...]]:  # fmt: skip
    """The flat outputs for every set of inputs, each with fresh state.

    Args:
        program: before the passes or after them.
        inputs: one sequence of tensors per run.
        in_float: take the activations of quantized products as they come (``float_activations.py``).
        kernel: called for every kernel's region.
    """
    states = [state.initial for state in program.states]
    sets = [(*given, *(state.clone() for state in states)) for given in inputs]
    operands = [_Each(list(one)) for one in zip(*sets, strict=True)]
    with torch.no_grad():
        found = _Together(len(sets), in_float, kernel).run(program.module, operands)
    return [tuple(_of(found, number)) for number in range(len(sets))]


class _Together:
    def __init__(self, count: int, in_float: bool, kernel: Kernel | None) -> None:
        self._count = count
        self._in_float = in_float
        self._kernel = kernel

    def run(self, module: fx.GraphModule, operands: Sequence[Any]) -> Any:
        """What a graph returns: a structure of values."""
        env: dict[fx.Node, Any] = {}
        given, done = iter(operands), _last_uses(module.graph)
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = attribute(module, node.target)
            else:
                env[node] = self._call(node, env)
            for used in done[node]:
                del env[used]
        raise AssertionError("a graph returns something")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        differs = any(isinstance(env[used], _Each) for used in node.all_input_nodes)
        if is_region(node):
            operands = [env[used] if isinstance(used, fx.Node) else used for used in node.args]
            result = _Together(self._count, self._in_float, None).run(body(node), operands)
            if self._kernel is None or not is_region(node, "kernel"):
                return _joined(result, self._count)
            given = [_of(operands, number) for number in range(self._count)]
            return _Each(self._kernel(node, given, [_of(result, number) for number in range(self._count)]))
        assert callable(node.target), f"{node.name} calls {node.target}"
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.target is QUANTIZED_LINEAR and self._in_float:
            args = in_float_arguments(args)
        if not differs and is_pure(node) and not is_random(node):
            return node.target(*args, **kwargs)
        if node.target in _BY_ROWS and isinstance(args[0], _Each) and not kwargs and not _differ(args[1:]):
            return self._product(node.target, args[0].values, args[1:])
        return _Each([node.target(*_of(args, number), **_of(kwargs, number)) for number in range(self._count)])

    def _product(self, target: Callable[..., torch.Tensor], each: list[torch.Tensor], rest: Sequence[Any]) -> _Each:
        rows = [x.reshape(-1, x.shape[-1]) for x in each]
        found = target(torch.cat(rows), *rest).split([len(part) for part in rows])
        return _Each([part.reshape(*x.shape[:-1], part.shape[-1]) for part, x in zip(found, each, strict=True)])


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node → the values that nothing after it needs."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        found[node] = [used for used in node.all_input_nodes if used not in seen]
        seen.update(found[node])
    return found


def _differ(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_differ, value))
    return isinstance(value, _Each)


def _of(value: Any, number: int) -> Any:
    """A structure of values as one set of inputs has it."""
    if isinstance(value, _Each):
        return value.values[number]
    if isinstance(value, tuple | list) and _differ(value):
        return tuple(_of(part, number) for part in value)
    if isinstance(value, dict):
        return {name: _of(part, number) for name, part in value.items()}
    return value


def _joined(value: Any, count: int) -> Any:
    """One value of a structure of values: a tuple is not looked into where it is used."""
    return _Each([_of(value, number) for number in range(count)]) if _differ(value) else value

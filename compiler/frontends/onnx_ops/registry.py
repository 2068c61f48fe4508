"""The table of operators: which function interprets an ONNX operator from which opset version on.

A function is called with the node and its inputs (``None`` for an absent one) and returns a value or a tuple of them.
By default inputs come as tensors; positions named in ``host`` come as :class:`Host`, because torch needs them as Python
numbers; with ``raw`` all inputs come as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Union

import torch

from .host import Host

Value = Union[torch.Tensor, Host, list, None]  # noqa: UP007 - used at run time by type checkers only, list is recursive
Function = Callable[..., Any]


class Node(Protocol):
    """What an operator's function sees of its node."""

    name: str
    op_type: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute: number, string, list of them, tensor, or subgraph."""
        ...


@dataclass(frozen=True)
class Operator:
    """One implementation.

    Attributes:
        since: first opset version of its domain that has these semantics.
        function: see the module docstring.
        host: input positions that must be known as Python numbers.
        raw: whether inputs are passed unconverted.
        refuse: looks at a node's attributes and says what of it is unsupported, or None.
        late: torch can only make this operator's output shape from data, so all its inputs must be host values.
        scoped: the function also gets all values in scope, after the node, for the operator's subgraphs.
    """

    since: int
    function: Function
    host: frozenset[int] = frozenset()
    raw: bool = False
    refuse: Callable[[Node], str | None] | None = None
    late: bool = False
    scoped: bool = False


OPERATORS: dict[tuple[str, str], list[Operator]] = {}
HOST_FUNCTIONS: dict[str, Function] = {}


def operator(
    *names: str,
    since: int = 1,
    domain: str = "",
    host: Sequence[int] = (),
    raw: bool = False,
    refuse: Callable[[Node], str | None] | None = None,
    late: bool = False,
    scoped: bool = False,
) -> Callable[[Function], Function]:
    """Register a function for operators; a later ``since`` replaces an earlier one from that opset on."""

    def register(function: Function) -> Function:
        for name in names:
            versions = OPERATORS.setdefault((domain, name), [])
            if any(known.since == since for known in versions):
                raise ValueError(f"operator {name} is registered twice from opset {since} on")
            versions.append(Operator(since, function, frozenset(host), raw, refuse, late, scoped))
            versions.sort(key=lambda known: known.since)
        return function

    return register


def host_operator(*names: str) -> Callable[[Function], Function]:
    """Register the evaluation on Python numbers of operators of the standard domain; used when all inputs are Host."""

    def register(function: Function) -> Function:
        for name in names:
            if name in HOST_FUNCTIONS:
                raise ValueError(f"operator {name} is registered twice for host values")
            HOST_FUNCTIONS[name] = function
        return function

    return register


def lookup(domain: str, name: str, opset: int) -> Operator | None:
    """The implementation for an opset, or None."""
    found = None
    for known in OPERATORS.get((domain, name), ()):
        if known.since <= opset:
            found = known
    return found


def host_function(domain: str, name: str) -> Function | None:
    """The evaluation on Python numbers, or None."""
    return HOST_FUNCTIONS.get(name) if domain == "" else None


def as_tensor(value: Any) -> Any:
    """Host values as tensors; everything else as it is."""
    return value.tensor() if isinstance(value, Host) else value


def cast_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Another element type; nothing at all where it is the same, because an export records even an idle conversion."""
    return x if x.dtype == dtype else x.to(dtype)


def normalize_axis(axis: int, rank: int) -> int:
    """A non-negative axis.

    Raises:
        ValueError: out of range.
    """
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} is out of range for a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis


def axes_of(node: Node, value: Host | None, rank: int, name: str = "axes") -> list[int] | None:
    """Axes from an input (newer opsets) or an attribute (older ones), non-negative; None where neither is given."""
    axes = value.values if value is not None else node.get(name)
    return None if axes is None else [normalize_axis(int(axis), rank) for axis in axes]

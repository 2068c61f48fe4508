"""The program: one entry point on its way from a frontend through the passes to lowering.

The graph is the lifted, functional ATen graph of an ``ExportedProgram`` after ``run_decompositions({})``, rearranged so
that it runs by itself in eager PyTorch:

- placeholders are the tensor inputs in order, then the states (in order of ``Program.states``);
- parameters, buffers and lifted constants are ``get_attr`` nodes with flat attribute names; ``node.meta["source"]``
  is the dotted name in the original module (``"encoder.layer.0.weight"``), the identity by which entry points share
  weights and by which the artifact names them;
- the output node returns one flat tuple: the results (tensors, SymInts or constants), then one new value per state.

Every node with a value has ``meta["val"]`` (a FakeTensor or SymInt, all of one ShapeEnv).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx


@dataclass(frozen=True)
class SymbolRange:
    """A dimension that varies: the name users see, and inclusive finite bounds."""

    name: str
    minimum: int
    maximum: int


@dataclass(frozen=True)
class Input:
    """A tensor input: the name users see and its placeholder; the shape is the placeholder's ``meta["val"]``."""

    name: str
    placeholder: str


@dataclass(frozen=True)
class State:
    """Memory that a session keeps between calls: (placeholder, index into the output tuple) and its first value.

    ``name`` is the dotted buffer name, by which entry points share it.
    """

    name: str
    placeholder: str
    output: int
    initial: torch.Tensor


@dataclass
class Program:
    """One entry point. Passes change ``module`` in place; everything else stays as the frontend made it.

    Attributes:
        name: entry point's name, ``"main"`` unless declared.
        module: the graph (see the module docstring).
        inputs: the tensor inputs, in the order of their placeholders.
        states: what persists between calls.
        results: structure of the outputs as JSON-able tree: ``{"leaf": i}`` (index into the output tuple),
            ``{"tuple": [...]}``, ``{"list": [...]}``, ``{"dict": {key: ...}}`` or ``{"constant": value}``.
        symbols: sympy symbol in the graph's shapes → its range.
        guards: sympy relations over the symbols that the exporter assumed; lowering makes them run-time checks.
        sample: example tensors, one per input, for verification.
        make: inputs to verify with at other sizes, by name; None if elements may be drawn from the sample's.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[Input, ...]
    states: tuple[State, ...] = ()
    results: Any = None
    symbols: dict[sympy.Symbol, SymbolRange] = field(default_factory=dict)
    guards: tuple[sympy.Basic, ...] = ()
    sample: tuple[torch.Tensor, ...] = ()
    make: Callable[[Mapping[str, int]], Mapping[str, torch.Tensor]] | None = None

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``module``."""
        return self.module.graph

    def run(self, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """Run in eager PyTorch with fresh state; returns the flat output tuple."""
        with torch.no_grad():
            return self.module(*inputs, *(state.initial.clone() for state in self.states))

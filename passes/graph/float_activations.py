"""Quantized products with activations as they come, where programs round them: what passes are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .program import Program
from .quantized_ops import QUANTIZED_LINEAR
from .query import arguments, calls
from .regions import body, is_region


class InFloat(fx.Interpreter):
    """Runs a program with the activations of quantized products as they come, where they would be rounded.

    Rounding makes steps of what is otherwise smooth: a last digit decides one, and that decides others. What the
    passes make of a model is compared without them, at the tolerances of everything else; that products round, and how,
    is part of the operator.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product of floating-point activations for a quantized one."""
        if target is QUANTIZED_LINEAR:
            assert not kwargs, "quantized products are made with positional arguments"
            args = (*args[:-1], -1)
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A region, likewise."""
        return InFloat(self.fetch_attr(target)).run(*args)

    @classmethod
    def of(cls, program: Program, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """The flat outputs of a program with fresh state."""
        with torch.no_grad():
            return cls(program.module).run(*inputs, *(state.initial.clone() for state in program.states))


def rounds_activations(program: Program) -> bool:
    """Whether a program has products whose activations are rounded on the fly."""
    graphs = [program.graph, *(body(node).graph for node in program.graph.nodes if is_region(node, "kernel"))]
    products = [node for graph in graphs for node in calls(graph, (QUANTIZED_LINEAR,))]
    return any(arguments(node)["activations"] >= 0 for node in products)

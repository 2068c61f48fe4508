"""Quantized products with activations as they come, where programs round them: what passes are compared by.

Rounding makes steps of what is otherwise smooth: a last digit decides one, and that decides others. What the passes
make of a model is compared without them, at the tolerances of everything else; that products round, and how, is part of
the operator. ``together.py`` runs programs so.
"""

from __future__ import annotations

from typing import Any

from .program import Program
from .quantized_ops import QUANTIZED_LINEAR
from .query import arguments, calls
from .regions import body, is_region


def in_float_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a quantized product, all positional, that make it take activations as they come."""
    return (*args[:-1], -1)


def rounds_activations(program: Program) -> bool:
    """Whether a program has products whose activations are rounded on the fly."""
    graphs = [program.graph, *(body(node).graph for node in program.graph.nodes if is_region(node, "kernel"))]
    products = [node for graph in graphs for node in calls(graph, (QUANTIZED_LINEAR,))]
    return any(arguments(node)["activations"] >= 0 for node in products)

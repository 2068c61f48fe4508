"""Copies of programs, which share the weights."""

from __future__ import annotations

from torch import fx

from ..passes.graph.program import Program
from ..passes.graph.query import is_pure, is_random
from ..passes.graph.regions import is_region


def reference_of(program: Program) -> Program:
    """A program with its own copy of the graph (weights shared): what later passes do does not touch it."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(program.graph, copied)
    graph.output(returned)
    for old, new in copied.items():
        new.meta = dict(old.meta)
        new.name = old.name
    module = fx.GraphModule(program.module, graph)
    return Program(
        program.name,
        module,
        program.inputs,
        program.states,
        program.results,
        program.symbols,
        program.guards,
        program.sample,
        program.make,
    )


def late_constants(program: Program) -> Program:
    """A copy of a program in which everything that depends on weights only stands right before its first use.

    Passes put such arithmetic (conversions to a wider type, joined weights) where the weights are, before everything
    else. Run from there in eager PyTorch, what it gives for all layers would be in memory at once.
    """
    late = reference_of(program)
    constant: set[fx.Node] = set()
    for node in late.graph.nodes:
        known = bool(node.all_input_nodes) and all(operand in constant for operand in node.all_input_nodes)
        known &= node.op != "output" and not is_region(node, "kernel") and is_pure(node) and not is_random(node)
        if node.op == "get_attr" or known:
            constant.add(node)
    for node in reversed(list(late.graph.nodes)):
        if node in constant and node.users:
            first = min(node.users)
            if node.next is not first:
                first.prepend(node)
    late.module.recompile()
    return late

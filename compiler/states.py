"""State that entry points share: what one of them changes is state in all of them.

An entry point that only reads a buffer has it as a constant. Where another entry point updates that buffer, it becomes
a state here too, whose new value is its old one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..passes.graph.program import Program, State
from .importer import flat_identifier


def share_states(programs: Sequence[Program]) -> None:
    """Turn constants that are states of other programs into states, in place."""
    known = {state.name: state for program in programs for state in program.states}
    for program in programs:
        for node in program.graph.find_nodes(op="get_attr"):
            state = known.get(str(node.meta.get("source")))
            if state is not None:
                _become_state(program, node, state)


def _become_state(program: Program, constant: fx.Node, state: State) -> None:
    graph = program.graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(flat_identifier(state.name))
    node.meta = dict(constant.meta)
    constant.replace_all_uses_with(node)
    graph.erase_node(constant)
    end = graph.output_node()
    (returned,) = end.args
    assert isinstance(returned, tuple), "a program returns one flat tuple"
    end.args = ((*returned, node),)
    program.states = (*program.states, State(state.name, node.name, len(returned), state.initial))
    program.module.recompile()

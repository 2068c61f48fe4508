"""States that a kernel updates in place: proof that nobody misses what was there before.

An operator such as ``cache_append`` gives a new cache that differs from the old one in a few places. Its kernel writes
only those, into the state's own memory, which is right where the old value has no reader after it. Steps run in the
order of the graph, so the readers are known.
"""

from __future__ import annotations

from torch import fx

from ..passes.graph.program import Program, State
from ..passes.graph.regions import body
from ..runtime.errors import CompileError
from .interpret import is_size
from .provenance import origin_of


def refuse_later_readers(program: Program, region: fx.Node, state: State) -> None:
    """Check that a region may overwrite the value that it updates.

    Args:
        program: of regions.
        region: one with ``updates``, whose operand there lies in the state's memory.
        state: of the program.

    Raises:
        CompileError: names who reads the old value at the same time or later, and what to do.
    """
    updates = region.meta["region"].updates
    old = region.args[updates]
    assert isinstance(old, fx.Node)
    placeholder = body(region).graph.find_nodes(op="placeholder")[updates]
    if len(placeholder.users) > 1:
        other = list(placeholder.users)[1]
        raise _refusal(region, state, f"its own kernel also reads it for {other}")
    later = False
    for node in program.graph.nodes:
        if later and node in old.users and not is_size(node):
            raise _refusal(region, state, _reader(program, node, old))
        later = later or node is region


def _reader(program: Program, node: fx.Node, old: fx.Node) -> str:
    if node.op != "output":
        source = origin_of(node).source
        return f"{node}{f' ({source})' if source else ''} reads it afterwards"
    (returned,) = node.args
    updated = {item.output: item.name for item in program.states}
    position = list(returned).index(old)  # type: ignore[arg-type]
    if position in updated:
        return f"it is the new value of the state {updated[position]!r}"
    return "it is given out as a result"


def _refusal(region: fx.Node, state: State, why: str) -> CompileError:
    source = origin_of(region).source
    return CompileError(
        f"{source or region}: {region} updates the state {state.name!r} in place, but the value before is still "
        f"needed: {why}. Use the new value there, or compute what needs the old one before"
    )

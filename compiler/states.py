"""States: memory that a session keeps between calls, of three origins.

A buffer that a module changes is a state (the importer finds those). An input that its entry point declares to be one
becomes a state (:func:`declare_states`), and may then have sizes that no input has: they are chosen when its memory is
made. And what one entry point changes is state in all of them (:func:`share_states`): one that only reads a buffer has
it as a constant; where another updates it, it becomes a state there too, whose new value is its old one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..passes.graph.program import Program, State
from ..runtime.errors import UsageError
from .importer import flat_identifier


def declare_states(program: Program, names: Sequence[str]) -> None:
    """Turn inputs into states, in place; :class:`~tilewright.compiler.options.Entry` says how new values are found.

    Raises:
        UsageError: a name that is no input, or new values that are missing or of another type.
    """
    if not names:
        return
    samples = dict(zip((given.name for given in program.inputs), program.sample, strict=True))
    if unknown := [name for name in names if name not in samples]:
        raise UsageError(
            f"entry point {program.name!r} declares the state {unknown[0]!r}; its inputs are {', '.join(samples)}"
        )
    if len(set(names)) < len(names):
        raise UsageError(f"entry point {program.name!r} declares a state twice: {', '.join(names)}")
    end = program.graph.output_node()
    (returned,) = end.args
    assert isinstance(returned, tuple), "a program returns one flat tuple"
    leaves = dict(_leaves(program.results))
    updates = _updates(program, names, leaves)
    kept = list(dict.fromkeys(index for path, index in leaves.items() if path not in updates.values()))
    outputs = [returned[index] for index in kept]
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    states = []
    for state in program.states:
        states.append(State(state.name, state.placeholder, len(outputs), state.initial))
        outputs.append(returned[state.output])
    for name in names:
        placeholder = next(given.placeholder for given in program.inputs if given.name == name)
        value = returned[leaves[updates[name]]]
        _check_update(program, name, nodes[placeholder], value)
        program.graph.find_nodes(op="placeholder")[-1].append(nodes[placeholder])  # states come behind all inputs
        states.append(
            State(name, placeholder, len(outputs), _initial(program, name, nodes[placeholder], samples[name]))
        )
        outputs.append(value)
    program.results = _without(program.results, updates.values(), {index: i for i, index in enumerate(kept)})
    program.inputs = tuple(given for given in program.inputs if given.name not in names)
    program.sample = tuple(samples[given.name] for given in program.inputs)
    program.states = tuple(states)
    end.args = (tuple(outputs),)
    program.graph.lint()
    program.module.recompile()


def share_states(programs: Sequence[Program]) -> None:
    """Turn constants that are states of other programs into states, in place.

    Raises:
        UsageError: two entry points declare one state with different types or sizes.
    """
    known: dict[str, State] = {}
    types: dict[str, tuple[str, str]] = {}
    for program in programs:
        for state in program.states:
            known.setdefault(state.name, state)
            text = _describe(program, state)
            other, before = types.setdefault(state.name, (program.name, text))
            if text != before:
                raise UsageError(
                    f"the state {state.name!r} is {before} in entry point {other!r}, but {text} in {program.name!r}; "
                    f"entry points share states by name, so they must agree"
                )
    for program in programs:
        for node in program.graph.find_nodes(op="get_attr"):
            shared = known.get(str(node.meta.get("source")))
            if shared is not None:
                _become_state(program, node, shared)


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


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """(dotted path, index of the flat output) of every tensor or size in a result tree, in order."""
    ((kind, content),) = tree.items()
    if kind == "leaf":
        yield path, content
    elif kind != "constant":
        for key, part in content.items() if kind == "dict" else enumerate(content):
            yield from _leaves(part, f"{path}.{key}" if path else str(key))


def _updates(program: Program, names: Sequence[str], leaves: Mapping[str, int]) -> dict[str, str]:
    """State → path of the result that is its new value."""
    named = [name for name in names if name in leaves]
    if len(named) == len(names):
        return {name: name for name in names}
    if named:
        missing = next(name for name in names if name not in leaves)
        raise UsageError(
            f"entry point {program.name!r} returns a new value for the state {named[0]!r} by name, but none for "
            f"{missing!r}; its results are {', '.join(leaves)}"
        )
    if len(leaves) < len(names):
        raise UsageError(
            f"entry point {program.name!r} declares {len(names)} states, but has {len(leaves)} results; return the new "
            f"values last, in the order of the states, or by name in a dictionary"
        )
    return dict(zip(names, list(leaves)[-len(names) :], strict=True))


def _check_update(program: Program, name: str, old: fx.Node, new: Any) -> None:
    before = old.meta["val"]
    after = new.meta["val"] if isinstance(new, fx.Node) else new
    if isinstance(after, torch.Tensor) and (after.dtype, _extents(after)) == (before.dtype, _extents(before)):
        return
    raise UsageError(
        f"the new value of the state {name!r} of entry point {program.name!r} is {_type(after)}, but the state is "
        f"{_type(before)}; new values are the results of the states' names, or the last ones in the order of the states"
    )


def _initial(program: Program, name: str, node: fx.Node, sample: torch.Tensor) -> torch.Tensor:
    """What a state starts as: its sample."""
    if any(isinstance(extent, torch.SymInt) for extent in node.meta["val"].shape) and bool(sample.any()):
        raise UsageError(
            f"the state {name!r} of entry point {program.name!r} has a size that varies, so it starts as zeros; give "
            f"zeros as its example"
        )
    return sample


def _without(tree: Any, dropped: Collection[str], numbers: Mapping[int, int], path: str = "") -> Any:
    """A result tree without some leaves and what they leave empty; of a tuple with one part left, that part."""
    ((kind, content),) = tree.items()
    if kind == "leaf":
        return {"leaf": numbers[content]}
    if kind == "constant":
        return tree
    parts = {}
    for key, part in content.items() if kind == "dict" else enumerate(content):
        at = f"{path}.{key}" if path else str(key)
        gone = [leaf in dropped for leaf, _ in _leaves(part, at)]
        if not gone or not all(gone):
            parts[key] = _without(part, dropped, numbers, at)
    if kind == "dict":
        return {"dict": parts}
    return next(iter(parts.values())) if len(parts) == 1 < len(content) else {kind: list(parts.values())}


def _extents(tensor: torch.Tensor) -> tuple[str, ...]:
    """Sizes as text: comparing symbolic ones would make assumptions about them."""
    return tuple(str(extent) for extent in tensor.shape)


def _type(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "no tensor"
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(_extents(value))}]"


def _describe(program: Program, state: State) -> str:
    """A state's type with the ranges and the sample's values of its sizes."""
    node = next(node for node in program.graph.find_nodes(op="placeholder") if node.name == state.placeholder)
    text, shape = _type(node.meta["val"]), node.meta["val"].shape
    used = {symbol for extent in shape if isinstance(extent, torch.SymInt) for symbol in extent.node.expr.free_symbols}
    ranges = [entry for symbol, entry in program.symbols.items() if symbol in used]
    limits = ", ".join(f"{entry.name} in {entry.minimum}..{entry.maximum}" for entry in ranges)
    return f"{text} ({limits}; {list(state.initial.shape)} in the sample)" if ranges else text

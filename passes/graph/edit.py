"""Inserting, replacing and naming nodes so that every value keeps its shape.

All passes build nodes through :func:`insert`, which runs the operator on the operands' fake values: a node has its
``meta["val"]`` from the moment it exists. Provenance is inherited from the nodes that a rewrite replaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

ORIGIN_KEYS = ("stack_trace", "nn_module_stack", "onnx_node")


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The one fake mode that all values of the graph belong to; a fresh one for a graph without tensors."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def faking(graph: fx.Graph) -> Iterator[None]:
    """Within it operators run on the graph's fake values, as the exporter runs them.

    The Python dispatcher is what keeps sizes symbolic in operators that PyTorch composes in C++ (``constant_pad_nd``).
    """
    with fake_mode(graph), enable_python_dispatcher():
        yield


def value_of(argument: Any) -> Any:
    """The fake value of a node; lists and tuples are mapped, anything else stands for itself."""
    return fx.map_arg(argument, lambda node: node.meta["val"])


def insert(
    graph: fx.Graph,
    before: fx.Node,
    target: Any,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    origins: Iterable[fx.Node] = (),
    name: str | None = None,
) -> fx.Node:
    """Insert ``target(*args, **kwargs)`` before a node, with its fake value and the provenance of ``origins``."""
    kwargs = kwargs or {}
    with faking(graph):
        value = target(*value_of(tuple(args)), **value_of(kwargs))
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, tuple(args), kwargs, name=name)
    node.meta["val"] = value
    inherit(node, origins)
    return node


def insert_constant(
    module: fx.GraphModule, before: fx.Node, name: str, tensor: torch.Tensor, origins: Iterable[fx.Node] = ()
) -> fx.Node:
    """Insert a ``get_attr`` of a new constant; ``name`` is made unique and is also its source name."""
    attribute = unique_attribute(module, name)
    module.register_buffer(attribute, tensor)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(attribute)
    node.meta["val"] = fake_mode(module.graph).from_tensor(tensor, static_shapes=True)
    node.meta["source"] = attribute
    inherit(node, origins)
    return node


def unique_attribute(module: fx.GraphModule, name: str) -> str:
    """``name`` with dots flattened, numbered when the module has it already."""
    base = candidate = name.replace(".", "_")
    count = 1
    while hasattr(module, candidate):
        candidate = f"{base}_{count}"
        count += 1
    return candidate


def inherit(node: fx.Node, origins: Iterable[fx.Node]) -> None:
    """Give a node the provenance of the nodes it stands for: theirs joined, the last one's stack."""
    names: list[str] = []
    for origin in origins:
        names.extend(origin.meta.get("from", [origin.name]))
        for key in ORIGIN_KEYS:
            if key in origin.meta:
                node.meta[key] = origin.meta[key]
    node.meta["from"] = list(dict.fromkeys(names)) or [node.name]


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of ``old`` use ``new`` and erase ``old`` (the new node must not depend on a user of the old)."""
    old.replace_all_uses_with(new)
    if not old.users:
        old.graph.erase_node(old)


def tensor_shape(node: fx.Node) -> tuple[Any, ...]:
    """The logical shape of a node's value: ints and SymInts."""
    return tuple(node.meta["val"].shape)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are provably equal."""
    return len(a) == len(b) and all(map(same_size, a, b))

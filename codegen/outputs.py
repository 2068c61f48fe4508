"""The outputs of an entry point: whose memory they are, what they are called, how results nest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .interpret import is_size
from .storage import Storage
from .symbols import SymbolTable
from .values import dtype_name


class Outputs:
    """Memory for every tensor result; a node given twice has two, the first of which it may write itself.

    Args:
        leaves: the results one by one.
        symbols: of the program.

    Attributes:
        storages: in order; their kind is ``"copied"`` until something writes them.
    """

    def __init__(self, leaves: Sequence[Any], symbols: SymbolTable) -> None:
        self.storages: list[Storage] = []
        self._first: dict[fx.Node, Storage] = {}
        for leaf in leaves:
            if is_tensor(leaf):
                shape, dtype = symbols.shape(leaf.meta["val"]), dtype_name(leaf.meta["val"].dtype)
                storage = Storage("copied", shape, dtype, name=leaf.name, index=len(self.storages))
                self.storages.append(storage)
                self._first.setdefault(leaf, storage)

    def written_by(self, node: fx.Node | None) -> Storage | None:
        """The output that a node may write itself."""
        return None if node is None else self._first.get(node)

    def unwritten(self, leaf: Any) -> list[Storage]:
        """The outputs of a result that nothing has written: they need copies of it."""
        if not is_tensor(leaf):
            return []
        return [storage for storage in self.storages if storage.kind == "copied" and storage.name == leaf.name]


def is_tensor(leaf: Any) -> bool:
    """Whether a result is a tensor: neither a constant nor a size."""
    return isinstance(leaf, fx.Node) and not is_size(leaf)


def result_tree(tree: Any, leaves: Sequence[Any], symbols: SymbolTable) -> Any:
    """How results nest, as the plan has it: every leaf is the number of an output, a size or a constant."""
    numbers: dict[int, Any] = {}
    tensors = 0
    for position, leaf in enumerate(leaves):
        if is_tensor(leaf):
            numbers[position] = {"output": tensors}
            tensors += 1
        elif isinstance(leaf, fx.Node):
            numbers[position] = {"size": symbols.public(symbols.size(leaf.meta["val"]))}
        else:
            numbers[position] = {"constant": leaf}

    def build(node: Any) -> Any:
        ((kind, value),) = node.items()
        if kind == "leaf":
            return numbers[value]
        if kind == "dict":
            return {"dict": {key: build(item) for key, item in value.items()}}
        if kind in ("tuple", "list"):
            return {kind: [build(item) for item in value]}
        return node

    return build(tree)


def output_names(tree: Any, leaves: Sequence[Any]) -> list[str]:
    """A name per tensor result: its key in a dictionary, else ``output`` with its position."""
    names: dict[int, str] = {}

    def visit(node: Any, path: str) -> None:
        ((kind, value),) = node.items()
        if kind == "leaf":
            names[value] = path or "output"
        elif kind == "dict":
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else str(key))
        elif kind in ("tuple", "list"):
            for position, item in enumerate(value):
                visit(item, f"{path}.{position}" if path else f"output{position}")

    visit(tree, "")
    return [names.get(position, f"output{position}") for position, leaf in enumerate(leaves) if is_tensor(leaf)]

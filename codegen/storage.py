"""Where values live: the buffers that kernels read and write, and constants as recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from ..passes.graph.program import Program
from ..passes.graph.query import SMALL, attribute
from ..passes.graph.regions import body, is_region
from ..passes.graph.scale_search import CannotQuantize
from ..runtime.errors import CompileError
from ..runtime.sizes import Size
from .values import dtype_name


@dataclass(frozen=True)
class Recipe:
    """How to compute a constant when the artifact is written: source tensors and a function without side effects."""

    identity: tuple[object, ...]
    sources: tuple[str, ...]
    label: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """A layout for a constant: its name (part of the key), the packed shape, and the function that makes it.

    The constant is converted to ``dtype`` first. Packing only moves elements and fills up with zeros: it is given
    bfloat16 as its bits in uint16. ``layout`` is how index functions find an element of the constant in it
    (``Kernel.offset``); empty where they cannot.
    """

    name: str
    shape: tuple[int, ...]
    pack: Callable[[np.ndarray], np.ndarray]
    dtype: str = "float32"
    layout: str = ""


@dataclass(eq=False)
class Storage:
    """One buffer of a plan. Identity matters: two storages are two places in memory.

    ``kind`` and ``index`` are those of the plan's ``Ref``; the index of a ``"buffer"`` is given when memory is planned.
    A constant may be stored ``packed``, in a way that the layout names; its shape is the one before.
    """

    kind: str
    shape: tuple[Size, ...]
    dtype: str
    layout: str = "rows"
    name: str = ""
    index: int = -1
    recipe: Recipe | None = None
    packed: Packing | None = None
    value: float | int | bool | None = None  # of a constant with one element, so that kernels can write it down


@dataclass(frozen=True)
class PackedConstant:
    """A constant of the artifact: key, recipe and packing."""

    key: str
    recipe: Recipe
    packing: Packing | None
    dtype: str
    shape: tuple[int, ...]

    def load(self) -> np.ndarray:
        """Compute and pack it."""
        tensor = self.recipe.load()
        if self.packing is None:
            return to_numpy(tensor).reshape(self.shape)
        return self.packing.pack(to_numpy(tensor.to(getattr(torch, self.dtype)))).reshape(self.shape)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements as a C-contiguous array; bfloat16 as its bits in uint16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


@dataclass
class ConstantTable:
    """All constants of an artifact, shared by its entry points: equal recipe and packing, one copy."""

    constants: list[PackedConstant] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)
    _keys: set[str] = field(default_factory=set)

    def request(self, recipe: Recipe, packing: Packing | None = None) -> int:
        """Index of the constant in this packing, added on first use."""
        identity = (recipe.identity, (packing.name, packing.shape, packing.dtype) if packing else ())
        if identity not in self._known:
            base = recipe.label + (f".{packing.name}" if packing else "")
            key, count = base, 1
            while key in self._keys:
                key = f"{base}.{count}"
                count += 1
            self._keys.add(key)
            dtype = packing.dtype if packing else recipe.dtype
            shape = packing.shape if packing else recipe.shape
            self._known[identity] = len(self.constants)
            self.constants.append(PackedConstant(key, recipe, packing, dtype, shape))
        return self._known[identity]


def recipe_of(program: Program, node: fx.Node) -> Recipe:
    """The recipe of a constant: a ``get_attr`` node or a region of kind ``"constant"`` over such."""
    if node.op == "get_attr":
        tensor = attribute(program.module, node.target)
        source = str(node.meta.get("source", node.target))
        return Recipe(
            _identity(tensor, source, source == node.target), (source,), source, dtype_name(tensor.dtype),
            tuple(tensor.shape), lambda: tensor,
        )  # fmt: skip
    assert is_region(node, "constant"), node
    operands = [recipe_of(program, operand) for operand in node.all_input_nodes]
    module = body(node)
    value = node.meta["val"]
    sources = tuple(dict.fromkeys(source for operand in operands for source in operand.sources))
    text = _meaning(module.graph)
    label = "+".join(sources[:4]) if sources else str(node.target)
    own = tuple(
        _identity(attribute(module, inner.target), str(inner.target), True)
        for inner in module.graph.nodes
        if inner.op == "get_attr"
    )
    identity = (text, tuple(operand.identity for operand in operands), own)

    def load() -> torch.Tensor:
        try:
            with torch.no_grad():
                return module(*(operand.load() for operand in operands))
        except CannotQuantize as error:
            raise CompileError(
                f"the weight {', '.join(sources)} cannot be quantized as asked: {error}; mend it, ask for int8 instead "
                f'of 4 bits, or leave it as it is with a recipe file that begins with {{"{sources[0]}": "none", ...}}'
            ) from error

    return Recipe(identity, sources, label, dtype_name(value.dtype), tuple(int(extent) for extent in value.shape), load)


def _identity(tensor: torch.Tensor, name: str, made: bool) -> tuple[object, ...]:
    """What tells a tensor from others: its memory, or the content of a small one that a pass has ``made``.

    Every entry point and every kind of device has its own copies of those.
    """
    place: object = tensor.data_ptr() if tensor.numel() else name
    if made and tensor.numel() * tensor.element_size() <= SMALL:
        place = to_numpy(tensor).tobytes()
    return place, tuple(tensor.shape), tensor.stride(), tensor.dtype


def _meaning(graph: fx.Graph) -> str:
    """What a graph computes, in words that do not depend on the names of its nodes."""
    numbers: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
        target = "" if node.op in ("placeholder", "get_attr", "output") else node.target
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{node.op} {target} {args} {kwargs}")
    return "\n".join(lines)


def is_constant(node: fx.Node) -> bool:
    """Whether a node's value is known when compiling."""
    return node.op == "get_attr" or is_region(node, "constant")


def unique(items: Sequence[Storage]) -> list[Storage]:
    """Storages in order, each once."""
    return list({id(item): item for item in items}.values())

"""What attention kernels of all dialects need to know: operands by head, how many of each, where results go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from ..runtime import sizes
from ..runtime.errors import CompileError
from ..runtime.sizes import Size
from .anchors import Anchored
from .expr import Expr
from .registry import overloads
from .values import Kernel, Value, broadcast

TARGETS = frozenset((torch.ops.aten.scaled_dot_product_attention.default,))
_PERMUTES = frozenset(overloads("permute", "transpose.int"))
_RESHAPES = frozenset(
    overloads("view", "reshape", "_unsafe_view", "clone", "contiguous", "flatten.using_ints", "alias")
)


@dataclass(frozen=True)
class Heads:
    """``softmax(scale * q k^T + mask) v`` over batch entries and heads.

    Attributes:
        work: the region around the anchor.
        lead: shape of the result without its last two axes; the last of these is the head, the rest the batch entry.
        batch, heads, group: entries, query heads, and query heads that share a key head.
        queries, keys, d, dv: lengths; ``d`` of a query and a key, ``dv`` of a value.
        scale: of the scores, before the mask.
        causal: key j counts for query i if j <= i, also where their numbers differ.
        query, key, value: operands broadcast to ``lead`` (with key heads instead of heads for the last two).
        mask: broadcast to ``(*lead, queries, keys)``, or ``None``.
    """

    work: Anchored
    lead: tuple[Size, ...]
    batch: Size
    heads: Size
    group: Size
    queries: Size
    keys: Size
    d: int
    dv: int
    scale: float
    causal: bool
    query: Value
    key: Value
    value: Value
    mask: Value | None

    @property
    def key_heads(self) -> Size:
        """Heads of keys and values."""
        return sizes.floordiv(self.heads, self.group)

    @cached_property
    def outer(self) -> tuple[Size, ...]:
        """The index of the leading axes in terms of the variables ``b`` and ``h``, which must be declared."""
        return _lead_index(self.work.kernel, self.lead)

    @cached_property
    def key_outer(self) -> tuple[Size, ...]:
        """The same for keys and values, in terms of ``b`` and ``hk``."""
        return (*self.outer[:-1], 0 if self.key_heads == 1 else "hk") if self.lead else ()

    def masked(self, row: Size, column: Size) -> Expr:
        """The scalar ``score`` with the mask: added, or minus infinity where a boolean mask is false."""
        assert self.mask is not None
        builder = self.work.kernel.builder
        score = builder.scalar("score", "float32")
        element = self.mask.at((*self.outer, row, column))
        if self.mask.dtype == "bool":
            return builder.call("where", "float32", element, score, builder.const(-math.inf, "float32"))
        return builder.call("add", "float32", score, builder.cast(element, "float32"))

    def result_offset(self, column: Size) -> tuple[str, Size]:
        """The parameter of the result and the offset of query ``i``'s element, where the views after the anchor put it.

        Raises:
            CompileError: something other than a permutation and reshapes follows the anchor.
        """
        return result_offset(self.work, (*self.outer, 0 if self.queries == 1 else "i", column))


def heads_of(work: Anchored) -> Heads:
    """Read an attention operator's arguments.

    Raises:
        CompileError: attention that no kernel computes, with the reason.
    """
    anchor = work.anchor
    query, key, value, *rest = anchor.args
    arguments = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | dict(anchor.kwargs)
    if arguments.get("dropout_p", 0.0):
        raise CompileError(f"{anchor}: attention with dropout is for training; call module.eval() before compiling")
    q, k, v = (work.operand(operand) for operand in (query, key, value))
    assert q is not None and k is not None and v is not None
    if "float64" in (q.dtype, k.dtype, v.dtype):
        raise CompileError(f"{anchor}: attention computes in float32; convert queries, keys and values to it")
    lead = work.shape()[:-2]
    heads = lead[-1] if lead else 1
    own_heads = k.shape[-3] if len(k.shape) > 2 else 1
    group = sizes.floordiv(heads, own_heads) if arguments.get("enable_gqa") and own_heads != heads else 1
    queries, d, keys, dv = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    if not (isinstance(d, int) and isinstance(dv, int)):
        raise CompileError(f"{anchor}: the head dimension must be a fixed number")
    scale = arguments.get("scale")
    scale = 1 / math.sqrt(d) if scale is None else scale
    if not isinstance(scale, int | float):
        raise CompileError(f"{anchor}: the scale must be a fixed number; multiply the queries where it varies")
    key_lead = (*lead[:-1], sizes.floordiv(heads, group)) if lead else ()
    mask = work.operand(arguments.get("attn_mask"))
    return Heads(
        work=work,
        lead=lead,
        batch=sizes.product(lead[:-1]),
        heads=heads,
        group=group,
        queries=queries,
        keys=keys,
        d=d,
        dv=dv,
        scale=scale,
        causal=bool(arguments.get("is_causal", False)),
        query=broadcast(q, (*lead, queries, d)),
        key=broadcast(k, (*key_lead, keys, d)),
        value=broadcast(v, (*key_lead, keys, dv)),
        mask=None if mask is None else broadcast(mask, (*lead, queries, keys)),
    )


def result_offset(work: Anchored, index: tuple[Size, ...]) -> tuple[str, Size]:
    """The parameter of the result and the offset of an element of the anchor, where the views after it put it.

    Raises:
        CompileError: something other than a permutation and reshapes follows the anchor.
    """
    results = work.frame.results()
    (returned,) = next(node for node in work.task.nested.graph.nodes if node.op == "output").args
    if len(results) != 1 or not isinstance(returned, fx.Node):
        raise CompileError(f"{work.anchor}: an attention region has one result")
    return results[0].name, _offset(work.shape(), memory_order(work.anchor, returned), index)


def memory_order(anchor: fx.Node, returned: fx.Node) -> list[int]:
    """The order in which the anchor's axes lie in the stored result: permutations first, then only reshapes.

    Raises:
        CompileError: anything else.
    """
    chain: list[fx.Node] = []
    node = returned
    while node is not anchor:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    order = list(range(anchor.meta["val"].dim()))
    reshaped = False
    for node in reversed(chain):
        if node.target in _PERMUTES:
            if reshaped:
                raise CompileError(f"{node}: a permutation after a reshape cannot end an attention region")
            if node.target in overloads("transpose.int"):
                first, second = (int(axis) % len(order) for axis in node.args[1:3])  # type: ignore[arg-type, call-overload]
                order[first], order[second] = order[second], order[first]
            else:
                order = [order[int(axis) % len(order)] for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
        elif node.target in _RESHAPES:
            reshaped = reshaped or node.target not in overloads("clone", "contiguous", "alias")
        else:
            raise CompileError(f"{node}: {node.target} cannot end an attention region")
    return order


def _lead_index(kernel: Kernel, lead: tuple[Size, ...]) -> tuple[Size, ...]:
    """The index of the leading axes: the last one is the head, all before it make up the batch entry."""
    index: list[Size] = []
    flat: Size = "b"
    for extent in reversed(lead[1:-1]):
        flat, inner = kernel.split(flat, extent)
        index.append(inner)
    if len(lead) > 1:
        index.append(0 if lead[0] == 1 else flat)
    index.reverse()
    if lead:
        index.append(0 if lead[-1] == 1 else "h")
    return tuple(index)


def _offset(shape: tuple[Size, ...], order: Sequence[int], index: tuple[Size, ...]) -> Size:
    """Offset of a logical index when the axes lie in memory in this order."""
    offset: Size = 0
    stride: Size = 1
    for axis in reversed(order):
        offset = sizes.add(offset, sizes.mul(index[axis], stride))
        stride = sizes.mul(stride, shape[axis])
    return offset

"""The attention family: scaled dot-product attention through ``attention.c.jinja``.

Queries, keys and values are read in place through their views (a head of a fused projection is a run of contiguous
elements), or gathered where a view takes a row apart; the mask is computed in the kernel. The result may be stored
permuted, which is how the heads are merged again without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..anchors import affine_rows, find_anchor
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..registry import overloads
from ..templating import Hole
from ..values import Kernel, Value, broadcast
from .anchors import Anchored, c_size
from .attention_blocks import attention_units, block_rows
from .dialect import literal
from .dialect import size as c_text

TARGETS = frozenset((torch.ops.aten.scaled_dot_product_attention.default,))
_PERMUTES = frozenset(overloads("permute", "transpose.int"))
_RESHAPES = frozenset(
    overloads("view", "reshape", "_unsafe_view", "clone", "contiguous", "flatten.using_ints", "alias")
)


def attention_family(task: Task) -> Sequence[Made]:
    """``softmax(scale * q k^T + mask) v``, then perhaps a permutation."""
    anchor = find_anchor(task, TARGETS)
    frame = Frame(task)
    return [Made(_build(task, anchor, frame), frame.storages)]


def _build(task: Task, anchor: fx.Node, frame: Frame) -> KernelCode:
    work = Anchored(task, anchor, frame)
    kernel = work.kernel
    query, key, value, *rest = anchor.args
    arguments = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | dict(anchor.kwargs)
    if arguments.get("dropout_p", 0.0):
        raise CompileError(f"{anchor}: attention with dropout is for training; call module.eval() before compiling")
    q, k, v = (work.operand(operand) for operand in (query, key, value))
    assert q is not None and k is not None and v is not None
    lead = work.shape()[:-2]
    batch, heads = sizes.product(lead[:-1]), (lead[-1] if lead else 1)
    own_heads = k.shape[-3] if len(k.shape) > 2 else 1
    group = sizes.floordiv(heads, own_heads) if arguments.get("enable_gqa") and own_heads != heads else 1
    queries, d, keys, dv = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    if not (isinstance(d, int) and isinstance(dv, int)):
        raise CompileError(f"{anchor}: the head dimension must be a fixed number")
    key_heads = sizes.floordiv(heads, group)
    for name, extent in (
        ("b", batch), ("h", heads), ("hk", key_heads), ("i", queries), ("j", keys), ("d", max(d, dv)),
    ):  # fmt: skip
        kernel.variable(name, extent)
    outer = _lead_index(kernel, lead)
    scale = arguments.get("scale")
    scale = 1 / math.sqrt(d) if scale is None else scale
    if not isinstance(scale, int | float):
        raise CompileError(f"{anchor}: the scale must be a fixed number; multiply the queries where it varies")
    q_wide = broadcast(q, (*lead, queries, d))
    key_lead = (*lead[:-1], key_heads) if lead else ()
    k_wide, v_wide = broadcast(k, (*key_lead, keys, d)), broadcast(v, (*key_lead, keys, dv))
    key_outer = (*outer[:-1], 0 if key_heads == 1 else "hk") if lead else ()
    mask = work.operand(arguments.get("attn_mask"))
    store = _store(work, anchor, outer, queries, dv)
    return work.code(
        "attention.c.jinja",
        family="attention",
        units=attention_units(batch, heads, queries, d, dv),
        flops=sizes.mul(batch, heads, queries, keys, 2 * (d + dv)),
        B=c_size(batch),
        HEADS=c_size(heads),
        GROUP=c_size(group),
        SQ=c_size(queries),
        SK=c_size(keys),
        D=d,
        DV=dv,
        rows=block_rows(d, dv),
        scale=literal(scale, "float32"),
        causal=bool(arguments.get("is_causal", False)),
        q=_rows(work, anchor, q_wide, (*outer, "i"), "h"),
        k=_rows(work, anchor, k_wide, (*key_outer, "j"), "hk"),
        v=_rows(work, anchor, v_wide, (*key_outer, "j"), "hk"),
        mask=None if mask is None else _mask(work, mask, (*lead, queries, keys), (*outer, "i", "j")),
        store=store,
    )


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


@dataclass(frozen=True)
class Rows:
    """How the template gets a row of queries, keys or values: its address, or a hole that defines ``element``."""

    address: str = ""
    gather: Hole | None = None


def _rows(work: Anchored, anchor: fx.Node, value: Value, index: tuple[Size, ...], head: str) -> Rows:
    """Rows in place where the head dimension lies contiguous in memory, else gathered through the index function."""
    if value.dtype == "float64":
        raise CompileError(f"{anchor}: attention computes in float32; convert queries, keys and values to it")
    row = str(index[-1])
    found = affine_rows(value.at((*index, "d")), row, "d")
    if found is None or work.kernel.storage[found[0]] != "float32":
        return Rows(gather=work.read(value, (*index, "d"), ("b", head, row), "d", "element"))
    buffer, start, stride = found
    return Rows(f"{buffer} + {c_text(sizes.add(start, sizes.mul(row, stride)))}")


def _mask(work: Anchored, mask: Value, shape: tuple[Size, ...], index: tuple[Size, ...]) -> Hole:
    """``score`` with the mask: added, or minus infinity where a boolean mask is false."""
    builder = work.kernel.builder
    score = builder.scalar("score", "float32")
    element = broadcast(mask, shape).at(index)
    if mask.dtype == "bool":
        masked = builder.call("where", "float32", element, score, builder.const(-math.inf, "float32"))
    else:
        masked = builder.call("add", "float32", score, builder.cast(element, "float32"))
    outside, inside = work.scopes(("b", "h", "i"), "j")
    inside.variables |= {"score"}
    inside.lines.append(f"score = {inside.value(masked)};")
    return Hole("\n".join(outside.lines), "\n".join(inside.lines))


def _store(work: Anchored, anchor: fx.Node, outer: tuple[Size, ...], queries: Size, dv: int) -> Hole:
    """The store of an element, where the views after the anchor put it."""
    results = work.frame.results()
    (returned,) = next(node for node in work.task.nested.graph.nodes if node.op == "output").args
    if len(results) != 1 or not isinstance(returned, fx.Node):
        raise CompileError(f"{anchor}: an attention region has one result")
    order = _memory_order(anchor, returned)
    shape = work.shape()
    index = (*outer, 0 if queries == 1 else "i", "d")
    outside, inside = work.scopes(("b", "h", "i"), "d")
    inside.store(results[0].name, _offset(shape, order, index), work.kernel.builder.scalar("acc", "float32"))
    return Hole("\n".join(outside.lines), "\n".join(inside.lines))


def _offset(shape: tuple[Size, ...], order: Sequence[int], index: tuple[Size, ...]) -> Size:
    """Offset of a logical index when the axes lie in memory in this order."""
    offset: Size = 0
    stride: Size = 1
    for axis in reversed(order):
        offset = sizes.add(offset, sizes.mul(index[axis], stride))
        stride = sizes.mul(stride, shape[axis])
    return offset


def _memory_order(anchor: fx.Node, returned: fx.Node) -> list[int]:
    """The order in which the anchor's axes lie in the stored result: permutations first, then only reshapes."""
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

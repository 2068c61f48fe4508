"""Recognise attention that was written out, and say in the operator's own terms what its masks and keys are.

Before:  softmax(q @ k^T * scale + mask) @ v                 scale on q, k, both or the product; mask added or filled in
After:   scaled_dot_product_attention(q, k, v, mask, scale=scale)

Before:  the same with heads of k and v repeated             After:  ..., enable_gqa=True
Before:  the same with a mask that is lower-triangular       After:  ..., is_causal=True

The operator gives zeros for a row that sees nothing, as do exporters that put zeros where softmax gave nan. Softmax
alone gives nan for a row of -inf: where that cannot be ruled out, nan is put back after the operator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from .base import Pass, Report
from .graph.attention import Operand, Scores, product_of, scores_of, unfit_heads, used_elsewhere
from .graph.attention_masks import Mask, MaskBuilder, Refusal, lifted
from .graph.edit import insert, same_shape, same_size, tensor_shape
from .graph.masks import is_causal, shows_everything
from .graph.match import VIEWS, aten, dtype_of, is_op, is_tensor, only_user, substitute
from .graph.norms import narrowest
from .graph.program import Program
from .graph.query import arguments, calls, size_at
from .graph.softmax import softmax_of

SDPA = aten.scaled_dot_product_attention.default
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default)


class RecogniseAttention(Pass):
    """Replace written-out attention by the operator, and simplify the operator's masks, keys and values."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every product whose left side is a softmax, then at every attention operator."""
        masks = MaskBuilder()
        for node in calls(program.graph, _PRODUCTS):
            if node._erased:
                continue
            try:
                _recognise(node, masks, report)
            except Refusal as refusal:
                report.refuse(node, str(refusal))
        for node in calls(program.graph, (SDPA,)):
            _simplify(node, masks, report)


def _recognise(node: fx.Node, masks: MaskBuilder, report: Report) -> None:
    parts = product_of(node)
    if parts is None or parts[0].order != tuple(range(parts[0].rank)):
        return
    weights, values, order = parts
    softmax = softmax_of(weights.node)
    scores = None if softmax is None else scores_of(softmax[0].args[0])
    if softmax is None or scores is None:
        return
    if isinstance(scores, str):
        raise Refusal(scores)
    other = used_elsewhere([*softmax[2], *scores.interior, scores.product], node)
    if other is not None:
        raise Refusal(f"{other.name}, a step of it, is used elsewhere too")
    q, k, v, scale = _operands(scores, weights, values)
    k, v, grouped = _groups(q, k, v)
    q, k, v, scale = _narrowed(node, q, k, v, scale)
    if reason := unfit_heads(*(one.node.meta["val"].new_empty(one.shape) for one in (q, k, v))):
        raise Refusal(reason)
    mask = masks.build(scores, softmax[1])
    text = f"attention of {q.node.name}, {k.node.name}, {v.node.name}, scale {scale:g}{_described(mask, grouped)}"
    added = None if mask.node is None else lifted(mask.node, q.rank, node)
    args = (q.build(node), k.build(node), v.build(node), added, 0.0, mask.causal)
    kwargs: dict[str, Any] = {"scale": scale, **({"enable_gqa": True} if grouped else {})}
    new = insert(node.graph, node, SDPA, args, kwargs, origins=(scores.product, softmax[0], node))
    if mask.hidden_rows is not None:
        hidden = lifted(mask.hidden_rows, q.rank, node)
        new = insert(node.graph, node, aten.masked_fill.Scalar, (new, hidden, float("nan")), origins=(node,))
    report.change(node, text)
    _deliver(new, node, q.rank, order)


def _operands(scores: Scores, weights: Operand, values: Operand) -> tuple[Operand, Operand, Operand, float]:
    """The three operands, of equal rank and batch axes, and the scale."""
    rank = len(scores.shape)
    if rank > 4 or weights.rank > 4:
        raise Refusal(f"{scores.shaped.name} has more than two batch axes")
    batch = (scores.shaped, scores.shape[:2]) if rank == 4 else None
    if rank == 3 and not scores.biases and not scores.covers:
        batch = _viewed_batch(scores.q)
    q, factor_q = scores.q.simplified(batch)
    k, factor_k = scores.k.simplified(batch)
    v, _ = values.simplified(batch, factors=False)
    for operand, product in ((scores.q, scores.product), (scores.k, scores.product), (values, weights.node)):
        if batch and operand.rank == 3 and not same_size(operand.shape[0], tensor_shape(product)[0]):
            raise Refusal(f"{operand.node.name} is broadcast over batch axes")
    if not q.rank == k.rank == v.rank:
        raise Refusal(f"{q.node.name}, {k.node.name} and {v.node.name} have different numbers of axes")
    wanted = batch[1] if batch else scores.shape[:-2]
    if not same_shape(q.shape[:-2], wanted):
        raise Refusal(f"{q.node.name} is broadcast over batch axes")
    if not same_size(k.shape[-2], v.shape[-2]):
        raise Refusal(f"{k.node.name} and {v.node.name} have different numbers of rows")
    return q, k, v, scores.scale * factor_q * factor_k


def _viewed_batch(q: Operand) -> Any:
    """The two batch axes of which q's first axis is a view."""
    inner, _ = q.simplified()
    node: Any = inner.node.args[0] if is_op(inner.node, VIEWS) and inner.order[:1] == (0,) else None
    if not is_tensor(node) or len(tensor_shape(node)) != 4:
        return None
    viewed = tensor_shape(inner.node)[1:]
    return (node, tensor_shape(node)[:2]) if same_shape(tensor_shape(node)[2:], viewed) else None


def _groups(q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand, bool]:
    """Keys and values with each head once, and whether several heads of q share one of them."""
    (once_k, times_k), (once_v, times_v) = k.unrepeated(), v.unrepeated()
    if times_k == times_v > 1:
        k, v = once_k, once_v
    heads_q, heads_k, heads_v = (one.shape[1] if one.rank == 4 else 1 for one in (q, k, v))
    if same_size(heads_q, heads_k) and same_size(heads_q, heads_v):
        grouped = False
    else:
        whole = type(heads_q) is type(heads_k) is int and same_size(heads_k, heads_v)
        if not whole or heads_q % heads_k:
            raise Refusal(f"{k.node.name} or {v.node.name} is broadcast over heads")
        if times_k == 1 and heads_k != 1:
            raise Refusal(f"{k.node.name} is broadcast over heads")
        grouped = True
    for one in (k, v):
        rest = 1 if one.rank == 4 else one.rank - 2
        if not same_shape(one.shape[:rest], q.shape[:rest]):
            raise Refusal(f"{one.node.name} is broadcast over batch axes")
    return k, v, grouped


def _narrowed(
    node: fx.Node, q: Operand, k: Operand, v: Operand, scale: float
) -> tuple[Operand, Operand, Operand, float]:
    """The operands in v's dtype: the operator computes in fp32 inside, so the graph need not widen them."""
    dtype = dtype_of(v.node)
    narrow = []
    for one in (q, k):
        source = narrowest(one.node, dtype)
        if dtype_of(source) != dtype:
            raise Refusal(f"{one.node.name} and {v.node.name} have different dtypes")
        if source is not one.node:
            one, factor = replace(one, node=source).simplified()
            scale *= factor
        narrow.append(one)
    if dtype != dtype_of(node):
        raise Refusal(f"the result has another dtype than {v.node.name}")
    return narrow[0], narrow[1], v, scale


def _described(mask: Mask, grouped: bool) -> str:
    words = [f"mask {mask.node.name}"] if mask.node is not None else []
    words += ["causal"] if mask.causal else []
    words += ["nan for rows that see nothing"] if mask.hidden_rows is not None else []
    words += ["grouped heads"] if grouped else []
    return "".join(f", {word}" for word in words)


def _deliver(new: fx.Node, old: fx.Node, rank: int, order: tuple[int, ...]) -> None:
    """Give the users of the old product what they expect, from the operator's four axes."""
    graph, shape = old.graph, tensor_shape(old)
    if len(order) == 4:
        if order != (0, 1, 2, 3):
            new = insert(graph, old, aten.permute.default, (new, list(order)), origins=(old,))
    elif rank == 4:
        user = only_user(old)
        if is_op(user, VIEWS) and same_shape(tensor_shape(user), tensor_shape(new)):
            old = user
        else:
            sizes = [-1 if not isinstance(shape[0], int) else shape[0], *(size_at(old, new, axis) for axis in (2, 3))]
            new = insert(graph, old, aten.reshape.default, (new, sizes), origins=(old,))
    else:
        for axis in (1, 0)[: 4 - rank]:
            new = insert(graph, old, aten.squeeze.dim, (new, axis), origins=(old,))
        if order != tuple(range(rank)):
            new = insert(graph, old, aten.permute.default, (new, list(order)), origins=(old,))
    substitute(old, new)


def _simplify(node: fx.Node, masks: MaskBuilder, report: Report) -> None:
    """An attention operator without a mask that hides nothing or only the future, and without repeated heads."""
    given = arguments(node)
    query, mask, causal = given["query"], given["attn_mask"], given["is_causal"]
    found: list[str] = []
    if mask is not None and not causal:
        value = masks.value(mask)
        if shows_everything(value):
            mask = None
            found.append(f"{given['attn_mask'].name} hides nothing")
        elif is_causal(value, dtype_of(query)):
            mask, causal = None, True
            found.append(f"{given['attn_mask'].name} is causal")
    grouped = given["enable_gqa"]
    key, value_ = Operand.of(given["key"]), Operand.of(given["value"])
    if not grouped and key.rank == value_.rank == 4:
        (once_k, times), (once_v, times_v) = (one.simplified(factors=False)[0].unrepeated() for one in (key, value_))
        if times == times_v > 1 and same_size(once_k.shape[1], once_v.shape[1]) and type(once_k.shape[1]) is int:
            key, value_, grouped = once_k, once_v, True
            found.append(f"each head of {once_k.node.name} and {once_v.node.name} serves {times} of {query.name}")
    if not found:
        return
    args = (query, key.build(node), value_.build(node), mask, given["dropout_p"], causal)
    kwargs = {"scale": given["scale"]} if given["scale"] is not None else {}
    new = insert(node.graph, node, SDPA, args, {**kwargs, **({"enable_gqa": True} if grouped else {})}, origins=(node,))
    report.change(node, "; ".join(found))
    substitute(node, new)

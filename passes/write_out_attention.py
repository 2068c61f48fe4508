"""Write attention out where no attention kernel fits it.

Before:  scaled_dot_product_attention(q, k, v, mask, is_causal=..., scale=s)
After:   safe_softmax(q * s @ k^T + mask) @ v            -inf for what a boolean or causal mask hides

The kernels take heads of a fixed number of elements, at most ``LONGEST_HEAD``, and compute in float32. The softmax is
the one that gives zeros for a row that sees nothing, as the operator does.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from .base import Pass, Report
from .graph.attention import unfit_heads
from .graph.edit import tensor_shape
from .graph.emit import Emitter
from .graph.program import Program
from .graph.query import arguments, aten, calls, supersede


class WriteOutAttention(Pass):
    """Replace attention operators that no kernel takes by products and a softmax."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every attention operator."""
        for node in calls(program.graph, (aten.scaled_dot_product_attention.default,)):
            given = arguments(node)
            reason = unfit_heads(*(given[name].meta["val"] for name in ("query", "key", "value")))
            if reason:
                report.change(node, f"written out: {reason}")
                supersede(node, _written_out(node), name=node.name)


def _written_out(node: fx.Node) -> fx.Node:
    given, emit = arguments(node), Emitter(node)
    query, key, value = given["query"], given["key"], given["value"]
    if given["enable_gqa"]:
        heads, own = tensor_shape(query)[-3], tensor_shape(key)[-3]
        if heads != own:
            key, value = (emit(aten.repeat_interleave.self_int, one, heads // own, -3) for one in (key, value))
    rank, length = len(tensor_shape(key)), tensor_shape(query)[-1]
    turned = emit(aten.permute.default, key, [*range(rank - 2), rank - 1, rank - 2])
    scale = given["scale"]
    if scale is None and not isinstance(length, int):
        size = emit(aten.sym_size.int, query, len(tensor_shape(query)) - 1)
        root = emit(operator.pow, emit(torch.sym_float, size), 0.5)
        scores = emit(aten.div.Tensor, emit(aten.matmul.default, query, turned), root)
    else:
        scale = 1 / math.sqrt(max(length, 1)) if scale is None else scale
        scores = emit(aten.matmul.default, emit(aten.mul.Tensor, query, scale), turned)
    if given["is_causal"]:
        visible = emit(aten.tril.default, emit(aten.ones_like.default, scores, dtype=torch.bool))
        scores = emit(aten.where.ScalarOther, visible, scores, -math.inf)
    mask = given["attn_mask"]
    if mask is not None:
        hides = mask.meta["val"].dtype == torch.bool
        scores = emit(aten.where.ScalarOther, mask, scores, -math.inf) if hides else emit(aten.add.Tensor, scores, mask)
    return emit(aten.matmul.default, emit(aten._safe_softmax.default, scores, -1), value)

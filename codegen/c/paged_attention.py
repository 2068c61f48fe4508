"""The family of attention over paged caches, through ``paged_attention.c.jinja``.

Queries are read through their views and computed on the way: a slice of a fused projection, rotated. Keys and values
are read in their blocks, which lie as the products want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...passes.graph.cache_ops import BLOCK, PAGED_ATTENTION
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ..anchors import find_anchor
from ..heads import result_offset
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..templating import Hole
from .anchors import Anchored, c_size
from .dialect import literal
from .row_pieces import row_pieces

TARGETS = frozenset((PAGED_ATTENTION,))
ROWS = 48  # query rows of a unit, as many as share a block of keys while it is in the first cache
STACK = 512 * 1024  # bytes of a unit's scratch
GROUP = 128  # keys between two updates of a row's maximum and sum: TW_KEYS of the template


def paged_attention_family(task: Task) -> Sequence[Made]:
    """Attention of ragged queries to their sequences' caches, then perhaps a reshape.

    Raises:
        CompileError: heads that no kernel computes, with the reason.
    """
    anchor = find_anchor(task, TARGETS)
    frame = Frame(task)
    return [Made(_build(Anchored(task, anchor, frame)), frame.storages)]


def tokens_of(group: int) -> int:
    """Tokens of a unit whose query heads share keys by ``group``."""
    return max(1, ROWS // group)


def _build(work: Anchored) -> KernelCode:
    given = arguments(work.anchor)
    query, keys, table = (work.operand(given[name]) for name in ("query", "keys", "table"))
    assert query is not None and keys is not None and table is not None
    tokens, heads, length = query.shape
    blocks, shared, *_ = keys.shape
    group = _check(work, query.dtype, heads, shared, length)
    assert isinstance(shared, int) and isinstance(length, int)
    scale, window = given["scale"], given["window"]
    if not isinstance(scale, int | float) or not isinstance(window, int):
        raise CompileError(f"{work.anchor}: the scale and the window must be fixed numbers")
    work.kernel.variable("t", tokens)
    work.kernel.variable("h", heads)
    q = row_pieces(work, query, ("t", "h"))
    sequences, width = table.shape
    bf16 = keys.dtype == "bfloat16"
    context = sizes.mul(width, BLOCK)
    return work.code(
        "paged_attention.c.jinja",
        family="paged_attention",
        units=paged_units(tokens, sequences, shared, group),
        flops=sizes.mul(tokens, heads, context, 4 * length),
        bytes=sizes.mul(sequences, context, shared, 2 * length, 2 if bf16 else 4),
        SHARED=shared,
        GROUP=group,
        D=length,
        tokens=tokens_of(group),
        TOKENS=c_size(tokens),
        SEQUENCES=c_size(sequences),
        WIDTH=c_size(width),
        BLOCKS=c_size(blocks),
        bf16=bf16,
        scale=literal(scale, "float32"),
        scaled=scale <= 0,
        window=window,
        q=q,
        store=_store(work),
        **work.pointers("keys", "values", "positions", "starts", "contexts", "table"),
    )


def paged_units(tokens: Any, sequences: Any, shared: int, group: int) -> Any:
    """Units of work: heads of the caches times slots for the tokens of each sequence, and for padding."""
    return sizes.mul(shared, sizes.add(sizes.floordiv(tokens, tokens_of(group)), sequences, 1))


def _check(work: Anchored, dtype: str, heads: Any, shared: Any, length: Any) -> int:
    """The number of query heads that share a head of the caches."""
    if dtype == "float64":
        raise CompileError(f"{work.anchor}: attention computes in float32; convert queries to it")
    if not all(isinstance(extent, int) for extent in (heads, shared, length)):
        raise CompileError(f"{work.anchor}: the numbers of heads and their size must be fixed numbers")
    group = heads // shared
    scratch = tokens_of(group) * group * 4 * (2 * length + 16 + GROUP + 8)
    if not 1 <= length <= 256 or scratch > STACK:
        raise CompileError(
            f"{work.anchor}: {group} query heads of {length} elements share keys; the kernel takes 1 to 256 elements, "
            f"and its scratch of {scratch} bytes must fit into {STACK}"
        )
    return group


def _store(work: Anchored) -> Hole:
    """The store of an element, where the reshape after the anchor puts it."""
    outside, inside = work.scopes(("t", "h"), "d")
    name, offset = result_offset(work, ("t", "h", "d"))
    inside.store(name, offset, work.kernel.builder.scalar("acc", "float32"))
    return Hole("\n".join(outside.lines), "\n".join(inside.lines))

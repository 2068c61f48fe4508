"""Operators on paged key/value caches: real torch operators, registered when this module is imported.

A cache is a pool of blocks of :data:`BLOCK` positions. A sequence owns some of them, in the order of its row of the
block table: its position p lies in block ``table[s, p // BLOCK]``, place ``p % BLOCK``. Keys lie transposed, as
``[blocks, kv_heads, dim, BLOCK]``, so that a block is what a product with a row of queries reads; values lie as
``[blocks, kv_heads, BLOCK, dim]``.

A step takes the tokens of several sequences one after another (*ragged*): tokens ``starts[s]`` up to, and without,
``starts[s + 1]`` are those of sequence s, each with its position. Tokens from ``starts[-1]`` on are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Positions in a block of a cache."""

_CACHES = (torch.float32, torch.bfloat16)


@torch.library.custom_op(
    "tilewright::cache_append",
    mutates_args=(),
    schema="(Tensor cache, Tensor rows, Tensor positions, Tensor starts, Tensor table, bool transposed) -> Tensor",
)
def cache_append(
    cache: Tensor, rows: Tensor, positions: Tensor, starts: Tensor, table: Tensor, transposed: bool
) -> Tensor:
    """The cache with a row more for every token that is no padding.

    No two tokens may have the same place.

    Args:
        cache: float32 or bfloat16, ``[blocks, kv_heads, BLOCK, dim]``, or ``[blocks, kv_heads, dim, BLOCK]`` if
            ``transposed``.
        rows: ``[tokens, kv_heads, dim]``, floating point, converted to the cache's dtype.
        positions: int32 ``[tokens]``, each token's position in its sequence.
        starts: int32 ``[sequences + 1]``, where the tokens of each sequence start, and where the last one's end.
        table: int32 ``[sequences, width]``, each sequence's blocks in order.
        transposed: whether the cache holds columns (keys) instead of rows (values).

    Returns:
        The new cache, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, starts that are no partition of the tokens, or a token
            whose position or block lies outside the table or the cache.
    """
    _check_append(cache, rows, positions, starts, table, transposed)
    result = cache.clone(memory_format=torch.contiguous_format)
    tokens, sequences = _owners(positions, starts, "cache_append")
    where = positions[tokens].long()
    blocks = _blocks(table, sequences, where, cache.shape[0], "cache_append")
    places = where % BLOCK
    new = rows[tokens].to(cache.dtype)
    if transposed:
        result[blocks, :, :, places] = new
    else:
        result[blocks, :, places] = new
    return result


@cache_append.register_fake
def _(cache: Tensor, rows: Tensor, positions: Tensor, starts: Tensor, table: Tensor, transposed: bool) -> Tensor:
    _check_append(cache, rows, positions, starts, table, transposed)
    return torch.empty(cache.shape, dtype=cache.dtype, device=cache.device)


@torch.library.custom_op(
    "tilewright::paged_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor positions, Tensor starts, Tensor contexts, Tensor table, "
    "float scale, int window) -> Tensor",
)
def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    contexts: Tensor,
    table: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attention of the tokens of several sequences to their caches.

    The token at position p sees its sequence's positions j with ``j <= p``, ``j < contexts[s]`` and, if ``window > 0``,
    ``p - j < window``. Scores and sums are float32 or wider. Only blocks that hold a position somebody sees are read.

    Args:
        query: ``[tokens, heads, dim]``, floating point; head h reads head ``h // (heads // kv_heads)`` of the caches.
        keys: float32 or bfloat16 ``[blocks, kv_heads, dim, BLOCK]``.
        values: like ``keys``, ``[blocks, kv_heads, BLOCK, dim]``.
        positions: int32 ``[tokens]``, each token's position in its sequence.
        starts: int32 ``[sequences + 1]``, where the tokens of each sequence start, and where the last one's end.
        contexts: int32 ``[sequences]``, how many positions of each sequence are in the cache, these tokens included.
        table: int32 ``[sequences, width]``, each sequence's blocks in order.
        scale: what scores are multiplied by.
        window: how many positions a token sees, its own included; 0 for all.

    Returns:
        ``[tokens, heads, dim]`` in the query's dtype, zeros for padding and for tokens that see nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, starts that are no partition of the tokens, or a
            position that is seen and lies outside the table or the cache.
    """
    _check_attention(query, keys, values, positions, starts, contexts, table, window)
    wide = torch.promote_types(query.dtype, torch.float32)
    kv_heads, dim = keys.shape[1], keys.shape[2]
    result = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    _owners(positions, starts, "paged_attention")
    for sequence, (start, end, context) in enumerate(zip(starts[:-1], starts[1:], contexts, strict=True)):
        if start == end:
            continue
        where = positions[start:end].long()
        last = min(int(where.max()) + 1, int(context))
        first = max(int(where.min()) - window + 1, 0) if window else 0
        if first >= last:
            continue
        seen = torch.arange(first // BLOCK * BLOCK, last)
        of = torch.full_like(seen[::BLOCK], sequence)
        blocks = _blocks(table, of, seen[::BLOCK], keys.shape[0], "paged_attention")
        key = keys[blocks].permute(1, 2, 0, 3).reshape(kv_heads, dim, -1)[..., : len(seen)].to(wide)
        value = values[blocks].permute(1, 0, 2, 3).reshape(kv_heads, -1, dim)[:, : len(seen)].to(wide)
        rows = query[start:end].to(wide).unflatten(1, (kv_heads, -1))
        scores = torch.einsum("tkgd,kdc->tkgc", rows, key) * scale
        visible = seen <= where[:, None]
        if window:
            visible &= where[:, None] - seen < window
        hidden = ~visible[:, None, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
        # A cache holds anything, also infinities, where no token has written yet; zero weights do not remove those.
        value = value.masked_fill(~visible.any(0)[:, None], 0)
        result[start:end] = torch.einsum("tkgc,kcd->tkgd", weights, value).flatten(1, 2).to(query.dtype)
    return result


@paged_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    contexts: Tensor,
    table: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    _check_attention(query, keys, values, positions, starts, contexts, table, window)
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _check_append(
    cache: Tensor, rows: Tensor, positions: Tensor, starts: Tensor, table: Tensor, transposed: bool
) -> None:
    name = "cache_append"
    _check_cache(name, "cache", cache, transposed)
    dim = cache.shape[2 if transposed else 3]
    if rows.dim() != 3 or not rows.is_floating_point() or rows.shape[1] != cache.shape[1] or rows.shape[2] != dim:
        raise ValueError(
            f"{name}: rows are {_described(rows)}; the cache takes floating point [tokens, {cache.shape[1]}, {dim}]"
        )
    _check_ragged(name, rows, positions, starts, table)


def _check_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    contexts: Tensor,
    table: Tensor,
    window: int,
) -> None:
    name = "paged_attention"
    _check_cache(name, "keys", keys, True)
    _check_cache(name, "values", values, False)
    blocks, kv_heads, dim, _ = keys.shape
    if keys.dtype != values.dtype or values.shape[:2] != keys.shape[:2] or values.shape[3] != dim:
        raise ValueError(
            f"{name}: keys are {_described(keys)}, so values must be "
            f"{_described(keys, (blocks, kv_heads, BLOCK, dim))}, not {_described(values)}"
        )
    if query.dim() != 3 or not query.is_floating_point() or query.shape[2] != dim or query.shape[1] % kv_heads:
        raise ValueError(
            f"{name}: the query is {_described(query)}; these keys take floating point [tokens, heads, {dim}] with a "
            f"multiple of {kv_heads} heads"
        )
    _check_ragged(name, query, positions, starts, table)
    if contexts.dim() != 1 or contexts.dtype != torch.int32 or contexts.shape[0] != table.shape[0]:
        raise ValueError(f"{name}: contexts are {_described(contexts)}; expected int32 [{table.shape[0]}]")
    if window < 0:
        raise ValueError(f"{name}: the window is {window}; give the positions that a token sees, or 0 for all")


def _check_cache(name: str, role: str, cache: Tensor, transposed: bool) -> None:
    axis, layout = (3, "dim, BLOCK") if transposed else (2, "BLOCK, dim")
    if cache.dtype not in _CACHES or cache.dim() != 4 or cache.shape[axis] != BLOCK:
        raise ValueError(
            f"{name}: {role} {'are' if role.endswith('s') else 'is'} {_described(cache)}; expected float32 or bfloat16 "
            f"[blocks, kv_heads, {layout}] with BLOCK = {BLOCK}"
        )


def _check_ragged(name: str, rows: Tensor, positions: Tensor, starts: Tensor, table: Tensor) -> None:
    if positions.dim() != 1 or positions.dtype != torch.int32 or positions.shape[0] != rows.shape[0]:
        raise ValueError(f"{name}: positions are {_described(positions)}; expected int32 [{rows.shape[0]}]")
    if table.dim() != 2 or table.dtype != torch.int32:
        raise ValueError(f"{name}: the block table is {_described(table)}; expected int32 [sequences, width]")
    if starts.dim() != 1 or starts.dtype != torch.int32 or starts.shape[0] != table.shape[0] + 1:
        raise ValueError(
            f"{name}: starts are {_described(starts)}; expected int32 [{table.shape[0] + 1}], one more than the block "
            f"table has sequences"
        )


def _described(tensor: Tensor, shape: tuple[object, ...] | None = None) -> str:
    extents = tuple(tensor.shape) if shape is None else shape
    return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(map(str, extents))}]"


def _owners(positions: Tensor, starts: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The tokens that are no padding, and the sequence of each."""
    count = positions.shape[0]
    if starts[0] != 0 or bool((starts.diff() < 0).any()) or starts[-1] > count:
        raise ValueError(
            f"{name}: starts {starts.tolist()} are no partition of {count} tokens: they begin at 0, never fall and end "
            f"at {count} or before"
        )
    tokens = torch.arange(int(starts[-1]))
    return tokens, torch.searchsorted(starts[1:].contiguous(), tokens.int(), right=True)


def _blocks(table: Tensor, sequences: Tensor, positions: Tensor, count: int, name: str) -> Tensor:
    """The block of each (sequence, position)."""
    columns = positions.div(BLOCK, rounding_mode="floor")
    if bad := ((columns < 0) | (columns >= table.shape[1])).nonzero().flatten().tolist():
        raise ValueError(
            f"{name}: position {int(positions[bad[0]])} of sequence {int(sequences[bad[0]])} is outside its "
            f"{table.shape[1]} blocks of {BLOCK}"
        )
    blocks = table[sequences, columns].long()
    if bad := ((blocks < 0) | (blocks >= count)).nonzero().flatten().tolist():
        raise ValueError(
            f"{name}: the table gives block {int(blocks[bad[0]])} to position {int(positions[bad[0]])} of sequence "
            f"{int(sequences[bad[0]])}; the cache has {count}"
        )
    return blocks


CACHE_APPEND = torch.ops.tilewright.cache_append.default
PAGED_ATTENTION = torch.ops.tilewright.paged_attention.default

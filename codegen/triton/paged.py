"""Families of paged caches: appending to them, and attention (``cache_append.py.jinja``, ``paged_attention.py.jinja``).

Rows and queries are read through their views and computed on the way. A program of attention has the query heads of one
token that share a head of the cache. Where the tokens are few, the positions are split over programs as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ...passes.graph.cache_ops import BLOCK, CACHE_APPEND, PAGED_ATTENTION
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.plan import COUNTERS
from ...runtime.sizes import Size
from ..anchors import find_anchor
from ..heads import result_offset
from ..regions import Frame, Made, Task
from ..storage import Storage
from . import dialect
from .anchors import Anchored
from .attention_tiles import head_block, tile
from .emit import Var
from .frame import COUNTERS as COUNTERS_STORAGE
from .frame import Extra

MOST_SPLIT = 512
"""Tokens times heads of the cache up to which positions are split over programs; more fill a GPU by themselves."""

LEAST_SPLIT = 128
"""The fewest positions of a program where they are split; the scratch memory is sized for it."""

_LOG2E = 1.4426950408889634


def cache_append_family(task: Task) -> Sequence[Made]:
    """A row more in the cache for every token.

    Raises:
        CompileError: the result does not lie in the cache's memory, or sizes vary that a kernel has to know.
    """
    anchor = find_anchor(task, frozenset((CACHE_APPEND,)))
    cache = anchor.args[0]
    assert isinstance(cache, fx.Node)
    if cache.op != "placeholder" or len(task.results) != 1 or task.storage_of(cache) is not task.results[0]:
        raise CompileError(f"{anchor}: a cache is appended to in place, so it must be a state of the model")
    work = Anchored(task, anchor, Frame(task, skip=[cache]))
    given = arguments(anchor)
    (result,) = work.frame.results()
    blocks, heads, *inner = result.shape
    length = inner[0 if given["transposed"] else 1]
    rows, table = work.operand(given["rows"]), work.operand(given["table"])
    assert rows is not None and table is not None
    if not isinstance(length, int) or not isinstance(heads, int):
        raise CompileError(f"{anchor}: the number of key and value heads and their size must be fixed numbers")
    tokens, block_d = rows.shape[0], head_block(length)
    for name, extent in (("t", tokens), ("h", heads), ("d", length)):
        work.kernel.variable(name, extent)
    variables = {"t": Var("t"), "h": Var("h"), "d": Var("d", (str(block_d),), f"d < {length}")}
    pointers = work.pointers("positions", "starts", "table")
    read = work.read(rows, ("t", "h", "d"), variables, "row", result.dtype)
    work.needs_fault()
    return [
        work.made(
            "cache_append.py.jinja",
            family="cache_append",
            units=sizes.mul(tokens, heads),
            flops=0,
            tiles=(tile(1, 1),),
            sizes_used=(tokens, blocks, *table.shape),
            HEADS=heads,
            D=length,
            BLOCK=BLOCK,
            CACHE=result.name,
            block_d=block_d,
            transposed=given["transposed"],
            read=read,
            **_places(pointers, tokens, table.shape, blocks),
        )
    ]


def paged_attention_family(task: Task) -> Sequence[Made]:
    """Attention of ragged queries to their sequences' caches, then perhaps a reshape.

    Raises:
        CompileError: heads that no kernel computes, with the reason.
    """
    anchor = find_anchor(task, frozenset((PAGED_ATTENTION,)))
    ranges = task.symbols.ranges

    def work() -> Anchored:
        return Anchored(task, anchor, Frame(task))

    shape = work().region.shape(anchor)
    keys = work().operand(arguments(anchor)["keys"])
    assert keys is not None
    shared = sizes.mul(shape[0], keys.shape[1])
    whole = _attention(work(), split=False, guard=1)
    if sizes.bounds(shared, ranges)[0] > MOST_SPLIT:
        return [whole]
    few = 1 if sizes.bounds(shared, ranges)[1] <= MOST_SPLIT else sizes.compare("le", shared, MOST_SPLIT)
    split = _attention(work(), split=True, guard=few)
    return [split] if few == 1 else [split, whole]


def _attention(work: Anchored, *, split: bool, guard: Size) -> Made:
    """The kernel whose programs have all positions, or one that splits them."""
    given = arguments(work.anchor)
    query, keys, table = (work.operand(given[name]) for name in ("query", "keys", "table"))
    assert query is not None and keys is not None and table is not None
    tokens, heads, length = query.shape
    blocks, shared, *_ = keys.shape
    group = _check(work, query.dtype, heads, shared, length)
    assert isinstance(length, int)
    scale, window = given["scale"], given["window"]
    if not isinstance(scale, int | float) or not isinstance(window, int):
        raise CompileError(f"{work.anchor}: the scale and the window must be fixed numbers")
    wide, rows = head_block(length), max(16, 1 << (group - 1).bit_length())
    for name, extent in (("t", tokens), ("h", heads), ("d", length), ("e", length)):
        work.kernel.variable(name, extent)
    filling = f"(r < {group})[:, None]" if group < rows else ""
    of_rows = {"t": Var("t"), "h": Var("h[:, None]", (str(rows), "1"), filling)}
    columns = {
        name: Var(f"{name}[None, :]", ("1", str(wide)), f"({name} < {length})[None, :]" if wide != length else "")
        for name in ("d", "e")
    }
    pointers = work.pointers("keys", "values", "positions", "starts", "contexts", "table")
    read = work.read(query, ("t", "h", "d"), {**of_rows, "d": columns["d"]}, "query", keys.dtype)
    name, offset = result_offset(work, ("t", "h", "e"))
    scope = work.scope({**of_rows, "e": columns["e"]}, {"acc": ("acc", (str(rows), str(wide)))})
    scope.store(name, offset, work.kernel.builder.scalar("acc", "float32"))
    store = work.text(scope)
    work.needs_fault()
    parts = (sizes.mul(tokens, shared), sizes.ceildiv(sizes.mul(table.shape[1], BLOCK), LEAST_SPLIT), group, length + 2)
    context = sizes.mul(table.shape[1], BLOCK)
    units = sizes.mul(tokens, shared)
    return work.made(
        "paged_attention.py.jinja",
        family="paged_attention",
        units=sizes.mul(units, sizes.ceildiv(context, "SPLIT")) if split else units,
        flops=sizes.mul(tokens, heads, context, 4 * length),
        tiles=_split_tiles() if split else (tile(4, 3, BLOCK_N=BLOCK), tile(2, 3, BLOCK_N=BLOCK)),
        extras=_parts(parts) if split else (),
        sizes_used=(units, blocks, *table.shape, *((sizes.product(parts),) if split else ())),
        guard=guard,
        SHARED=shared,
        GROUP=group,
        ROWS=rows,
        LIVE=group,
        D=length,
        DV=length,
        BLOCK=BLOCK,
        block_d=wide,
        block_dv=wide,
        split=split,
        window=window,
        masked=False,
        scale=dialect.literal(scale * _LOG2E, "float32"),
        precision=work.task.precision,
        narrow="" if keys.dtype == "float32" else dialect.TYPES[keys.dtype],
        cells=" & ".join(filter(None, ("live[:, None]", columns["e"].guard))),
        query=read,
        store=store,
        KEYS=pointers["keys"],
        VALUES=pointers["values"],
        CONTEXTS=pointers["contexts"],
        **_places(pointers, tokens, table.shape, blocks),
    )


def _places(pointers: dict[str, str], tokens: Size, table: Sequence[Size], blocks: Size) -> dict[str, Any]:
    """What ``paged.py.jinja`` needs."""
    return {
        "POSITIONS": pointers["positions"],
        "STARTS": pointers["starts"],
        "TABLE": pointers["table"],
        "TOKENS": _text(tokens),
        "SEQUENCES": _text(table[0]),
        "WIDTH": _text(table[1]),
        "BLOCKS": _text(blocks),
    }


def _parts(shape: tuple[Size, ...]) -> tuple[Extra, ...]:
    """Scratch memory of the parts that programs leave, and what they count in."""
    assert MOST_SPLIT <= COUNTERS
    return (
        Extra("parts", Storage("buffer", shape, "float32", name="parts")),
        Extra("counters", COUNTERS_STORAGE),
    )


def _split_tiles() -> tuple[Any, ...]:
    return tuple(tile(warps, 3, SPLIT=split, BLOCK_N=BLOCK) for warps, split in ((4, 256), (4, 128), (2, 512)))


def _check(work: Anchored, dtype: str, heads: Any, shared: Any, length: Any) -> int:
    """The number of query heads that share a head of the caches."""
    if dtype == "float64":
        raise CompileError(f"{work.anchor}: attention computes in float32; convert queries to it")
    if not all(isinstance(extent, int) for extent in (heads, shared, length)):
        raise CompileError(f"{work.anchor}: the numbers of heads and their size must be fixed numbers")
    if not 1 <= length <= 256:
        raise CompileError(f"{work.anchor}: heads have {length} elements; the kernel takes 1 to 256")
    return int(heads // shared)


def _text(size: Size) -> str:
    """A size in the template, in parentheses where it is compound."""
    text = dialect.size(size)
    return text if isinstance(size, int | str) else f"({text})"

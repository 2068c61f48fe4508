"""The attention family: scaled dot-product attention through ``attention.py.jinja`` and ``attention_decode.py.jinja``.

Queries, keys and values are read through their views, the mask is computed in the kernel, and the result may be stored
permuted, which is how heads are merged again without a copy. Products are of the operands' own dtype, statistics and
sums in float32. Where there are few queries, the keys are split over programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime import sizes
from ...runtime.plan import COUNTERS
from ...runtime.sizes import Size
from ..anchors import find_anchor
from ..heads import TARGETS, Heads, heads_of
from ..regions import Frame, Made, Task
from ..storage import Storage
from . import dialect
from .anchors import Anchored
from .attention_tiles import LEAST_SPLIT, MOST_KEYS, decode_tiles, head_block, tiles
from .emit import Var
from .frame import COUNTERS as COUNTERS_STORAGE
from .frame import Extra

__all__ = ["TARGETS", "attention_family"]

MOST_QUERIES = 4
"""Up to so many queries the keys are split over programs."""

_MOST_ROWS = 64  # queries of all heads that share a key head; more fill a block of queries by themselves
_LOG2E = 1.4426950408889634


def attention_family(task: Task) -> Sequence[Made]:
    """``softmax(scale * q k^T + mask) v``, then perhaps a permutation."""
    anchor = find_anchor(task, TARGETS)

    def work() -> Anchored:
        return Anchored(task, anchor, Frame(task))

    decode = _decode(work())
    if decode is None:
        return [_general(work())]
    return [decode] if decode.guard == 1 else [decode, _general(work())]


@dataclass(frozen=True)
class Keys:
    """The holes of a block of keys: ``key``, ``value`` and ``mask`` as statements, ``seen`` as the text of a mask."""

    key: str
    value: str
    mask: str
    seen: str


def _general(work: Anchored) -> Made:
    found = heads_of(work)
    _declare(work, found)
    i = Var("i[:, None]", ("BLOCK_M", "1"), f"(i < {_text(found.queries)})[:, None]")
    rows = {"b": Var("b"), "h": Var("h"), "i": i}
    whole = not found.causal and isinstance(found.keys, int) and found.keys % MOST_KEYS == 0
    within = f"j < {_text(found.keys)}"
    seen = f"({within})[None, :]" + (" & (j[None, :] <= i[:, None])" if found.causal else "")
    return work.made(
        "attention.py.jinja",
        family="attention",
        units=sizes.mul(found.batch, found.heads, sizes.ceildiv(found.queries, "BLOCK_M")),
        flops=_flops(found),
        tiles=tiles(found.query.dtype, found.d, found.dv, precision=work.task.precision, dense=_is_dense(work, found)),
        sizes_used=(found.queries, found.keys, found.batch, found.heads),
        HEADS=_text(found.heads),
        GROUP=_text(found.group),
        SQ=_text(found.queries),
        SK=_text(found.keys),
        causal=found.causal,
        inside=_keys(work, found, rows, "", "") if found.causal else None,
        edge=_keys(work, found, rows, "", "") if whole else _keys(work, found, rows, within, seen),
        **_common(work, found, rows, ("BLOCK_M", str(head_block(found.dv)))),
    )


def _decode(work: Anchored) -> Made | None:
    """The kernel that splits the keys, or ``None`` where it is of no use."""
    found = heads_of(work)
    ranges = work.task.symbols.ranges
    least, most = sizes.bounds(found.queries, ranges)
    if found.causal or least > MOST_QUERIES or not isinstance(found.group, int):
        return None
    if sizes.bounds(found.keys, ranges)[1] <= 2 * LEAST_SPLIT:
        return None
    queries = _power_of_two(min(most, MOST_QUERIES))
    live = found.group * queries
    if live > _MOST_ROWS:
        return None
    _declare(work, found)
    block_rows = max(16, _power_of_two(live))
    is_live = f"(r < {live})[:, None]" if live < block_rows else ""
    rows = {
        "b": Var("b"),
        "h": Var("h[:, None]", (str(block_rows), "1"), is_live),
        "i": Var("i[:, None]", (str(block_rows), "1"), f"(i < {_text(found.queries)})[:, None]"),
    }
    shared = sizes.mul(found.batch, found.key_heads)
    parts = (shared, sizes.ceildiv(found.keys, LEAST_SPLIT), live, found.dv + 2)
    limits = ((found.queries, MOST_QUERIES), (shared, COUNTERS))
    needed = [sizes.compare("le", size, limit) for size, limit in limits if sizes.bounds(size, ranges)[1] > limit]
    if sizes.bounds(found.keys, ranges)[0] < 1:  # without keys there are no programs, and nothing writes the result
        needed.append(sizes.compare("le", 1, found.keys))
    cells = ("live[:, None]", _column("e", found.dv).guard)
    within = f"j < {_text(found.keys)}"
    return work.made(
        "attention_decode.py.jinja",
        family="attention",
        units=sizes.mul(shared, sizes.ceildiv(found.keys, "SPLIT")),
        flops=_flops(found),
        tiles=decode_tiles(found.query.dtype, found.d, found.dv),
        extras=(
            Extra("parts", Storage("buffer", parts, "float32", name="parts")),
            Extra("counters", COUNTERS_STORAGE),
        ),
        sizes_used=(found.queries, found.keys, shared, sizes.product(parts)),
        guard=sizes.minimum(*needed) if needed else 1,
        GROUP=found.group,
        QUERIES=queries,
        ROWS=block_rows,
        LIVE=live,
        KEY_HEADS=_text(found.key_heads),
        SQ=_text(found.queries),
        SK=_text(found.keys),
        DV=found.dv,
        cells=" & ".join(filter(None, cells)),
        edge=_keys(work, found, rows, within, f"({within})[None, :]"),
        **_common(work, found, rows, (str(block_rows), str(head_block(found.dv)))),
    )


def _declare(work: Anchored, found: Heads) -> None:
    """The template's variables."""
    for name, extent in (
        ("b", found.batch), ("h", found.heads), ("hk", found.key_heads), ("i", found.queries), ("j", found.keys),
        ("d", found.d), ("e", found.dv),
    ):  # fmt: skip
        work.kernel.variable(name, extent)


def _common(work: Anchored, found: Heads, rows: Mapping[str, Var], result: tuple[str, str]) -> dict[str, Any]:
    """What both templates need besides the keys: queries, scale, precision, and the store of a block of results."""
    d = _column("d", found.d)
    e = _column("e", found.dv)
    query = work.read(found.query, (*found.outer, "i", "d"), {**rows, "d": d}, "query", found.query.dtype)
    name, offset = found.result_offset("e")
    scope = work.scope({**rows, "e": e}, {"acc": ("acc", result)})
    scope.store(name, offset, work.kernel.builder.scalar("acc", "float32"))
    narrow = found.value.dtype != "float32"
    return {
        "query": query,
        "store": work.text(scope),
        "masked": found.mask is not None,
        "scale": dialect.literal(found.scale * (1.0 if found.mask is not None else _LOG2E), "float32"),
        "precision": work.task.precision,
        "narrow": dialect.TYPES[found.value.dtype] if narrow else "",
        "block_d": head_block(found.d),
        "block_dv": head_block(found.dv),
    }


def _keys(work: Anchored, found: Heads, rows: Mapping[str, Var], guard: str, seen: str) -> Keys:
    """The holes of a block of keys, which reaches over the last key where there is a guard."""
    across = Var("j[None, :]", ("1", "BLOCK_N"), f"({guard})[None, :]" if guard else "")
    down = Var("j[:, None]", ("BLOCK_N", "1"), f"({guard})[:, None]" if guard else "")
    shared = {"b": Var("b"), "hk": Var("hk")}
    row = (*found.key_outer, "j")
    d = _column("d", found.d)
    turned = Var("d[:, None]", (d.shape[1], "1"), d.guard.replace("[None, :]", "[:, None]"))
    key = work.read(found.key, (*row, "d"), {**shared, "j": across, "d": turned}, "key", found.query.dtype)
    value = work.read(
        found.value, (*row, "e"), {**shared, "j": down, "e": _column("e", found.dv)}, "value", found.value.dtype
    )
    if found.mask is None:
        return Keys(key, value, "", seen)
    block = next(var.shape[0] for var in rows.values() if var.shape)
    scope = work.scope({**rows, "j": across}, {"score": ("score", (block, "BLOCK_N"))})
    scope.lines.append(f"score = {scope.value(found.masked('i', 'j'))}")
    return Keys(key, value, work.text(scope), seen)


def _column(name: str, extent: int) -> Var:
    """An axis of a head, filled up to a power of two."""
    block = head_block(extent)
    return Var(f"{name}[None, :]", ("1", str(block)), f"({name} < {extent})[None, :]" if block != extent else "")


def _is_dense(work: Anchored, found: Heads) -> bool:
    """Whether the mask has an element of its own for every score of a block, rather than one for every key."""
    if found.mask is None:
        return False
    return "i" in work.kernel.builder.free(found.mask.at((*found.outer, "i", "j")))


def _flops(found: Heads) -> Size:
    return sizes.mul(found.batch, found.heads, found.queries, found.keys, 2 * (found.d + found.dv))


def _power_of_two(least: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(least - 1, 0).bit_length()


def _text(size: Size) -> str:
    """A size in the template, in parentheses where it is compound."""
    text = dialect.size(size)
    return text if isinstance(size, int | str) else f"({text})"

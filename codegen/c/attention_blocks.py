"""How ``attention.c.jinja`` cuts its work: rows of a unit, keys between two updates, number of units."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.sizes import Size, ceildiv, floordiv, mul

PANEL = 32
_MOST_KEYS = 256
_MOST_ROWS = 96
_TILE = 12
_PACKED_WORDS = 16 * 1024  # of keys and values: 64 KB, read again from the second cache for every tile of rows
_SCRATCH_WORDS = 44 * 1024  # 176 KB of stack


@dataclass(frozen=True)
class Blocks:
    """The sizes of a unit's scratch memory.

    Attributes:
        rows: most query rows in one unit, in whole register tiles.
        keys: keys that are packed together, between two updates of a row's maximum and sum.
    """

    rows: int
    keys: int


def blocks(d: int, dv: int, *, bf16: bool = False) -> Blocks:
    """As many keys and rows as the scratch of a unit holds.

    Args:
        d: length of a query and key, 1..256.
        dv: length of a value, 1..256.
        bf16: whether keys and values are packed as words of two bfloat16.

    Raises:
        ValueError: a length is out of range.
    """
    if not (1 <= d <= 256 and 1 <= dv <= 256):
        raise ValueError(f"attention heads of {d} and {dv} elements: the kernel takes 1 to 256")
    columns = -(-dv // PANEL) * PANEL
    depth, per_key = (-(-d // 2), -(-d // 2) + columns // 2) if bf16 else (d, d + columns)
    keys = min(_PACKED_WORDS // per_key // PANEL * PANEL, _MOST_KEYS)
    rows = (_SCRATCH_WORDS - keys * (per_key + _TILE)) // (depth + columns + 2)
    return Blocks(min(rows // _TILE * _TILE, _MOST_ROWS), keys)


def attention_units(batch: Size, heads: Size, queries: Size, found: Blocks, together: Size = 1) -> Size:
    """Units of work: one per batch entry, set of heads whose rows are taken together, and block of their query rows."""
    return mul(batch, floordiv(heads, together), ceildiv(mul(together, queries), found.rows))

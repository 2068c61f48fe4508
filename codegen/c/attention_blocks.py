"""How ``attention.c.jinja`` cuts its work: the rows of a unit, and the number of units."""

from __future__ import annotations

from ...runtime.sizes import Size, ceildiv, mul

PANEL = 32
KEYS = 128
"""Keys between two updates of a row's maximum and sum; the template repeats the number."""

_MOST_ROWS = 96
_TILE = 12
_SCRATCH_FLOATS = 30 * 1024  # 120 KB of stack


def block_rows(d: int, dv: int) -> int:
    """Most query rows in one unit: as many as the scratch of a unit holds, in whole register tiles.

    Args:
        d: length of a query and key, 1..256.
        dv: length of a value, 1..256.

    Raises:
        ValueError: a length is out of range.
    """
    if not (1 <= d <= 256 and 1 <= dv <= 256):
        raise ValueError(f"attention heads of {d} and {dv} elements: the kernel takes 1 to 256")
    columns = -(-dv // PANEL) * PANEL
    per_row = d + columns + KEYS + 2
    rows = (_SCRATCH_FLOATS - PANEL * (d + columns)) // per_row
    return min(rows // _TILE * _TILE, _MOST_ROWS)


def attention_units(batch: Size, heads: Size, queries: Size, d: int, dv: int) -> Size:
    """Units of work: one per batch entry, query head and block of query rows."""
    return mul(batch, heads, ceildiv(queries, block_rows(d, dv)))

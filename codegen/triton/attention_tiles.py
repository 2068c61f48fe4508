"""How the attention kernels cut their work: the binaries for each head length and dtype, the default one first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...runtime.plan import Tile, TileConstant

MOST_KEYS = 128
"""The most keys of a block."""

LEAST_SPLIT = 128
"""The fewest keys that one program takes where keys are split; the scratch memory is sized for it."""


def head_block(length: int) -> int:
    """The head length filled up to what a product takes: a power of two, 16 at least."""
    return max(16, 1 << max(length - 1, 0).bit_length())


def tiles(dtype: str, d: int, dv: int, *, precision: str, dense: bool) -> tuple[Tile, ...]:
    """The binaries of ``attention.py.jinja``.

    Args:
        dtype: of the operands.
        d: length of a query and a key.
        dv: length of a value.
        precision: of products of float32, which take few registers only in tensor cores (``"tf32"``).
        dense: whether the mask has an element for every score, whose addresses take registers as well.
    """
    single = _TF32 if precision == "tf32" else _FLOAT32
    half = _DENSE if dense else _HALF
    table = single if dtype == "float32" else half
    widest = max(head_block(d), head_block(dv))
    rows = next(rows for limit, rows in table.items() if widest <= limit)
    return tuple(
        replace(tile(row.warps, row.stages, BLOCK_M=row.queries, BLOCK_N=row.keys), architectures=row.architectures)
        for row in rows
    )


def decode_tiles(dtype: str, d: int, dv: int) -> tuple[Tile, ...]:
    """The binaries of ``attention_decode.py.jinja``."""
    wide = max(head_block(d), head_block(dv)) * (2 if dtype == "float32" else 1)
    block = 64 if wide <= 128 else 32 if wide <= 256 else 16
    return (
        tile(4, 3, SPLIT=256, BLOCK_N=block),
        tile(4, 3, SPLIT=128, BLOCK_N=block),
        tile(4, 2, SPLIT=512, BLOCK_N=block),
    )


def tile(warps: int, stages: int, **constants: int) -> Tile:
    """A tile named after what it holds, such as ``128x64w4s3``."""
    name = "x".join(map(str, constants.values())) + f"w{warps}s{stages}"
    return Tile(name, tuple(TileConstant(key, value) for key, value in constants.items()), warps, stages)


@dataclass(frozen=True)
class Row:
    """One line of the tables below."""

    queries: int
    keys: int
    warps: int
    stages: int
    architectures: tuple[str, ...] = ()


_HOPPER = ("sm_90",)  # its products read both sides from shared memory, which leaves registers for larger blocks

# Largest head length → tiles. None of the default ones spills on sm_80 or sm_90, and one of each fits 99 KB.
_HALF = {
    64: (Row(128, 64, 8, 3), Row(64, 64, 4, 3), Row(128, 128, 8, 2, _HOPPER)),
    128: (Row(128, 128, 8, 2, _HOPPER), Row(128, 64, 8, 2), Row(128, 32, 8, 2), Row(64, 64, 4, 2, _HOPPER)),
    256: (Row(128, 64, 8, 2, _HOPPER), Row(64, 32, 8, 2)),
}
_DENSE = {
    32: (Row(64, 32, 4, 3), Row(64, 64, 4, 3, _HOPPER)),
    64: (Row(128, 64, 8, 3), Row(64, 64, 4, 3)),
    128: (Row(64, 32, 8, 2), Row(128, 32, 8, 2, _HOPPER)),
    256: (Row(64, 32, 8, 2, _HOPPER), Row(32, 32, 4, 2)),
}
_FLOAT32 = {
    64: (Row(32, 16, 4, 2), Row(32, 32, 4, 2)),
    128: (Row(32, 16, 8, 2), Row(16, 16, 4, 2)),
    256: (Row(16, 16, 4, 2), Row(32, 16, 8, 2)),
}
_TF32 = {
    64: (Row(64, 64, 8, 2), Row(32, 32, 4, 2)),
    128: (Row(32, 32, 4, 2), Row(64, 32, 8, 2)),
    256: (Row(32, 16, 4, 2), Row(32, 16, 8, 2)),
}

"""How the attention kernels cut their work: the binaries for each head length and dtype, the default one first."""

from __future__ import annotations

from ...runtime.plan import Tile, TileConstant

LEAST_SPLIT = 128
"""The fewest keys that one program takes where keys are split; the scratch memory is sized for it."""


def head_block(length: int) -> int:
    """The head length filled up to what a product takes: a power of two, 16 at least."""
    return max(16, 1 << max(length - 1, 0).bit_length())


def tiles(dtype: str, d: int, dv: int) -> tuple[Tile, ...]:
    """The binaries of ``attention.py.jinja`` for operands of a dtype and head lengths."""
    widest = max(head_block(d), head_block(dv))
    shapes = _FLOAT32 if dtype == "float32" else _HALF
    row = next(shapes[limit] for limit in sorted(shapes) if widest <= limit)
    return tuple(tile(warps, stages, BLOCK_M=m, BLOCK_N=n) for m, n, warps, stages in row)


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


# Largest head length -> (queries, keys, warps, stages)
_HALF = {
    32: ((128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    64: ((128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    128: ((128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 2)),
    256: ((64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
}
_FLOAT32 = {
    32: ((64, 32, 4, 2), (32, 32, 4, 2)),
    64: ((64, 32, 4, 2), (32, 32, 4, 2)),
    128: ((32, 32, 4, 2), (64, 32, 8, 2)),
    256: ((16, 32, 4, 2), (32, 16, 8, 1)),
}

"""How matrix products cut their work: the binaries of each kernel, the default one first.

Blocks of operands take ``(BLOCK_M + BLOCK_N) * BLOCK_K * bytes * stages`` of shared memory; those for every
architecture stay below 99 KB, which all have. Blocks follow the extents: what reaches over an edge is computed in vain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.plan import Tile, TileConstant
from ...runtime.sizes import Size

FEW_ROWS = 16
"""Products of so many rows have blocks of the fewest rows that tensor cores take."""

_MANY = 2**31 - 1
_BUSY = 256  # programs that keep a GPU busy
_MOST_PARTIALS = 512  # blocks of partial sums
_PROGRAMS = {"sm_90": 132, "sm_100": 148, "sm_120": 170}  # multiprocessors of the largest GPU of an architecture


@dataclass(frozen=True)
class Extents:
    """A product as far as its tiles depend on it.

    Attributes:
        dtype: of the operands.
        tensor_cores: whether they multiply it.
        batch, m, n, k: sizes.
        ranges: of their symbols.
        descriptors: whether tensor descriptors can read both operands.
    """

    dtype: str
    tensor_cores: bool
    batch: Size
    m: Size
    n: Size
    k: Size
    ranges: Mapping[str, tuple[int, int]]
    descriptors: bool = False

    def least(self, size: Size) -> int:
        """The smallest value of a size."""
        return sizes.bounds(size, self.ranges)[0]

    def most(self, size: Size) -> int:
        """The largest value of a size."""
        return sizes.bounds(size, self.ranges)[1]

    def count(self, block_m: int | str, block_n: int | str) -> Size:
        """Tiles of the result."""
        return sizes.mul(self.batch, sizes.ceildiv(self.m, block_m), sizes.ceildiv(self.n, block_n))


@dataclass(frozen=True)
class _Block:
    """A row of the tables below."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    architectures: tuple[str, ...] = ()


_LARGE = (_Block(128, 128, 64, 8, 3), _Block(64, 128, 64, 4, 3), _Block(64, 64, 64, 4, 4))
_MEDIUM = (_Block(64, 64, 64, 4, 4), _Block(128, 64, 64, 4, 3), _Block(32, 64, 64, 4, 4))
_NARROW = (_Block(64, 32, 64, 4, 4), _Block(128, 32, 64, 4, 4))
_FEW = (_Block(16, 32, 128, 4, 4), _Block(16, 64, 128, 4, 4))
_PERSISTENT = (
    _Block(128, 256, 64, 8, 3, ("sm_90", "sm_100")),
    _Block(128, 128, 64, 8, 4, ("sm_90", "sm_100")),
    _Block(128, 128, 64, 8, 3, ("sm_120",)),
)
# Without tensor cores every thread multiplies its own part of a block: that takes registers, not stages.
_PLAIN = (_Block(64, 64, 16, 8, 2), _Block(32, 32, 32, 4, 2), _Block(128, 64, 16, 8, 2))
# Products with quantized weights, whose rows are BLOCK_N; of terms these are the steps.
_QUANTIZED: tuple[_Block, ...] = (_Block(64, 64, 128, 4, 3), _Block(128, 64, 128, 8, 3), _Block(32, 64, 128, 4, 3))
_QUANTIZED_FEW: tuple[_Block, ...] = (_Block(16, 64, 128, 4, 4), _Block(16, 32, 128, 2, 4))
_QUANTIZED_PLAIN: tuple[_Block, ...] = (_Block(64, 64, 128, 8, 2), _Block(32, 32, 128, 4, 2))
_QUANTIZED_PLAIN_FEW: tuple[_Block, ...] = (_Block(16, 32, 128, 4, 3),)


def matmul_tiles(extents: Extents, *, few: bool) -> tuple[Tile, ...]:
    """The binaries of ``matmul.py.jinja``, all with the same constants.

    Args:
        extents: of the product.
        few: whether it has at most :data:`FEW_ROWS` rows.
    """
    blocks = [_fitted(block, extents) for block in _table(extents, few)]
    first = blocks[0] if few or not extents.tensor_cores else _fitted(_MEDIUM[0], extents)
    split = _split(extents, first)
    persistent = _PERSISTENT if _persists(extents) and not few else ()
    found: dict[str, Tile] = {}

    def add(block: _Block, parts: int = 1, programs: int = _MANY) -> None:
        constants = {"BLOCK_M": block.m, "BLOCK_N": block.n, "BLOCK_K": block.k}
        if split:
            constants["SPLIT_K"] = parts
        if persistent:
            constants |= {"PERSISTENT": int(programs != _MANY), "PROGRAMS": programs}
        name = f"{block.m}x{block.n}x{block.k}w{block.warps}s{block.stages}"
        name += f"k{parts}" * (parts > 1) + f"p{programs}" * (programs != _MANY)
        guard = 1 if parts == 1 else _at_most(extents, extents.count(block.m, block.n), _MOST_PARTIALS // parts)
        values = tuple(TileConstant(key, value) for key, value in constants.items())
        found.setdefault(name, Tile(name, values, block.warps, block.stages, guard, block.architectures))

    for block in [_fitted(block, extents) for block in persistent]:  # first: where costs are equal, they are faster
        for architecture in block.architectures:
            add(_Block(*_sizes(block), (architecture,)), programs=_PROGRAMS[architecture])
    for block in blocks:
        add(block)
    if split:
        add(first, split)
    return tuple(found.values())


def matvec_tiles(extents: Extents, rows: int) -> tuple[Tile, ...]:
    """The binaries of ``matvec.py.jinja`` for at most ``rows`` rows, a power of two.

    The terms of a step are 16 bytes for every thread; columns are few, so that there are programs for the whole GPU.
    """
    step = 32 * (4 if extents.dtype == "float32" else 8)  # terms that a warp loads at once
    k = extents.most(extents.k)
    warps = 4 if k >= 8 * step else 2 if k >= 2 * step else 1
    many = extents.most(extents.n) >= 2048
    columns = [4, 8 if rows <= 2 else 2] if many else [2, 1]
    return tuple(
        Tile(
            f"{rows}x{number}x{warps * step}w{warps}",
            (TileConstant("ROWS", rows), TileConstant("BLOCK_N", number), TileConstant("BLOCK_K", warps * step)),
            warps,
            1,
        )
        for number in columns
    )


def quantized_tiles(extents: Extents, *, few: bool) -> tuple[Tile, ...]:
    """The binaries of ``quantized.py.jinja``, all with the same constants.

    Args:
        extents: of the product; BLOCK_N counts rows of the weight.
        few: whether it has at most :data:`FEW_ROWS` rows.
    """
    tensor, plain = (_QUANTIZED_FEW, _QUANTIZED_PLAIN_FEW) if few else (_QUANTIZED, _QUANTIZED_PLAIN)
    table = tensor if extents.tensor_cores else plain
    split = _split(extents, table[0]) if few else 0
    found = []
    for block, parts in ((table[0], split), *((block, 1) for block in table)) if split else [(b, 0) for b in table]:
        constants = {"BLOCK_M": block.m, "BLOCK_N": block.n} | ({"SPLIT_K": parts} if split else {})
        values = tuple(TileConstant(key, value) for key, value in constants.items())
        name = f"{block.m}x{block.n}w{block.warps}s{block.stages}" + f"k{parts}" * (parts > 1)
        found.append(Tile(name, values, block.warps, block.stages))
    return tuple(found)


def partial_sums(extents: Extents, tiles: tuple[Tile, ...]) -> Size:
    """Elements of the partial sums of all tiles that split, at the sizes that their guards admit."""
    needed: Size = 0
    for tile in tiles:
        values = tile.values()
        parts = values.get("SPLIT_K", 1)
        if parts > 1:
            count = sizes.minimum(extents.count(values["BLOCK_M"], values["BLOCK_N"]), _MOST_PARTIALS // parts)
            needed = sizes.maximum(needed, sizes.mul(count, parts * values["BLOCK_M"] * values["BLOCK_N"]))
    return needed


def _table(extents: Extents, few: bool) -> tuple[_Block, ...]:
    if not extents.tensor_cores:
        return _PLAIN
    if few:
        return _FEW
    if extents.most(extents.n) <= 32:
        return _NARROW
    if extents.most(extents.m) < 128 or extents.most(extents.n) < 128:
        return _MEDIUM
    return _LARGE


def _persists(extents: Extents) -> bool:
    """Whether a result may have enough tiles for programs that take one after the other."""
    return extents.descriptors and extents.most(extents.m) >= 512 and extents.most(extents.n) >= 256


def _fitted(block: _Block, extents: Extents) -> _Block:
    """The block with no more columns and terms than there are, and of float32 half as many terms."""
    k = block.k if extents.dtype != "float32" or not extents.tensor_cores else block.k // 2
    k = min(k, max(16, _power_of_two(extents.most(extents.k))))
    if isinstance(extents.k, int):
        while k > 32 and extents.k % k:  # no masks where a smaller step needs none
            if extents.k % 32:
                break
            k //= 2
    n = min(block.n, max(16, _power_of_two(extents.most(extents.n))))
    m = min(block.m, max(16, _power_of_two(extents.most(extents.m))))
    return _Block(m, n, k, block.warps, block.stages, block.architectures)


def _split(extents: Extents, block: _Block) -> int:
    """By how many programs a tile is shared where there are few tiles and many terms; 0 where that is of no use."""
    tiles = max(extents.least(extents.count(block.m, block.n)), 1)
    if not isinstance(extents.k, int) or tiles > _BUSY // 2:
        return 0
    parts = min(8, _floor_power(_BUSY // tiles), _floor_power(extents.k // (4 * block.k)))
    return parts if parts > 1 else 0


def _at_most(extents: Extents, size: Size, limit: int) -> Size:
    return 1 if extents.most(size) <= limit else sizes.compare("le", size, limit)


def _sizes(block: _Block) -> tuple[int, int, int, int, int]:
    return block.m, block.n, block.k, block.warps, block.stages


def _power_of_two(least: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(least - 1, 0).bit_length()


def _floor_power(most: int) -> int:
    """The largest power of two that is not larger; 0 of 0."""
    return 1 << (most.bit_length() - 1) if most > 0 else 0

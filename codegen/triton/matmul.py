"""The matmul family: linear layers and matrix products through ``matmul.py.jinja`` and ``matvec.py.jinja``.

Operands are read through their index functions, so that views, permutes and conversions before a product cost no
buffer. Constant matrices on the right have contiguous terms: ``linear`` has them so, others are turned when the
artifact is written, and rows are filled up to 16 bytes where that is missing.

How many rows there are decides between the kernels: one that streams the weights past a few rows, one with blocks of
16 rows, and one with large blocks. Where the number varies, they are variants of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from ...runtime import sizes
from ...runtime.plan import Tile
from ...runtime.plan_check import ITEM_BYTES
from ...runtime.sizes import Size
from ..anchors import affine_rows, find_anchor
from ..expr import Expr, Load, coefficient, walk
from ..products import COMPUTED, LINEAR, TARGETS, Product, constant_weight, operands, product_of, unused_without
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from ..values import Value, dtype_name
from . import dialect
from .anchors import Anchored
from .emit import Scope, Var, shape_text
from .frame import COUNTERS, Extra, index_type
from .loops import loop_family
from .matmul_tiles import FEW_ROWS, Extents, matmul_tiles, matvec_tiles, partial_sums

STREAMED_ROWS = {"float32": 8, "float16": 4, "bfloat16": 4}
"""Up to so many rows the weights are streamed; beyond, multiplying takes longer than reading them."""

_ALIGNMENT = 16  # bytes


def matmul_family(task: Task) -> Sequence[Made]:
    """``epilogue(a @ b)`` in all its spellings."""
    anchor = find_anchor(task, TARGETS)
    if dtype_name(anchor.meta["val"].dtype) not in COMPUTED:
        return loop_family(task)
    weight = constant_weight(task, anchor)
    rows = _aligned_rows(task, weight, turned=anchor.target in LINEAR) if weight is not None else None
    return _Family(task, anchor, rows).variants()


@dataclass(frozen=True)
class _Form:
    """A variant of the step: a template's tiles, for at most so many rows (``None``: any number)."""

    limit: int | None
    tiles: tuple[Tile, ...]
    streamed: bool = False


class _Family:
    """The kernels of one product; ``rows`` is the packed weight ``[N, K filled up]``, if there is one."""

    def __init__(self, task: Task, anchor: fx.Node, rows: Storage | None) -> None:
        self.task = task
        self.anchor = anchor
        self.rows = rows
        self.dtype = dtype_name(operands(anchor)[0].meta["val"].dtype)
        skip = unused_without(anchor, operands(anchor)[1]) if rows is not None else []
        self.frame = Frame(task, skip=skip, extra=[rows] if rows is not None else [])

    def variants(self) -> list[Made]:
        """The variants, those for the fewest rows first."""
        kernel = _Kernel(self)
        extents = kernel.extents()
        forms = self._forms(extents, kernel.streams())
        partials = sizes.maximum(0, *(partial_sums(extents, form.tiles) for form in forms))
        # All variants of a step have the same operands, so that the results have the same places.
        extras: tuple[Extra, ...] = ()
        if partials != 0:
            scratch = Storage("buffer", (partials,), "float32", name=f"{self.task.node.name}_partials")
            extras = (Extra("partials", scratch), Extra("counters", COUNTERS))
        return [_Kernel(self).made(form, extras) for form in forms]

    def _forms(self, extents: Extents, streams: bool) -> list[_Form]:
        least, most = extents.least(extents.m), extents.most(extents.m)
        forms = []
        streamed = STREAMED_ROWS[self.dtype]
        if streams and least <= streamed:
            # One row alone is so common that it has a kernel of its own where the number varies.
            limits = [1, streamed] if least <= 1 < most else [streamed]
            for limit in limits:
                rows = 1 << max(min(limit, most) - 1, 0).bit_length()
                forms.append(_Form(limit, matvec_tiles(extents, rows), streamed=True))
        if least <= FEW_ROWS and extents.tensor_cores and not (streams and most <= streamed):
            forms.append(_Form(FEW_ROWS, matmul_tiles(extents, few=True)))
        if not forms or most > (forms[-1].limit or 0):
            forms.append(_Form(None, matmul_tiles(extents, few=False)))
        return forms


class _Kernel:
    """One kernel of a family: the holes of its template."""

    def __init__(self, family: _Family) -> None:
        self.family = family
        self.work = Anchored(family.task, family.anchor, family.frame)
        self.product: Product = product_of(self.work)
        self.w, self.w_terms = self._right()
        self.entry: Size = 0 if self.product.batch == 1 else "b"

    def _right(self) -> tuple[Value, Size]:
        """The right operand as ``[b, k, n]``, and how many terms can be read of it (zeros fill up rows)."""
        rows, product = self.family.rows, self.product
        if rows is None:
            return product.right(), product.k
        buffer = self.work.kernel.buffer(self.family.frame.name(rows), rows.shape, rows.dtype)
        shape = (product.batch, product.k, product.n)
        return Value(shape, buffer.dtype, lambda index, mask: buffer.at((index[2], index[1]), mask)), rows.shape[1]

    def extents(self) -> Extents:
        """What the tiles depend on."""
        product, task = self.product, self.family.task
        tensor_cores = self.family.dtype != "float32" or task.precision != "ieee"
        return Extents(
            self.family.dtype, tensor_cores, product.batch, product.m, product.n, product.k, task.symbols.ranges,
            descriptors=tensor_cores and self.tensors() is not None,
        )  # fmt: skip

    def streams(self) -> bool:
        """Whether the terms of a column of the right operand are contiguous."""
        return affine_rows(self.w.at((self.entry, "k", "n")), "n", "k") is not None

    def tensors(self) -> tuple[dict[str, object], dict[str, object]] | None:
        """Both operands for tensor descriptors, where they are rows of contiguous elements, 16 bytes aligned."""
        product, task = self.product, self.family.task
        if product.batch != 1 or not isinstance(product.k, int) or not isinstance(product.n, int) or product.k == 0:
            return None
        if index_type(self.family.frame.parameters, task.symbols.ranges, product.m) != "i32":
            return None
        a = self._tensor(product.a.at((self.entry, "m", "k")), "m", "k", product.m, product.k)
        weight = self.w.at((self.entry, "k", "n"))
        w = self._tensor(weight, "n", "k", product.n, product.k) or self._tensor(weight, "k", "n", product.k, product.n)
        return (a, w) if a is not None and w is not None else None

    def _tensor(self, expr: Expr, row: str, column: str, rows: Size, columns: Size) -> dict[str, object] | None:
        found = affine_rows(expr, row, column)
        if found is None or self.work.kernel.storage[found[0]] != self.family.dtype:
            return None
        buffer, start, stride = found
        unit = _ALIGNMENT // ITEM_BYTES[self.family.dtype]
        if not isinstance(start, int) or not isinstance(stride, int) or start % unit or stride % unit or stride <= 0:
            return None
        base = f"{buffer} + {start}" if start else buffer
        shape = {"rows": dialect.size(rows), "columns": dialect.size(columns)}
        return {"base": base, **shape, "stride": stride, "turned": (row, column) == ("n", "k")}

    def made(self, form: _Form, extras: Sequence[Extra]) -> Made:
        """The kernel of one variant."""
        product = self.product
        limit = form.limit
        ranges = self.family.task.symbols.ranges
        always = limit is None or sizes.bounds(product.m, ranges)[1] <= limit
        constants = form.tiles[0].values()
        units = sizes.mul(product.batch, sizes.ceildiv(product.n, "BLOCK_N"))
        context: dict[str, object]
        if form.streamed:
            template, context = "matvec.py.jinja", self._matvec(form.tiles)
        else:
            template, context = "matmul.py.jinja", self._matmul(form.tiles, "SPLIT_K" in constants)
            units = sizes.mul(units, sizes.ceildiv(product.m, "BLOCK_M"))
        if "SPLIT_K" in constants:
            units = sizes.mul(units, "SPLIT_K")
        if "PERSISTENT" in constants:
            template, units = "matmul_both.py.jinja", sizes.minimum(units, "PROGRAMS")
            context |= {
                "tensors": self.tensors(),
                "epilogue_half": self._epilogue(form.tiles, "BLOCK_M", "BLOCK_N // 2"),
            }
        return self.work.made(
            template,
            family="matmul",
            units=units,
            flops=product.flops,
            tiles=form.tiles,
            extras=extras,
            sizes_used=(product.batch, product.m, product.n, product.k),
            guard=1 if always or limit is None else sizes.compare("le", product.m, limit),
            BATCH=_text(product.batch),
            M=_text(product.m),
            N=_text(product.n),
            K=_text(product.k),
            **context,
        )

    def _matmul(self, tiles: Sequence[Tile], split: bool) -> dict[str, object]:
        product = self.product
        a, w = product.a.at((self.entry, "m", "k")), self.w.at((self.entry, "k", "n"))
        m, clamp_m = self._axis("m", "row", product.m, "BLOCK_M", tiles, a)
        n, clamp_n = self._axis("n", "column", product.n, "BLOCK_N", tiles, w)
        k = _Axis("k", "BLOCK_K", _guard("k", product.k, "BLOCK_K", tiles))
        w_k = _Axis("k", "BLOCK_K", _guard("k", self.w_terms, "BLOCK_K", tiles))
        place = {"b": Var("b")}
        return {
            "read_a": self._read(a, place | {"m": m.at(0, 2), "k": k.at(1, 2)}, "a", ("BLOCK_M", "BLOCK_K")),
            "read_w": self._read(w, place | {"k": w_k.at(0, 2), "n": n.at(1, 2)}, "w", ("BLOCK_K", "BLOCK_N")),
            "epilogue": self._epilogue(tiles, "BLOCK_M"),
            "clamp_m": clamp_m,
            "clamp_n": clamp_n,
            "precision": self.family.task.precision,
            "split": split,
        }

    def _matvec(self, tiles: Sequence[Tile]) -> dict[str, object]:
        product = self.product
        builder = self.work.kernel.builder
        a, w = (
            builder.cast(value.at(index), "float32")
            for value, index in ((product.a, (self.entry, "m", "k")), (self.w, (self.entry, "k", "n")))
        )
        m, clamp_m = self._axis("m", "row", product.m, "ROWS", tiles, a)
        n, clamp_n = self._axis("n", "column", product.n, "BLOCK_N", tiles, w)
        k = _Axis("k", "BLOCK_K", _guard("k", product.k, "BLOCK_K", tiles))
        w_k = _Axis("k", "BLOCK_K", _guard("k", self.w_terms, "BLOCK_K", tiles))
        place = {"b": Var("b")}
        rows, columns = ("ROWS", "1", "BLOCK_K"), ("1", "BLOCK_N", "BLOCK_K")
        return {
            "read_a": self._read(a, place | {"m": m.at(0, 3), "k": k.at(2, 3)}, "a", rows, "float32"),
            "read_w": self._read(w, place | {"k": w_k.at(2, 3), "n": n.at(1, 3)}, "w", columns, "float32"),
            "epilogue": self._epilogue(tiles, "ROWS"),
            "clamp_m": clamp_m,
            "clamp_n": clamp_n,
        }

    def _axis(
        self, name: str, clamped: str, extent: Size, block: str, tiles: Sequence[Tile], expr: Expr
    ) -> tuple[_Axis, bool]:
        """An axis of the result as operands read it, and whether that is the clamped name.

        What reaches over the end need not be masked, as it is not stored: reading the last element again does. Only
        along contiguous elements a mask is better, which leaves them contiguous.
        """
        guard = _guard(name, extent, block, tiles)
        if not guard or self._contiguous(expr, name):
            return _Axis(name, block, guard), False
        return _Axis(name, block, "", clamped), True

    def _contiguous(self, expr: Expr, name: str) -> bool:
        nodes = walk(self.work.kernel.builder, [expr])
        return any(isinstance(node, Load) and coefficient(node.offset, name) == 1 for node in nodes)

    def _read(
        self, expr: Expr, variables: dict[str, Var], name: str, shape: tuple[str, ...], dtype: str | None = None
    ) -> str:
        """A hole that assigns a block of an operand: zeros beyond the last term, whatever a prologue makes there."""
        scope = self.work.scope(variables)
        dtype = dtype or self.family.dtype
        text = _filled(scope, expr, scope.raw(expr, dtype), shape, dtype)
        guard = variables["k"].guard
        if guard and not (isinstance(expr, Load) and not expr.other):
            text = f"tl.where({guard}, {text}, 0.0)"
        scope.lines.append(f"{name} = {text}")
        return self.work.text(scope)

    def _epilogue(self, tiles: Sequence[Tile], block_m: str, block_n: str = "BLOCK_N") -> str:
        product = self.product
        m = _Axis("m", block_m, _guard("m", product.m, block_m, tiles))
        n = _Axis("n", block_n, _guard("n", product.n, "BLOCK_N", tiles))
        variables = {"b": Var("b"), "m": m.at(0, 2), "n": n.at(1, 2)}
        return self.work.epilogue(product.index, variables, product.added, (block_m, block_n))


@dataclass(frozen=True)
class _Axis:
    """One axis of a block: its variable, extent and mask, and the name that it is read by."""

    name: str
    block: str
    guard: str
    read: str = ""

    def at(self, place: int, rank: int) -> Var:
        """The variable as axis ``place`` of blocks of a rank."""
        spread = "[" + ", ".join(":" if axis == place else "None" for axis in range(rank)) + "]"
        shape = tuple(self.block if axis == place else "1" for axis in range(rank))
        return Var(f"{self.read or self.name}{spread}", shape, f"({self.guard}){spread}" if self.guard else "")


def _guard(name: str, extent: Size, block: str, tiles: Sequence[Tile]) -> str:
    """The mask of an axis, empty where all tiles divide its extent."""
    if isinstance(extent, int) and all(extent % tile.values()[block] == 0 for tile in tiles):
        return ""
    return f"{name} < {_text(extent)}"


def _filled(scope: Scope, expr: Expr, text: str, shape: tuple[str, ...], dtype: str) -> str:
    """A value as a whole block: an operand that does not depend on all axes has fewer."""
    own = scope.shape(expr)
    if own == shape:
        return text
    if not own:
        return f"tl.full({shape_text(shape)}, {text}, {dialect.TYPES[dtype]})"
    return f"tl.broadcast_to({text}, {shape_text(shape)})"


def _aligned_rows(task: Task, weight: Storage, *, turned: bool) -> Storage | None:
    """A constant matrix as ``[N, K]`` with rows of whole 16 bytes, zeros at their ends; ``None`` where it lies so.

    Args:
        task: of the region.
        weight: of rank 2.
        turned: whether it lies as ``[N, K]``, as in ``linear``, else as ``[K, N]``.
    """
    n, k = weight.shape if turned else weight.shape[::-1]
    assert isinstance(n, int) and isinstance(k, int)
    row = int(sizes.align(k, _ALIGNMENT // ITEM_BYTES[weight.dtype]))  # type: ignore[arg-type]
    if turned and row == k:
        return None

    def pack(matrix: np.ndarray) -> np.ndarray:
        rows = np.zeros((n, row), matrix.dtype)
        rows[:, :k] = matrix if turned else matrix.T
        return rows

    return task.packed(weight, Packing("rows" if turned else "columns", (n, row), pack, weight.dtype))


def _text(size: Size) -> str:
    """A size in the template, in parentheses where it is compound."""
    text = dialect.size(size)
    return text if isinstance(size, int | str) else f"({text})"

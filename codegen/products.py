"""What the matmul families of all dialects share: a matrix product as ``sum over k of a[b, m, k] * w[b, k, n]``.

``linear``, ``mm``, ``bmm``, ``matmul``, ``addmm``, ``baddbmm`` and ``_int_mm`` differ in how their operands and results
spell the four variables. A product with a matrix or a vector on the right has one batch entry, and its rows are all
leading axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..runtime import sizes
from ..runtime.sizes import Size
from .anchors import Anchored
from .expr import Expr
from .regions import Task
from .registry import overloads
from .storage import Storage
from .values import Kernel, Value, broadcast, reshape

LINEAR = frozenset(overloads("linear"))
PRODUCTS = frozenset(overloads("mm", "bmm", "matmul"))
ADDED = frozenset(overloads("addmm", "baddbmm"))
INTEGER = frozenset(overloads("_int_mm"))
"""int8 by int8 to int32."""
TARGETS = LINEAR | PRODUCTS | ADDED | INTEGER
COMPUTED = ("float32", "float16", "bfloat16")
"""Dtypes that the templates multiply; others are plain reductions."""


def operands(anchor: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(left, right, addend) of the product."""
    args = list(anchor.args)
    if anchor.target in ADDED:
        return args[1], args[2], args[0]  # type: ignore[return-value]
    addend = args[2] if anchor.target in LINEAR and len(args) > 2 else None
    return args[0], args[1], addend  # type: ignore[return-value]


def constant_weight(task: Task, anchor: fx.Node) -> Storage | None:
    """The right operand's storage where it is a matrix known when compiling, which can then be packed."""
    right = operands(anchor)[1]
    storage = task.storage_of(right) if right.op == "placeholder" else None
    return storage if storage is not None and storage.recipe is not None and len(storage.shape) == 2 else None


def unused_without(anchor: fx.Node, right: fx.Node) -> list[fx.Node]:
    """The right operand, if nothing but the product reads it: a kernel with packed weights does not take it."""
    return [] if any(user is not anchor for user in right.users) else [right]


@dataclass
class Product:
    """A product inside a kernel that has the variables ``b``, ``m``, ``n`` and ``k``.

    Attributes:
        work: the region.
        batch_shape: its product is the extent of ``b``.
        m, n, k: rows, columns and terms.
        a: the left operand as ``[b, m, k]``.
        index: the result's logical index in terms of ``b``, ``m`` and ``n``.
    """

    work: Anchored
    batch_shape: tuple[Size, ...]
    m: Size
    n: Size
    k: Size
    a: Value
    index: tuple[Size, ...]

    @property
    def batch(self) -> Size:
        """The extent of ``b``."""
        return sizes.product(self.batch_shape)

    @property
    def flops(self) -> Size:
        """Arithmetic operations of the product alone."""
        return sizes.mul(self.batch, self.m, self.n, self.k, 2)

    def right(self) -> Value:
        """The right operand as ``[b, k, n]``."""
        anchor = self.work.anchor
        b = self.work.operand(operands(anchor)[1])
        assert b is not None
        shape = (self.batch, self.k, self.n)
        if anchor.target in LINEAR:
            if len(b.shape) == 1:
                return Value(shape, b.dtype, lambda index, mask: b.at((index[1],), mask))
            return Value(shape, b.dtype, lambda index, mask: b.at((index[2], index[1]), mask))
        if len(b.shape) == 1:
            return Value(shape, b.dtype, lambda index, mask: b.at((index[1],), mask))
        return reshape(self.work.kernel, broadcast(b, (*self.batch_shape, self.k, self.n)), shape)

    def added(self, product: Expr) -> Expr:
        """The anchor's value, given the sum of products: with its bias, or ``beta * addend + alpha * product``."""
        anchor, builder, region = self.work.anchor, self.work.kernel.builder, self.work.region
        added = self.work.operand(operands(anchor)[2])
        if added is None:
            return product
        beta, alpha = (anchor.kwargs.get(name, 1) for name in ("beta", "alpha"))
        term = builder.cast(broadcast(added, self.work.shape()).at(self.index), "float32")
        if alpha != 1:
            product = builder.call("mul", "float32", product, region.number(alpha, "float32"))
        if beta == 0:
            return product
        if beta != 1:
            term = builder.call("mul", "float32", term, region.number(beta, "float32"))
        return builder.call("add", "float32", product, term)


def product_of(work: Anchored) -> Product:
    """The product that a region is built around; declares its variables in the region's kernel."""
    left, right, _ = operands(work.anchor)
    kernel, shape = work.kernel, work.shape()
    a = work.operand(left)
    assert a is not None
    wide = _has_batch(work.anchor, right)
    if not wide:
        batch_shape: tuple[Size, ...] = ()
        has_columns = right.meta["val"].dim() == 2
        rows, n = (shape[:-1], shape[-1]) if has_columns else (shape, 1)
        lead: tuple[Size, ...] = a.shape[:-1]
    else:
        has_columns, n = True, shape[-1]
        has_rows = len(a.shape) > 1
        batch_shape = shape[:-2] if has_rows else shape[:-1]
        rows = lead = (a.shape[-2],) if has_rows else (1,)
    m, k, batch = sizes.product(rows), a.shape[-1], sizes.product(batch_shape)
    for name, extent in (("b", batch), ("m", m), ("n", n), ("k", k)):
        kernel.variable(name, extent)
    if wide:
        index = (*unflatten(kernel, "b", batch_shape), *(("m", "n") if len(a.shape) > 1 else ("n",)))
    else:
        index = (*unflatten(kernel, "m", rows), *(("n",) if has_columns else ()))
    flat = reshape(kernel, broadcast(a, (*batch_shape, *lead, k)), (batch, m, k))
    return Product(work, batch_shape, m, n, k, flat, index)


def _has_batch(anchor: fx.Node, right: fx.Node) -> bool:
    return anchor.target not in LINEAR and right.meta["val"].dim() > 2


def unflatten(kernel: Kernel, flat: Size, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The index in a shape of the element with the number ``flat``."""
    index: list[Size] = []
    for extent in reversed(shape[1:]):
        flat, inner = kernel.split(flat, extent)
        index.append(inner)
    if shape:
        index.append(0 if shape[0] == 1 else flat)
    return tuple(reversed(index))

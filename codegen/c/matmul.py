"""The matmul family: linear layers and matrix products through ``matmul.c.jinja``.

A constant right-hand side is packed into panels when the artifact is written; any other is packed by the kernel. The
left operand is read in place where its rows are contiguous in memory, otherwise gathered tile by tile through its
index function, which is how views, permutes and conversions before a product cost no buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from ...runtime import sizes
from ...runtime.sizes import Size
from ..anchors import affine_rows, find_anchor
from ..expr import Expr
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..registry import overloads
from ..storage import Packing, Storage
from ..values import Kernel, Value, broadcast, dtype_name, reshape
from .anchors import Anchored, c_size
from .loops import loop_family
from .packing import PANEL, matmul_units, pack_matmul

LINEAR = frozenset(overloads("linear"))
PRODUCTS = frozenset(overloads("mm", "bmm", "matmul"))
ADDED = frozenset(overloads("addmm", "baddbmm"))
_COMPUTED = ("float32", "float16", "bfloat16")
TARGETS = LINEAR | PRODUCTS | ADDED


def matmul_family(task: Task) -> Sequence[Made]:
    """``epilogue(a @ b)`` in all its spellings."""
    anchor = find_anchor(task, TARGETS)
    if dtype_name(anchor.meta["val"].dtype) not in _COMPUTED:
        return loop_family(task)
    left, right, addend = _operands(anchor)
    storage = task.storage_of(right) if right.op == "placeholder" else None
    k, n = _inner(task, left), _columns(task, anchor)
    packed: Storage | None = None
    if storage is not None and storage.recipe is not None and len(storage.shape) == 2:
        assert isinstance(k, int) and isinstance(n, int)
        packed = task.packed(storage, panel_packing(n, k, transposed=anchor.target in LINEAR))
    skip = [right] if packed is not None and not _used_elsewhere(right, anchor) else []
    frame = Frame(task, skip=skip, extra=[packed] if packed is not None else [])
    return [Made(_build(task, anchor, frame, left, right, addend, packed), frame.storages)]


def panel_packing(n: int, k: int, *, transposed: bool) -> Packing:
    """Panels of a weight that lies as ``[N, K]`` (transposed, as in ``linear``) or ``[K, N]``."""

    def pack(weight: np.ndarray) -> np.ndarray:
        weight = weight.astype(np.float32, copy=False)
        return pack_matmul(weight.T if transposed else weight)

    name = f"panels{PANEL}" + ("t" if transposed else "")
    return Packing(name, (-(-n // PANEL), k, PANEL), pack)


def _operands(anchor: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """(left, right, addend) of the product."""
    args = list(anchor.args)
    if anchor.target in ADDED:
        return args[1], args[2], args[0]  # type: ignore[return-value]
    addend = args[2] if anchor.target in LINEAR and len(args) > 2 else None
    return args[0], args[1], addend  # type: ignore[return-value]


def _used_elsewhere(node: fx.Node, anchor: fx.Node) -> bool:
    return any(user is not anchor for user in node.users)


def _inner(task: Task, left: fx.Node) -> Size:
    return task.symbols.shape(left.meta["val"])[-1]


def _columns(task: Task, anchor: fx.Node) -> Size:
    shape = task.symbols.shape(anchor.meta["val"])
    return shape[-1] if shape else 1


def _build(
    task: Task,
    anchor: fx.Node,
    frame: Frame,
    left: fx.Node,
    right: fx.Node,
    addend: fx.Node | None,
    packed: Storage | None,
) -> KernelCode:
    work = Anchored(task, anchor, frame)
    kernel, builder = work.kernel, work.kernel.builder
    shape = work.shape()
    a = work.operand(left)
    assert a is not None
    batch_shape, m, n, k = _extents(anchor, a, shape, right, task)
    batch = sizes.product(batch_shape)
    for name, extent in (("b", batch), ("m", m), ("n", n), ("k", k)):
        kernel.variable(name, extent)

    a_rows = reshape(kernel, broadcast(a, (*batch_shape, *_rows_shape(anchor, a, shape), k)), (batch, m, k))
    context: dict[str, object] = {}
    direct = affine_rows(a_rows.at(("b", "m", "k")), "m", "k")
    if direct is not None and kernel.storage[direct[0]] == "float32":
        buffer, start, stride = direct
        context |= {"a_direct": True, "a_base": f"{buffer} + {_text(start)}", "a_stride": c_size(stride)}
    else:
        context["pack_a"] = work.read(a_rows, ("b", "m", "k"), ("b", "m"), "k", "a_value")
    if packed is not None:
        context |= {"b_packed": True, "b_base": frame.name(packed)}
    else:
        b = work.operand(right)
        assert b is not None
        b_rows = _right(work, anchor, b, batch_shape, batch, k, n)
        context["pack_b"] = work.read(b_rows, ("b", "k", "n"), ("b", "k"), "n", "b_value")

    index = _result_index(work, anchor, batch_shape, shape, m, n)
    added = work.operand(addend)

    def acc(product: Expr) -> Expr:
        if added is None:
            return product
        beta, alpha = (anchor.kwargs.get(name, 1) for name in ("beta", "alpha"))
        term = builder.cast(broadcast(added, shape).at(index), "float32")
        if alpha != 1:
            product = builder.call("mul", "float32", product, work.region.number(alpha, "float32"))
        if beta == 0:
            return product
        if beta != 1:
            term = builder.call("mul", "float32", term, work.region.number(beta, "float32"))
        return builder.call("add", "float32", product, term)

    epilogue = work.epilogue(index, ("b", "m"), "n", acc)
    return work.code(
        "matmul.c.jinja",
        family="matmul",
        units=matmul_units(batch, m, n),
        flops=sizes.mul(batch, m, n, k, 2),
        BATCH=c_size(batch),
        M=c_size(m),
        N=c_size(n),
        K=c_size(k),
        epilogue=epilogue,
        **context,
    )


def _extents(
    anchor: fx.Node, a: Value, shape: tuple[Size, ...], right: fx.Node, task: Task
) -> tuple[tuple[Size, ...], Size, Size, Size]:
    """(batch shape, rows, columns, inner extent). A product with a matrix on the right has one batch entry."""
    right_rank = right.meta["val"].dim()
    k = a.shape[-1]
    if anchor.target in LINEAR or right_rank <= 2:
        n = shape[-1] if right_rank == 2 and shape else 1
        rows = shape[:-1] if right_rank == 2 else shape
        return (), sizes.product(rows), n, k
    if len(a.shape) == 1:
        return shape[:-1], 1, shape[-1], k
    return shape[:-2], shape[-2], shape[-1], k


def _rows_shape(anchor: fx.Node, a: Value, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The part of the left operand's shape that makes up the rows."""
    right_rank = anchor.args[2 if anchor.target in ADDED else 1].meta["val"].dim()  # type: ignore[union-attr]
    if anchor.target in LINEAR or right_rank <= 2:
        return a.shape[:-1]
    return (1,) if len(a.shape) == 1 else (a.shape[-2],)


def _right(
    work: Anchored, anchor: fx.Node, b: Value, batch_shape: tuple[Size, ...], batch: Size, k: Size, n: Size
) -> Value:
    """The right operand as ``[batch, k, n]``."""
    kernel = work.kernel
    if anchor.target in LINEAR:
        turned = b
        return Value((batch, k, n), b.dtype, lambda index, mask: turned.at((index[2], index[1]), mask))
    if len(b.shape) == 1:
        return Value((batch, k, n), b.dtype, lambda index, mask: b.at((index[1],), mask))
    return reshape(kernel, broadcast(b, (*batch_shape, k, n)), (batch, k, n))


def _result_index(
    work: Anchored, anchor: fx.Node, batch_shape: tuple[Size, ...], shape: tuple[Size, ...], m: Size, n: Size
) -> tuple[Size, ...]:
    """The result's logical index in terms of b, m and n."""
    kernel = work.kernel
    right_rank = anchor.args[2 if anchor.target in ADDED else 1].meta["val"].dim()  # type: ignore[union-attr]
    if anchor.target in LINEAR or right_rank <= 2:
        rows = shape[:-1] if right_rank == 2 else shape
        lead = _unflatten(kernel, "m", rows)
        return (*lead, "n") if right_rank == 2 else lead
    lead = _unflatten(kernel, "b", batch_shape)
    return (*lead, "n") if len(anchor.args[0].meta["val"].shape) == 1 else (*lead, "m", "n")  # type: ignore[union-attr]


def _unflatten(kernel: Kernel, flat: Size, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    index: list[Size] = []
    for extent in reversed(shape[1:]):
        flat, inner = kernel.split(flat, extent)
        index.append(inner)
    if shape:
        index.append(0 if shape[0] == 1 else flat)
    return tuple(reversed(index))


def _text(size: Size) -> str:
    return str(c_size(size))

"""The matmul family: linear layers and matrix products through ``matmul.c.jinja``.

A constant right-hand side is packed into panels when the artifact is written; any other is packed by the kernel. The
left operand is read in place where its rows are contiguous in memory, otherwise gathered tile by tile through its
index function, which is how views, permutes and conversions before a product cost no buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from ...runtime.sizes import Size
from ..anchors import affine_rows, find_anchor
from ..kernel import KernelCode
from ..products import ADDED, COMPUTED, LINEAR, PRODUCTS, TARGETS, constant_weight, operands, product_of, unused_without
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from ..values import dtype_name
from .anchors import Anchored, c_size
from .loops import loop_family
from .packing import PANEL, matmul_units, pack_matmul

__all__ = ["ADDED", "LINEAR", "PRODUCTS", "TARGETS", "matmul_family", "panel_packing"]


def matmul_family(task: Task) -> Sequence[Made]:
    """``epilogue(a @ b)`` in all its spellings."""
    anchor = find_anchor(task, TARGETS)
    if dtype_name(anchor.meta["val"].dtype) not in COMPUTED:
        return loop_family(task)
    weight = constant_weight(task, anchor)
    packed: Storage | None = None
    if weight is not None:
        transposed = anchor.target in LINEAR
        n, k = weight.shape if transposed else weight.shape[::-1]
        assert isinstance(k, int) and isinstance(n, int)
        packed = task.packed(weight, panel_packing(n, k, transposed=transposed))
    skip = unused_without(anchor, operands(anchor)[1]) if packed is not None else []
    frame = Frame(task, skip=skip, extra=[packed] if packed is not None else [])
    return [Made(_build(task, anchor, frame, packed), frame.storages)]


def panel_packing(n: int, k: int, *, transposed: bool) -> Packing:
    """Panels of a weight that lies as ``[N, K]`` (transposed, as in ``linear``) or ``[K, N]``."""

    def pack(weight: np.ndarray) -> np.ndarray:
        weight = weight.astype(np.float32, copy=False)
        return pack_matmul(weight.T if transposed else weight)

    name = f"panels{PANEL}" + ("t" if transposed else "")
    return Packing(name, (-(-n // PANEL), k, PANEL), pack)


def _build(task: Task, anchor: fx.Node, frame: Frame, packed: Storage | None) -> KernelCode:
    work = Anchored(task, anchor, frame)
    product = product_of(work)
    context: dict[str, object] = {}
    direct = affine_rows(product.a.at(("b", "m", "k")), "m", "k")
    if direct is not None and work.kernel.storage[direct[0]] == "float32":
        buffer, start, stride = direct
        context |= {"a_direct": True, "a_base": f"{buffer} + {_text(start)}", "a_stride": c_size(stride)}
    else:
        context["pack_a"] = work.read(product.a, ("b", "m", "k"), ("b", "m"), "k", "a_value")
    if packed is not None:
        context |= {"b_packed": True, "b_base": frame.name(packed)}
    else:
        context["pack_b"] = work.read(product.right(), ("b", "k", "n"), ("b", "k"), "n", "b_value")
    epilogue = work.epilogue(product.index, ("b", "m"), "n", product.added)
    return work.code(
        "matmul.c.jinja",
        family="matmul",
        units=matmul_units(product.batch, product.m, product.n),
        flops=product.flops,
        BATCH=c_size(product.batch),
        M=c_size(product.m),
        N=c_size(product.n),
        K=c_size(product.k),
        epilogue=epilogue,
        **context,
    )


def _text(size: Size) -> str:
    return str(c_size(size))

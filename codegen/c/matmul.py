"""The matmul family: linear layers and matrix products through ``matmul.c.jinja``.

A constant right-hand side is packed into panels when the artifact is written; any other is packed by the kernel. The
left operand is read in place where its rows are contiguous in memory, otherwise gathered tile by tile through its
index function, which is how views, permutes and conversions before a product cost no buffer.

Products of bfloat16 are taken of bfloat16 and summed in float32, those of int8 summed in int32; all others are taken in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from ...runtime import sizes
from ..anchors import affine_rows, find_anchor
from ..kernel import KernelCode
from ..products import (
    ADDED,
    COMPUTED,
    INTEGER,
    LINEAR,
    PRODUCTS,
    TARGETS,
    Product,
    constant_weight,
    operands,
    product_of,
    unused_without,
)
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from ..values import dtype_name, panel_layout
from .anchors import Anchored, c_size
from .blocking import Blocking, Problem, alternatives, choose
from .loops import loop_family
from .packing import PANEL, matmul_units, pack_bytes, pack_matmul, pack_words

__all__ = ["ADDED", "INTEGER", "LINEAR", "PRODUCTS", "TARGETS", "matmul_family", "panel_packing"]

_PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}
_PACK = {"float32": pack_matmul, "bfloat16": pack_words, "int8": pack_bytes}


def matmul_family(task: Task) -> Sequence[Made]:
    """``epilogue(a @ b)`` in all its spellings."""
    anchor = find_anchor(task, TARGETS)
    kind = _kind(anchor)
    if kind is None:
        return loop_family(task)
    weight = constant_weight(task, anchor)
    panel = PANEL if kind == "float32" else task.panel
    packed: Storage | None = None
    if weight is not None:
        transposed = anchor.target in LINEAR
        n, k = weight.shape if transposed else weight.shape[::-1]
        assert isinstance(k, int) and isinstance(n, int)
        packed = task.packed(weight, panel_packing(n, k, transposed=transposed, kind=kind, panel=panel))
    skip = unused_without(anchor, operands(anchor)[1]) if packed is not None else []
    frame = Frame(task, skip=skip, extra=[packed] if packed is not None else [])
    problem, code = _build(task, anchor, frame, packed, kind, panel)
    others = [code(blocking) for blocking in alternatives(problem, task.tuned_for)]
    return [Made(code(choose(problem)), frame.storages, others=tuple(others))]


def panel_packing(n: int, k: int, *, transposed: bool, kind: str = "float32", panel: int = PANEL) -> Packing:
    """Panels of a weight that lies as ``[N, K]`` (transposed, as in ``linear``) or ``[K, N]``.

    Args:
        n: columns.
        k: terms.
        transposed: how it lies.
        kind: the dtype that it is multiplied in: ``float32``, ``bfloat16`` or ``int8``.
        panel: columns of a panel.
    """

    def pack(weight: np.ndarray) -> np.ndarray:
        return _PACK[kind](weight.T if transposed else weight, panel)

    per = _PER_WORD[kind]
    panels, words = -(-n // panel), -(-k // per) + (kind == "int8")
    shape = (panels, words, panel) if per == 1 else (panels, words, panel, per)
    layout = panel_layout(panel, per) if transposed and kind != "int8" else ""
    return Packing(f"panels{panel}" + ("t" if transposed else ""), shape, pack, kind, layout)


def _kind(anchor: fx.Node) -> str | None:
    """The dtype that the operands are multiplied in; ``None`` where the template has none for them."""
    dtypes = {dtype_name(operand.meta["val"].dtype) for operand in operands(anchor)[:2] if operand is not None}
    if anchor.target in INTEGER:
        return "int8" if dtypes == {"int8"} else None
    if dtype_name(anchor.meta["val"].dtype) not in COMPUTED:
        return None
    return "bfloat16" if dtypes == {"bfloat16"} else "float32"


def _build(
    task: Task, anchor: fx.Node, frame: Frame, packed: Storage | None, kind: str, panel: int
) -> tuple[Problem, Callable[[Blocking], KernelCode]]:
    """What is to be blocked, and the kernel for a blocking."""
    work = Anchored(task, anchor, frame)
    product = product_of(work)
    computed = "int32" if kind == "int8" else "float32"
    context = _left_in_place(work, product, kind)
    left = _left(context, kind)
    if not context:
        context["pack_a"] = work.read(product.a, ("b", "m", "k"), ("b", "m"), "k", "a_value", computed)
    if packed is not None:
        context |= {"b_packed": True, "b_base": frame.name(packed)}
    else:
        context["pack_b"] = work.read(product.right(), ("b", "k", "n"), ("b", "k"), "n", "b_value", computed)
    epilogue = work.epilogue(product.index, ("b", "m"), "n", product.added, computed)
    words = sizes.ceildiv(product.k, _PER_WORD[kind])
    stride = context.get("a_stride")
    apart = stride // _PER_WORD[kind] if isinstance(stride, int) else 0
    problem = Problem(product.batch, product.m, product.n, words, left, packed is not None, apart, panel, kind)

    def code(blocking: Blocking) -> KernelCode:
        code = work.code(
            "matmul.c.jinja",
            family="matmul",
            units=matmul_units(product.batch, product.m, product.n, blocking.block, panel),
            flops=product.flops,
            kind=kind,
            panel=panel,
            BATCH=c_size(product.batch),
            M=c_size(product.m),
            N=c_size(product.n),
            K=c_size(product.k),
            epilogue=epilogue,
            **blocking.context,
            **context,
        )
        return replace(code, choice=blocking.name)

    return problem, code


def _left(context: Mapping[str, object], kind: str) -> str:
    """What the template does with the rows of the left operand: :attr:`Problem.left`."""
    if not context:
        return "gathered"
    if context["a_storage"] != kind or kind == "int8":
        return "converted"
    return "direct" if context["a_words"] else "copied"


def _left_in_place(work: Anchored, product: Product, kind: str) -> dict[str, Any]:
    """The context's part for a left operand with contiguous rows in a buffer of a fitting dtype; empty for others."""
    direct = affine_rows(product.a.at(("b", "m", "k")), "m", "k")
    storage = work.kernel.storage[direct[0]] if direct is not None else ""
    if direct is None or (storage != kind and (kind, storage) != ("bfloat16", "float32")):
        return {}
    buffer, start, stride = direct
    return {
        "a_direct": True,
        "a_base": f"{buffer} + {c_size(start)}",
        "a_stride": c_size(stride),
        "a_storage": storage,
        "a_words": all(sizes.mod(size, _PER_WORD[kind]) == 0 for size in (start, stride, product.k)),
    }

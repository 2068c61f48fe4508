"""The quantized family: linear layers with weights of 4 or 8 bits, and rows of quantized tables.

Weights are packed when the artifact is written (``quantized_packing.py``). Activations are read through their index
function and quantized inside the kernel, once per block of rows in a call, or stay floating point; then the weight is
dequantized in cache, chunk by chunk. One kernel serves one row and many (``quantized_matmul.c.jinja``).

A table's rows (``quantized_embedding``) are read out of the same panels, so that an output layer tied to the table
shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ...passes.graph.quantized_ops import QUANTIZED_EMBEDDING
from ...passes.graph.quantized_rows import RowFormat
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ..anchors import affine_rows, find_anchor
from ..products import unflatten, unused_without
from ..quantized import TARGETS, format_of, with_bias
from ..regions import Frame, Made, Task
from ..storage import Storage
from ..values import reshape
from .anchors import Anchored, c_size
from .quantized_packing import (
    STEP,
    block_rows,
    code_bytes,
    group_steps,
    panel_bytes,
    quantized_packing,
    quantized_units,
    steps_of,
)


def quantized_family(task: Task) -> Sequence[Made]:
    """``epilogue(quantized_linear(x, weight, bias))`` or ``epilogue(quantized_embedding(indices, weight))``."""
    anchor = find_anchor(task, TARGETS)
    return _embedding(task, anchor) if anchor.target == QUANTIZED_EMBEDDING else _linear(task, anchor)


def _linear(task: Task, anchor: fx.Node) -> Sequence[Made]:
    given = arguments(anchor)
    form = format_of(given)
    columns, shared = form.columns, _activation_steps(given["activations"], form)
    packed, n = _packed(task, anchor, form)
    frame = Frame(task, skip=unused_without(anchor, given["weight"]), extra=[packed])
    work = Anchored(task, anchor, frame)
    kernel, shape = work.kernel, work.shape()
    rows = shape[:-1]
    m = sizes.product(rows)
    for name, extent in (("m", m), ("n", n), ("k", columns)):
        kernel.variable(name, extent)
    value = work.operand(given["x"])
    assert value is not None
    flat = reshape(kernel, value, (m, columns))
    context: dict[str, Any] = {}
    direct = affine_rows(flat.at(("m", "k")), "m", "k")
    if direct is not None and kernel.storage[direct[0]] == "float32":
        buffer, start, stride = direct
        context |= {"x_direct": True, "x_base": f"{buffer} + {c_size(start)}", "x_stride": c_size(stride)}
    else:
        context["read_x"] = work.read(flat, ("m", "k"), ("m",), "k", "x_value")
    index = (*unflatten(kernel, "m", rows), "n")
    block = block_rows(columns, codes=code_bytes(form.bits) if shared else 0, gathered="read_x" in context)
    code = work.code(
        "quantized_matmul.c.jinja",
        family="quantized",
        units=quantized_units(m, n, block),
        flops=sizes.mul(m, n, columns, 2),
        M=c_size(m),
        N=n,
        K=columns,
        bits=form.bits,
        zeros=not form.symmetric,
        per=group_steps(form),
        activations=shared,
        weight=frame.name(packed),
        panel_bytes=panel_bytes(form),
        block=block,
        epilogue=work.epilogue(index, ("m",), "n", with_bias(work, given["bias"], index)),
        **context,
    )
    return [Made(code, frame.storages)]


def _embedding(task: Task, anchor: fx.Node) -> Sequence[Made]:
    given = arguments(anchor)
    form = format_of(given)
    columns = form.columns
    packed, n = _packed(task, anchor, form)
    frame = Frame(task, skip=unused_without(anchor, given["weight"]), extra=[packed])
    work = Anchored(task, anchor, frame)
    kernel, shape = work.kernel, work.shape()
    rows = shape[:-1]
    m = sizes.product(rows)
    for name, extent in (("m", m), ("k", columns)):
        kernel.variable(name, extent)
    value = work.operand(given["indices"])
    assert value is not None
    flat = reshape(kernel, value, (m,))
    code = work.code(
        "quantized_embedding.c.jinja",
        family="quantized",
        units=m,
        flops=sizes.mul(m, columns, 2),
        K=columns,
        ROWS=n,
        bits=form.bits,
        zeros=not form.symmetric,
        per=group_steps(form),
        weight=frame.name(packed),
        panel_bytes=panel_bytes(form),
        read_row=work.read(flat, ("m",), ("m",), "k", "row_value", flat.compute),
        epilogue=work.epilogue((*unflatten(kernel, "m", rows), "k"), ("m",), "k", lambda acc: acc),
    )
    return [Made(code, frame.storages)]


def _activation_steps(activations: int, form: RowFormat) -> int:
    """Steps of a row that are quantized with one scale; 0 where rows stay floating point."""
    if activations < 0:
        return 0
    if activations % STEP:
        raise CompileError(
            f"activations in groups of {activations} columns have no kernel on CPUs; "
            f"choose groups that are multiples of {STEP}, or one scale per row (0)"
        )
    return activations // STEP or max(1, steps_of(form.columns))


def _packed(task: Task, anchor: fx.Node, form: RowFormat) -> tuple[Storage, int]:
    """The weight in panels, and its number of rows."""
    weight = arguments(anchor)["weight"]
    storage = task.storage_of(weight) if weight.op == "placeholder" else None
    if storage is None or storage.recipe is None:
        raise CompileError(
            f"{anchor}: its weight is not known when compiling; kernels read quantized weights that are packed "
            "when the artifact is written"
        )
    n = storage.recipe.shape[0]
    return task.packed(storage, quantized_packing(n, form)), n

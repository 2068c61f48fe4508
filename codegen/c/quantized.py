"""The quantized family: linear layers with weights of 4 or 8 bits, and rows of quantized tables.

Weights are packed when the artifact is written (``quantized_packing.py``). Activations are read through their index
function and quantized by a kernel of their own (``quantize_rows.c.jinja``), because every part of a product reads all
of them; or they stay floating point, and then the weight is dequantized in cache, chunk by chunk. One kernel serves one
row and many (``quantized_matmul.c.jinja``).

A table's rows (``quantized_embedding``) are read out of the same panels, so that an output layer tied to the table
shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ...passes.graph.quantized_ops import QUANTIZED_EMBEDDING
from ...passes.graph.quantized_rows import RowFormat
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..anchors import affine_rows, find_anchor, upstream
from ..products import unflatten, unused_without
from ..quantized import TARGETS, format_of, with_bias
from ..regions import Frame, Made, Task
from ..storage import Storage
from ..values import reshape
from .anchors import Anchored, c_size
from .quantized_packing import (
    SCRATCH,
    STEP,
    TILE,
    block_rows,
    group_steps,
    panel_bytes,
    piece_steps,
    quantize_units,
    quantized_packing,
    quantized_units,
    row_bytes,
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
    before = _quantize(task, anchor, form, shared) if shared else None
    rows_of_x = before.storages[-1:] if before else ()
    unread = _read_only_for(given["x"], anchor) if before else []
    frame = Frame(task, skip=[*unused_without(anchor, given["weight"]), *unread], extra=[packed, *rows_of_x])
    work = Anchored(task, anchor, frame, unread=unread)
    kernel, shape = work.kernel, work.shape()
    rows = shape[:-1]
    m = sizes.product(rows)
    for name, extent in (("m", m), ("n", n), ("k", columns)):
        kernel.variable(name, extent)
    x = {"rows_at": frame.name(rows_of_x[0])} if rows_of_x else _operand(work, given["x"], m, columns)
    index = (*unflatten(kernel, "m", rows), "n")
    block = block_rows(columns, gathered="read_x" in x)
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
        **x,
    )
    return [Made(code, frame.storages, before=before)]


def _quantize(task: Task, anchor: fx.Node, form: RowFormat, shared: int) -> Made:
    """The kernel that quantizes the rows of an anchor's operand; its last storage is where they go."""
    given = arguments(anchor)
    m = sizes.product(task.symbols.shape(anchor.meta["val"])[:-1])
    columns = form.columns
    known = sizes.bounds(m, task.symbols.ranges)[0] >= 0  # else sizes that checks exclude would make it negative
    shape = (m if known else sizes.maximum(0, m), row_bytes(columns, form.bits))
    codes = Storage("buffer", shape, "uint8", name=f"{task.node.name}_rows")
    task = replace(task, results=[codes])
    read = upstream(given["x"]) | {given["x"]}
    unread = [node for node in task.placeholders() if node not in read]
    frame = Frame(task, skip=unread)
    work = Anchored(task, anchor, frame, unread=unread)
    for name, extent in (("m", m), ("k", columns)):
        work.kernel.variable(name, extent)
    x = _operand(work, given["x"], m, columns)
    if "read_x" in x and columns * 4 > SCRATCH:
        raise CompileError(f"rows of {columns} columns are too long to be quantized on CPUs")
    code = work.code(
        "quantize_rows.c.jinja",
        family="quantize",
        units=quantize_units(m, columns, shared),
        flops=sizes.mul(m, columns, 4),
        M=c_size(m),
        K=columns,
        bits=form.bits,
        zeros=not form.symmetric,
        activations=shared,
        piece=piece_steps(columns, shared),
        tile=TILE,
        rows_at=frame.name(codes),
        block=block_rows(columns, gathered=False),
        **x,
    )
    return Made(replace(code, label="rows"), frame.storages)


def _operand(work: Anchored, operand: object, m: Size, columns: int) -> dict[str, Any]:
    """How a template reads element (m, k) of an operand that is floating point."""
    value = work.operand(operand)
    assert value is not None
    flat = reshape(work.kernel, value, (m, columns))
    direct = affine_rows(flat.at(("m", "k")), "m", "k")
    if direct is not None and work.kernel.storage[direct[0]] == "float32":
        buffer, start, stride = direct
        return {"x_direct": True, "x_base": f"{buffer} + {c_size(start)}", "x_stride": c_size(stride)}
    return {"read_x": work.read(flat, ("m", "k"), ("m",), "k", "x_value")}


def _read_only_for(operand: fx.Node, anchor: fx.Node) -> list[fx.Node]:
    """The placeholders that nothing but one operand of the anchor depends on."""
    if sum(given is operand for given in (*anchor.args, *anchor.kwargs.values())) > 1:
        return []
    only: set[fx.Node] = set()
    for node in reversed(anchor.graph.nodes):
        users = only | ({anchor} if node is operand else set())
        if node.users and all(user in users for user in node.users):
            only.add(node)
    return [node for node in anchor.graph.nodes if node.op == "placeholder" and node in only]


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

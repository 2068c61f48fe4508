"""The quantized family: linear layers with weights of 4 or 8 bits, and rows of quantized tables.

Weights become codes, scales and zero points of their own when the artifact is written (``quantized_packing.py``), and
are turned into numbers in the kernel. Activations stay floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ...passes.graph.quantized_ops import QUANTIZED_EMBEDDING
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.plan import Tile
from ...runtime.sizes import Size
from ..anchors import find_anchor
from ..products import COMPUTED, unflatten, unused_without
from ..quantized import TARGETS, with_bias
from ..regions import Frame, Made, Task
from ..storage import Storage
from ..values import dtype_name, reshape
from . import dialect
from .anchors import Anchored
from .attention_tiles import tile
from .emit import Var
from .frame import COUNTERS, Extra
from .matmul_tiles import FEW_ROWS, Extents, partial_sums, quantized_tiles
from .quantized_packing import Weight, step_terms, steps_of, weight_of

# Codes take the place of the last bits of a float whose last bit counts 1: integers, the float as one of them, the
# floats, its value.
_CARRIERS = {
    "float32": ("tl.int32", "0x4B000000", "tl.float32", 1 << 23),
    "float16": ("tl.int16", "0x6400", "tl.float16", 1 << 10),
    "bfloat16": ("tl.int16", "0x4300", "tl.bfloat16", 1 << 7),
}


def quantized_family(task: Task) -> Sequence[Made]:
    """``epilogue(quantized_linear(x, weight, bias))`` or ``epilogue(quantized_embedding(indices, weight))``."""
    anchor = find_anchor(task, TARGETS)
    return _embedding(task, anchor) if anchor.target == QUANTIZED_EMBEDDING else _linear(task, anchor)


def _linear(task: Task, anchor: fx.Node) -> Sequence[Made]:
    given = arguments(anchor)
    if given["activations"] >= 0:
        raise CompileError(
            f"{anchor}: kernels on GPUs keep activations in floating point; compile with --activations float"
        )
    weight = weight_of(task, anchor, given)
    given_dtype = dtype_name(given["x"].meta["val"].dtype)
    dtype = given_dtype if given_dtype in COMPUTED else "float32"
    tensor_cores = dtype != "float32" or task.precision != "ieee"
    m, ranges = sizes.product(_shape(task, anchor)[:-1]), task.symbols.ranges
    extents = Extents(dtype, tensor_cores, 1, m, weight.rows, weight.form.columns, ranges)
    forms: list[tuple[int | None, tuple[Tile, ...]]] = []
    if extents.least(m) <= FEW_ROWS:
        forms.append((FEW_ROWS, quantized_tiles(extents, few=True)))
    if extents.most(m) > FEW_ROWS:
        forms.append((None, quantized_tiles(extents, few=False)))
    few = replace(extents, m=sizes.minimum(m, FEW_ROWS))
    partials = sizes.maximum(0, *(partial_sums(few, tiles) for _, tiles in forms))
    # All variants of a step have the same operands, so that the results have the same places.
    extras: tuple[Extra, ...] = ()
    if partials != 0:
        scratch = Storage("buffer", (partials,), "float32", name=f"{task.node.name}_partials")
        extras = (Extra("partials", scratch), Extra("counters", COUNTERS))
    return [_product(task, anchor, weight, extents, limit, tiles, extras) for limit, tiles in forms]


def _product(
    task: Task,
    anchor: fx.Node,
    weight: Weight,
    extents: Extents,
    limit: int | None,
    tiles: Sequence[Tile],
    extras: Sequence[Extra],
) -> Made:
    """The kernel for at most so many rows (``None``: any number)."""
    given = arguments(anchor)
    work = Anchored(task, anchor, Frame(task, skip=unused_without(anchor, given["weight"]), extra=weight.storages))
    kernel, rows, form = work.kernel, work.shape()[:-1], weight.form
    m, n, columns = extents.m, weight.rows, form.columns
    for name, extent in (("m", m), ("n", n), ("k", columns)):
        kernel.variable(name, extent)
    value = work.operand(given["x"])
    assert value is not None
    flat = reshape(kernel, value, (m, columns))
    depth, terms = 32 if extents.tensor_cores else 16, step_terms(form)
    inside = f"(k < {columns})[:, None]" if columns % terms else ""
    places = {"m": Var("row[None, :]", ("1", "BLOCK_M")), "k": Var("k[:, None]", (str(depth), "1"), inside)}
    scope = work.scope(places)
    text = scope.raw(kernel.builder.cast(flat.at(("m", "k")), value.compute), extents.dtype)
    scope.lines.append(f"x = tl.where({inside}, {text}, 0.0)" if inside else f"x = {text}")
    index = (*unflatten(kernel, "m", rows), "n")
    results = {
        "m": Var("m[None, :]", ("1", "BLOCK_M"), f"(m < {_text(m)})[None, :]"),
        "n": Var("n[:, None]", ("BLOCK_N", "1"), f"(n < {n})[:, None]"),
    }
    split = "SPLIT_K" in tiles[0].values()
    return work.made(
        "quantized.py.jinja",
        family="quantized",
        units=sizes.mul(extents.count("BLOCK_M", "BLOCK_N"), "SPLIT_K" if split else 1),
        flops=sizes.mul(m, n, columns, 2),
        tiles=tiles,
        extras=extras,
        sizes_used=(m, n, columns),
        guard=1 if limit is None or extents.most(m) <= limit else sizes.compare("le", m, limit),
        M=_text(m),
        N=n,
        STEPS=steps_of(form),
        terms=terms,
        depth=depth,
        span=next(span for span in (terms, 64, 32) if form.group % span == 0),
        clamp=form.group > 0 and steps_of(form) * terms > form.groups * form.group,
        split=split,
        read_x=work.text(scope),
        type=dialect.TYPES[extents.dtype],
        precision=task.precision,
        epilogue=work.epilogue(index, results, with_bias(work, given["bias"], index), ("BLOCK_N", "BLOCK_M")),
        **_carrier(extents.dtype, form.bits),
        **weight.context(work.frame),
    )


def _carrier(dtype: str, bits: int) -> dict[str, Any]:
    """How codes become numbers: in the dtype of the operands, but bytes have more bits than a bfloat16's fraction."""
    names = ("bits_type", "above", "float_type", "base")
    return dict(zip(names, _CARRIERS["float32" if dtype == "bfloat16" and bits == 8 else dtype], strict=True))


def _embedding(task: Task, anchor: fx.Node) -> Sequence[Made]:
    given = arguments(anchor)
    weight = weight_of(task, anchor, given)
    work = Anchored(task, anchor, Frame(task, skip=unused_without(anchor, given["weight"]), extra=weight.storages))
    kernel, shape = work.kernel, work.shape()
    columns, m = weight.form.columns, sizes.product(shape[:-1])
    for name, extent in (("m", m), ("k", columns)):
        kernel.variable(name, extent)
    value = work.operand(given["indices"])
    assert value is not None
    block = min(1024, 1 << max(columns - 1, 0).bit_length())
    columns_of = Var("k", (str(block),), f"k < {columns}" if columns % block else "")
    read = work.read(reshape(kernel, value, (m,)), ("m",), {"m": Var("m")}, "index", value.compute)
    index = (*unflatten(kernel, "m", shape[:-1]), "k")
    epilogue = work.epilogue(index, {"m": Var("m"), "k": columns_of}, lambda acc: acc, (str(block),))
    work.needs_fault()
    return [
        work.made(
            "quantized_embedding.py.jinja",
            family="quantized",
            units=sizes.mul(m, -(-columns // block)),
            flops=sizes.mul(m, columns, 2),
            tiles=(tile(4, 1),),
            sizes_used=(m, columns),
            ROWS=weight.rows,
            K=columns,
            BLOCK_K=block,
            read_index=read,
            epilogue=epilogue,
            **weight.context(work.frame),
        )
    ]


def _shape(task: Task, anchor: fx.Node) -> tuple[Size, ...]:
    return Anchored(task, anchor, Frame(task)).shape()


def _text(size: Size) -> str:
    """A size in the template, in parentheses where it is compound."""
    text = dialect.size(size)
    return text if isinstance(size, int | str) else f"({text})"

"""The quantized family: linear layers with weights of 4 or 8 bits, and rows of quantized tables.

Weights become codes, scales and zero points of their own when the artifact is written (``quantized.py.jinja`` says how
they lie), and are turned into numbers in the kernel. Activations stay floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ...passes.graph.quantized_ops import QUANTIZED_EMBEDDING
from ...passes.graph.quantized_rows import RowFormat
from ...passes.graph.query import arguments
from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.plan import Tile
from ...runtime.sizes import Size
from ..anchors import find_anchor
from ..products import unflatten, unused_without
from ..quantized import TARGETS, format_of, with_bias
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from ..values import reshape
from . import dialect
from .anchors import Anchored
from .attention_tiles import tile
from .emit import Var

CHUNK = 64
"""Terms of a row that lie together; half of them share a scale at least."""

_TYPES = ("float32", "float16", "bfloat16")
_FEW = 16


def quantized_family(task: Task) -> Sequence[Made]:
    """``epilogue(quantized_linear(x, weight, bias))`` or ``epilogue(quantized_embedding(indices, weight))``."""
    anchor = find_anchor(task, TARGETS)
    return _embedding(task, anchor) if anchor.target == QUANTIZED_EMBEDDING else _linear(task, anchor)


@dataclass(frozen=True)
class Weight:
    """A weight as the kernels read it.

    Attributes:
        form: of its rows in the program.
        rows: how many.
        codes: storage of uint8 ``[rows, stride]``.
        scales: storage ``[groups, rows]``, float16 for 4 bits, float32 for 8.
        zeros: storage of uint8 ``[groups, rows]``; None in symmetric formats.
    """

    form: RowFormat
    rows: int
    codes: Storage
    scales: Storage
    zeros: Storage | None

    @property
    def storages(self) -> list[Storage]:
        """All of it."""
        return [self.codes, self.scales, *([] if self.zeros is None else [self.zeros])]

    def context(self, frame: Frame) -> dict[str, Any]:
        """What the templates need to know."""
        form = self.form
        return {
            "bits": form.bits,
            "group": form.group,
            "groups": form.groups,
            "zero": form.zero if form.symmetric else 0,
            "CODES": frame.name(self.codes),
            "STRIDE": self.codes.shape[1],
            "SCALES": frame.name(self.scales),
            "ZEROS": "" if self.zeros is None else frame.name(self.zeros),
        }


def _linear(task: Task, anchor: fx.Node) -> Sequence[Made]:
    given = arguments(anchor)
    if given["activations"] >= 0:
        raise CompileError(
            f"{anchor}: kernels on GPUs keep activations in floating point; compile with --activations float"
        )
    weight = _weight(task, anchor, given)
    most = sizes.bounds(sizes.product(_shape(task, anchor)[:-1]), task.symbols.ranges)
    few = (tile(4, 3, BLOCK_M=16, BLOCK_N=64), tile(4, 3, BLOCK_M=16, BLOCK_N=128), tile(2, 4, BLOCK_M=16, BLOCK_N=32))
    many = (
        tile(4, 3, BLOCK_M=64, BLOCK_N=64),
        tile(8, 3, BLOCK_M=128, BLOCK_N=64),
        tile(4, 3, BLOCK_M=32, BLOCK_N=128),
    )
    if most[1] <= _FEW:
        return [_product(task, anchor, weight, few, None)]
    if most[0] > _FEW:
        return [_product(task, anchor, weight, many, None)]
    return [_product(task, anchor, weight, few, _FEW), _product(task, anchor, weight, many, None)]


def _product(task: Task, anchor: fx.Node, weight: Weight, tiles: Sequence[Tile], limit: int | None) -> Made:
    """The kernel for at most so many rows (``None``: any number)."""
    given = arguments(anchor)
    work = Anchored(task, anchor, Frame(task, skip=unused_without(anchor, given["weight"]), extra=weight.storages))
    kernel, shape = work.kernel, work.shape()
    rows, n, columns = shape[:-1], weight.rows, weight.form.columns
    m = sizes.product(rows)
    for name, extent in (("m", m), ("n", n), ("k", columns)):
        kernel.variable(name, extent)
    value = work.operand(given["x"])
    assert value is not None
    flat = reshape(kernel, value, (m, columns))
    dtype = value.dtype if value.dtype in _TYPES else "float32"
    terms = f"(k < {columns})[None, :]" if columns % CHUNK else ""
    places = {"m": Var("row[:, None]", ("BLOCK_M", "1")), "k": Var("k[None, :]", ("1", "32"), terms)}
    scope = work.scope(places)
    text = scope.raw(kernel.builder.cast(flat.at(("m", "k")), value.compute), dtype)
    scope.lines.append(f"x = tl.where({terms}, {text}, 0.0)" if terms else f"x = {text}")
    index = (*unflatten(kernel, "m", rows), "n")
    results = {
        "m": Var("m[:, None]", ("BLOCK_M", "1"), f"(m < {_text(m)})[:, None]"),
        "n": Var("n[None, :]", ("1", "BLOCK_N"), f"(n < {n})[None, :]"),
    }
    return work.made(
        "quantized.py.jinja",
        family="quantized",
        units=sizes.mul(sizes.ceildiv(m, "BLOCK_M"), sizes.ceildiv(n, "BLOCK_N")),
        flops=sizes.mul(m, n, columns, 2),
        tiles=tiles,
        sizes_used=(m, n, columns),
        guard=1 if limit is None else sizes.compare("le", m, limit),
        M=_text(m),
        N=n,
        K=columns,
        STEPS=-(-columns // CHUNK),
        read_x=work.text(scope),
        type=dialect.TYPES[dtype],
        precision=task.precision,
        epilogue=work.epilogue(index, results, with_bias(work, given["bias"], index), ("BLOCK_M", "BLOCK_N")),
        **weight.context(work.frame),
    )


def _embedding(task: Task, anchor: fx.Node) -> Sequence[Made]:
    given = arguments(anchor)
    weight = _weight(task, anchor, given)
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


def _weight(task: Task, anchor: fx.Node, given: Mapping[str, Any]) -> Weight:
    """The weight of an operator, packed.

    Raises:
        CompileError: it is not known when compiling, or in groups that are not made of half chunks.
    """
    form = format_of(given)
    if form.group % (CHUNK // 2):
        raise CompileError(
            f"{anchor}: weights in groups of {form.group} columns have no kernel on GPUs; choose groups of 32, 64 or "
            f"128, or one scale per row (0)"
        )
    node = given["weight"]
    storage = task.storage_of(node) if isinstance(node, fx.Node) and node.op == "placeholder" else None
    if storage is None or storage.recipe is None or not isinstance(storage.shape[0], int):
        raise CompileError(f"{anchor}: a quantized weight must be known when the model is compiled")
    rows = storage.shape[0]
    name = f"q{form.bits}g{form.group}" + ("" if form.symmetric else "z")
    stride = -(-form.columns // CHUNK) * CHUNK * form.bits // 8
    side = (form.groups, rows)
    return Weight(
        form,
        rows,
        task.packed(storage, Packing(f"{name}codes", (rows, stride), lambda array: pack_codes(array, form), "uint8")),
        task.packed(
            storage,
            Packing(
                f"{name}scales",
                side,
                lambda array: pack_scales(array, form),
                "float16" if form.bits == 4 else "float32",
            ),
        ),
        None
        if form.symmetric
        else task.packed(storage, Packing(f"{name}zeros", side, lambda array: pack_zeros(array, form), "uint8")),
    )


def pack_codes(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """Rows (uint8 ``[N, row_bytes]``) as codes in chunks of 64 terms; terms beyond the last have the code of 0."""
    codes = form.split(torch.from_numpy(rows)).codes.numpy().view(np.uint8)
    chunks = -(-form.columns // CHUNK)
    filled = np.full((len(rows), chunks * CHUNK), form.zero, np.uint8)
    filled[:, : form.columns] = codes
    if form.bits == 8:
        return filled
    halves = filled.reshape(len(rows), chunks, 2, CHUNK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(rows), -1)


def pack_scales(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """The scales of rows, whose bytes come as numbers of the scales' type: ``[groups, N]``."""
    scales = form.split(torch.from_numpy(rows.astype(np.uint8))).scales.numpy()
    return np.ascontiguousarray(scales.T).astype(rows.dtype)


def pack_zeros(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """The zero points of rows: ``[groups, N]``."""
    zeros = form.split(torch.from_numpy(rows)).zeros
    assert zeros is not None
    return np.ascontiguousarray(zeros.numpy().view(np.uint8).T)


def _shape(task: Task, anchor: fx.Node) -> tuple[Size, ...]:
    return Anchored(task, anchor, Frame(task)).shape()


def _text(size: Size) -> str:
    """A size in the template, in parentheses where it is compound."""
    text = dialect.size(size)
    return text if isinstance(size, int | str) else f"({text})"

"""Operators on quantized weights, registered when this module is imported (``quantized_rows.py`` has the format).

``quantize_weight`` makes a weight's rows of bytes; it is computed when the artifact is written. The others read them:
``quantized_linear`` and ``quantized_embedding`` are what lowering makes kernels of, ``dequantize`` says what the bytes
stand for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .quantized_rows import Parts, RowFormat
from .scale_search import quantize_groups

# Elements that are quantized at a time: few enough that what the search computes with stays small.
_CHUNK = 1 << 18
# Elements of a quantized weight that are multiplied at a time.
_VALUES = 1 << 24
# Groups of so many members lie one after another, so that sums run along memory; shorter ones lie side by side.
_LONG = 512
# A row whose largest number is smaller counts as zeros: 127 / max would leave the range of float32.
SMALLEST_ROW = 1e-30


@torch.library.custom_op(
    "tilewright::quantize_weight",
    mutates_args=(),
    schema="(Tensor weight, int bits, int group, bool symmetric, bool search) -> Tensor",
)
def quantize_weight(weight: Tensor, bits: int, group: int, symmetric: bool, search: bool) -> Tensor:
    """Quantize a matrix row by row, in groups of columns.

    Args:
        weight: ``[N, K]``, floating point.
        bits: 4 or 8.
        group: columns that share a scale; 0: the whole row does.
        symmetric: whether there are no zero points.
        search: for each group look for the scale (and zero point) with the least squared error, else round plainly.

    Returns:
        uint8 ``[N, row_bytes]``, see ``quantized_rows.py``.

    Raises:
        ValueError: the weight is no matrix of floating-point numbers, has numbers that are not finite, or there is no
            such format.
    """
    form = _format_of(weight, bits, group, symmetric)
    chunks = weight.split(max(1, _CHUNK // max(1, weight.shape[1])))
    before = torch.get_num_threads()
    threads = min(before, len(chunks))
    if threads == 1:
        return torch.cat([_quantize_rows(rows, form, search) for rows in chunks])
    # Many short operators: threads that take chunks need not wait for each other after every one of them.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return torch.cat(list(pool.map(lambda rows: _quantize_rows(rows, form, search), chunks)))
    finally:
        torch.set_num_threads(before)


def _quantize_rows(weight: Tensor, form: RowFormat, search: bool) -> Tensor:
    count, size = len(weight), form.group_columns
    whole = weight.float()
    if form.columns < form.groups * size:
        whole = torch.nn.functional.pad(whole, (0, form.groups * size - form.columns))
    members = whole.reshape(count * form.groups, size).t()
    if size < _LONG:
        members = members.contiguous()
    codes, scales, zeros = quantize_groups(members, form.bits, form.symmetric, search)
    codes = codes.t().reshape(count, form.groups * size)[:, : form.columns]
    scales = scales.view(count, form.groups)
    return form.join(Parts(codes.contiguous(), scales, None if zeros is None else zeros.view(count, form.groups)))


def _format_of(weight: Tensor, bits: int, group: int, symmetric: bool) -> RowFormat:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_weight: a matrix of floating-point numbers is quantized, not {list(weight.shape)} of "
            f"{str(weight.dtype).removeprefix('torch.')}"
        )
    return RowFormat(weight.shape[1], bits, group, symmetric)


@quantize_weight.register_fake
def _(weight: Tensor, bits: int, group: int, symmetric: bool, search: bool) -> Tensor:
    form = _format_of(weight, bits, group, symmetric)
    return weight.new_empty((weight.shape[0], form.row_bytes), dtype=torch.uint8)


@torch.library.custom_op(
    "tilewright::dequantize",
    mutates_args=(),
    schema="(Tensor weight, int columns, int bits, int group, bool symmetric) -> Tensor",
)
def dequantize(weight: Tensor, columns: int, bits: int, group: int, symmetric: bool) -> Tensor:
    """The matrix that quantized rows stand for: float32 ``[N, columns]``.

    Raises:
        ValueError: the rows are not of that format.
    """
    return RowFormat(columns, bits, group, symmetric).values(weight)


@dequantize.register_fake
def _(weight: Tensor, columns: int, bits: int, group: int, symmetric: bool) -> Tensor:
    RowFormat(columns, bits, group, symmetric).check(weight)
    return weight.new_empty((weight.shape[0], columns), dtype=torch.float32)


@torch.library.custom_op(
    "tilewright::quantized_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int columns, int bits, int group, bool symmetric, int activations)"
    " -> Tensor",
)
def quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    bits: int,
    group: int,
    symmetric: bool,
    activations: int,
) -> Tensor:
    """``x @ w.T + bias`` with a quantized weight, and with activations that are quantized on the fly where asked for.

    Products of quantized activations are products of integers: within a group of columns they are summed exactly, then
    multiplied by both scales. A zero point enters as ``scale * (sum(code * x) - zero * sum(x))``.

    Args:
        x: ``[..., columns]``, floating point, finite.
        weight: quantized rows, uint8 ``[N, row_bytes]``.
        bias: ``[N]``, floating point, or None.
        columns: columns of the weight.
        bits: bits of the weight.
        group: columns of the weight that share a scale; 0: the whole row does.
        symmetric: whether the weight has no zero points.
        activations: -1: ``x`` stays floating point. 0: each row of ``x`` becomes int8 with one scale
            (:func:`quantize_rows`). n > 0: the same for each n columns of a row; n divides the weight's group.

    Returns:
        ``[..., N]`` in ``x``'s dtype, computed in float32.

    Raises:
        ValueError: shapes, dtypes or groups do not fit each other.
    """
    form = _check_linear(x, weight, bias, RowFormat(columns, bits, group, symmetric), activations)
    rows = x.float()
    if activations >= 0:
        rows = rounded_rows(rows, activations)
    count = max(1, _VALUES // max(1, columns))  # rows of the weight whose values are in memory at a time
    results = [torch.nn.functional.linear(rows, form.values(part)) for part in weight.split(count)]
    result = torch.cat(results, -1)
    return (result if bias is None else result.add_(bias.float())).to(x.dtype)


@quantized_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    bits: int,
    group: int,
    symmetric: bool,
    activations: int,
) -> Tensor:
    _check_linear(x, weight, bias, RowFormat(columns, bits, group, symmetric), activations)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantize activations symmetrically to int8.

    The scale is ``max|x| / 127``; a code is ``x * (127 / max|x|)`` rounded half to even. What is smaller than
    ``SMALLEST_ROW`` throughout gets scale 0 and codes 0; what has a NaN, the scale NaN.

    Args:
        x: float32 ``[..., columns]``, finite.
        group: columns that share a scale; 0: the whole row does.

    Returns:
        Codes, int8 ``[..., groups, group]``, the last group filled up with zeros; scales, float32 ``[..., groups]``.
    """
    columns = x.shape[-1]
    size = group or max(columns, 1)
    groups = -(-columns // size)
    parts = torch.nn.functional.pad(x, (0, groups * size - columns)).unflatten(-1, (groups, size))
    largest = parts.abs().amax(-1) if parts.numel() else x.new_zeros(parts.shape[:-1])
    counts = ~(largest <= SMALLEST_ROW)
    # Divided, as kernels do: a number over a tensor is its reciprocal times the number, which is rounded twice.
    inverse = torch.where(counts, torch.full_like(largest, 127.0) / largest, 0.0)
    return (parts * inverse.unsqueeze(-1)).round_().to(torch.int8), torch.where(counts, largest / 127.0, 0.0)


def rounded_rows(x: Tensor, group: int) -> Tensor:
    """What :func:`quantize_rows` leaves of activations: codes times scales, float32 in ``x``'s shape."""
    codes, scales = quantize_rows(x, group)
    return (codes * scales.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: RowFormat, activations: int) -> RowFormat:
    form.check(weight)
    if x.dim() < 1 or x.shape[-1] != form.columns or not x.is_floating_point():
        raise ValueError(
            f"quantized_linear: x is {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}; "
            f"it must be floating point with {form.columns} columns, as the weight has"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"quantized_linear: the bias is {list(bias.shape)}; the weight has {weight.shape[0]} rows, so it must be "
            f"one floating-point number for each"
        )
    if activations < -1 or (activations > 0 and form.group % activations):
        raise ValueError(
            f"quantized_linear: activations are quantized in groups of {activations}; that must divide the weight's "
            f"groups of {form.group}, or be 0 (rows) or -1 (not at all)"
        )
    return form


@torch.library.custom_op(
    "tilewright::quantized_embedding",
    mutates_args=(),
    schema="(Tensor indices, Tensor weight, int columns, int bits, int group, bool symmetric) -> Tensor",
)
def quantized_embedding(
    indices: Tensor, weight: Tensor, columns: int, bits: int, group: int, symmetric: bool
) -> Tensor:
    """Rows of a quantized table.

    Args:
        indices: int32 or int64, any shape.
        weight: quantized rows, uint8 ``[N, row_bytes]``.
        columns: columns of the table.
        bits: bits of the table.
        group: columns that share a scale; 0: the whole row does.
        symmetric: whether the table has no zero points.

    Returns:
        float32 ``[..., columns]``.

    Raises:
        ValueError: the rows are not of that format, or the indices are no integers.
        IndexError: an index is not in the table.
    """
    form = _check_embedding(indices, weight, RowFormat(columns, bits, group, symmetric))
    return form.values(torch.nn.functional.embedding(indices, weight))


@quantized_embedding.register_fake
def _(indices: Tensor, weight: Tensor, columns: int, bits: int, group: int, symmetric: bool) -> Tensor:
    _check_embedding(indices, weight, RowFormat(columns, bits, group, symmetric))
    return weight.new_empty((*indices.shape, columns), dtype=torch.float32)


def _check_embedding(indices: Tensor, weight: Tensor, form: RowFormat) -> RowFormat:
    form.check(weight)
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"quantized_embedding: indices are int32 or int64, not {indices.dtype}")
    return form


QUANTIZE_WEIGHT = torch.ops.tilewright.quantize_weight.default
DEQUANTIZE = torch.ops.tilewright.dequantize.default
QUANTIZED_LINEAR = torch.ops.tilewright.quantized_linear.default
QUANTIZED_EMBEDDING = torch.ops.tilewright.quantized_embedding.default

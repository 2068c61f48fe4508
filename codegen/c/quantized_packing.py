"""Quantized weights as the C kernels stream through them: panels of 32 columns, scales beside their data.

A panel is read from its beginning to its end. Along k it has steps of 32 terms, and groups of steps that share scales:

    group   header, then its steps
    header  32 scales, float16 for 4 bits and float32 for 8 bits; with zero points, then 32 bytes
    step    halves of 16 columns, each [words][16][4 bytes]
            4 bits: 4 words; byte i of word p holds term 8p + i in its low half and term 8p + 4 + i in its high half
            8 bits: 8 words; byte i of word p holds term 4p + i

Halves of 16 columns are what the registers of AVX2 hold sums of, for several rows; AVX-512 takes both halves at once.
So every x86 target reads the one layout, and the 4.5 bits of a weight in a group of 32 come from one place.
Columns beyond the last have scale 0; terms beyond the last meet zeros.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ...passes.graph.quantized_rows import RowFormat
from ...runtime.errors import CompileError
from ...runtime.sizes import Size, ceildiv, mul
from ..storage import Packing
from .packing import PANEL

STEP = 32
"""Terms of a step."""
SCRATCH = 512 << 10
"""Most bytes of stack for a block of rows; tw_entry.h says what callers need."""
CHUNK = 8
"""Steps of a chunk of activations beside weights of 8 bits (``TW_CHUNK_int8``)."""
PIECE = 16
"""Steps of a unit that quantizes activations, where scales allow; a multiple of ``CHUNK``."""
TILE = 6
"""Rows of a unit that quantizes activations; codes of the rows of a tile share cache lines (``TW_ROWS_int4``)."""
BLOCKS = (64, 48, 32, 24, 16, 12, 8, 4, 2, 1)
"""Numbers of rows that are multiplied while a panel is in cache."""

_HALF = 16
_SCALE_BYTES = {4: 2, 8: 4}
_STEP_BYTES = {4: STEP * PANEL // 2, 8: STEP * PANEL}


def steps_of(columns: int) -> int:
    """Steps of a row."""
    return -(-columns // STEP)


def group_steps(form: RowFormat) -> int:
    """Steps that share scales.

    Raises:
        CompileError: groups are not made of whole steps.
    """
    if form.group % STEP:
        raise CompileError(
            f"weights in groups of {form.group} columns have no kernel on CPUs; "
            f"choose groups of 32, 64 or 128, or one scale per row (0)"
        )
    return form.group // STEP or max(1, steps_of(form.columns))


def header_bytes(form: RowFormat) -> int:
    """Bytes of a group's scales and zero points."""
    return PANEL * (_SCALE_BYTES[form.bits] + (not form.symmetric))


def panel_bytes(form: RowFormat) -> int:
    """Bytes of a panel."""
    return -(-steps_of(form.columns) // group_steps(form)) * header_bytes(form) + (
        steps_of(form.columns) * _STEP_BYTES[form.bits]
    )


def quantized_packing(n: int, form: RowFormat) -> Packing:
    """The panels of a weight of ``n`` rows in a row format: uint8 ``[ceil(n/32), bytes]``."""
    name = f"q{form.bits}g{form.group}" + ("" if form.symmetric else "z") + f"panels{PANEL}"
    shape = (-(-n // PANEL), panel_bytes(form))
    return Packing(name, shape, lambda rows: pack_quantized(rows, form), "uint8")


def pack_quantized(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """Rows (uint8 ``[N, row_bytes]``) as panels."""
    parts = form.split(torch.from_numpy(rows))
    n, steps, per = len(rows), steps_of(form.columns), group_steps(form)
    panels, groups = -(-n // PANEL), -(-steps // per)
    codes = np.full((panels * PANEL, steps * STEP), form.zero, np.uint8)
    codes[:n, : form.columns] = parts.codes.numpy().view(np.uint8)
    words: np.ndarray
    if form.bits == 4:
        pairs = codes.reshape(panels, 2, _HALF, steps, 4, 2, 4)
        words = pairs[..., 0, :] | (pairs[..., 1, :] << 4)
    else:
        words = codes.reshape(panels, 2, _HALF, steps, 8, 4)
    data = words.transpose(0, 3, 1, 4, 2, 5).reshape(panels, steps, _STEP_BYTES[form.bits])
    headers = _by_panel(parts.scales.numpy(), panels, groups).astype(f"<f{_SCALE_BYTES[form.bits]}").view(np.uint8)
    if parts.zeros is not None:
        headers = np.concatenate([headers, _by_panel(parts.zeros.numpy().view(np.uint8), panels, groups)], -1)
    packed = []
    for group in range(groups):
        packed += [headers[:, group], data[:, group * per : (group + 1) * per].reshape(panels, -1)]
    return np.concatenate(packed, 1) if packed else np.zeros((panels, 0), np.uint8)


def _by_panel(values: np.ndarray, panels: int, groups: int) -> np.ndarray:
    """``[N, groups]`` as ``[panels, groups, 32]``."""
    padded = np.zeros((panels * PANEL, groups), values.dtype)
    padded[: len(values)] = values[:, :groups]
    return np.ascontiguousarray(padded.reshape(panels, PANEL, groups).transpose(0, 2, 1))


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a quantized row of activations: codes, a scale and a sum of every step, and what ``tw_quantized`` notes.

    Args:
        columns: of the row.
        bits: of the weight that it meets; with 8, AVX2 keeps magnitudes and signs of codes apart.
    """
    steps = steps_of(columns)
    return steps * (STEP * (2 if bits == 8 else 1) + 8) + 4 + -(-steps // CHUNK)


def piece_steps(columns: int, activations: int) -> int:
    """Steps of a tile of rows that one unit of ``quantize_rows.c.jinja`` quantizes.

    Args:
        columns: of the row.
        activations: steps that share a scale.
    """
    steps = max(1, steps_of(columns))
    return steps if activations >= steps else math.lcm(PIECE, activations)


def quantize_units(m: Size, columns: int, activations: int) -> Size:
    """Work units of ``quantize_rows.c.jinja``: a piece of a tile of rows each."""
    return mul(ceildiv(m, TILE), -(-max(1, steps_of(columns)) // piece_steps(columns, activations)))


def block_rows(columns: int, *, gathered: bool) -> int:
    """Most rows of activations in a block; where floats are computed as they are read, as many as fit the stack.

    Args:
        columns: of a row.
        gathered: whether rows stay floating point and are computed as they are read.

    Raises:
        CompileError: not even one row fits.
    """
    each = (columns * 4 if gathered else 0) + PANEL * 4
    for rows in BLOCKS:
        if rows * each <= SCRATCH:
            return rows
    raise CompileError(f"rows of {columns} columns are too long for products with quantized weights on CPUs")


def quantized_units(m: Size, n: int, block: int) -> Size:
    """Work units of ``quantized_matmul.c.jinja``: a panel of a block of at most ``block`` rows each."""
    return mul(ceildiv(m, block), -(-n // PANEL))

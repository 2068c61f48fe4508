"""Quantized weights as GPU kernels read them: codes in units of 32 bytes, scales and zero points along rows.

A unit holds the codes of 64 terms (4 bits) or 32 (8 bits) of one row. All rows of a unit lie together, so that a tile
reads one run of memory per unit. Byte i of 4-bit codes has term i of its unit in the low half and term 32 + i in the
high half: both halves are then the same rows of an operand that lies in two pieces, and nothing is interleaved.

8-bit codes, and their zero points, are stored with 128 added: only their differences count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ...passes.graph.quantized_rows import RowFormat
from ...runtime.errors import CompileError
from ..quantized import format_of
from ..regions import Frame, Task
from ..storage import Packing, Storage

UNIT = 32
"""Bytes of a row that lie together, and columns that share a scale at least."""

_LONG = 1024  # columns from which on whole steps of 128 terms cost little


@dataclass(frozen=True)
class Weight:
    """A weight as the kernels read it.

    Attributes:
        form: of its rows in the program.
        rows: how many.
        codes: storage of uint8 ``[units, rows, 32]``.
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
            "zero": form.zero + added(form),
            "CODES": frame.name(self.codes),
            "SCALES": frame.name(self.scales),
            "ZEROS": "" if self.zeros is None else frame.name(self.zeros),
        }


def weight_of(task: Task, anchor: fx.Node, given: Mapping[str, Any]) -> Weight:
    """The weight of an operator, packed.

    Raises:
        CompileError: it is not known when compiling, or its groups are not made of units' halves.
    """
    form = format_of(given)
    if form.group % UNIT:
        raise CompileError(
            f"{anchor}: weights in groups of {form.group} columns have no kernel on GPUs; choose groups of 32, 64 or "
            f"128, or one scale per row (0)"
        )
    node = given["weight"]
    storage = task.storage_of(node) if isinstance(node, fx.Node) and node.op == "placeholder" else None
    if storage is None or storage.recipe is None or not isinstance(storage.shape[0], int):
        raise CompileError(f"{anchor}: a quantized weight must be known when the model is compiled")
    rows = storage.shape[0]
    units = steps_of(form) * step_terms(form) * form.bits // (8 * UNIT)
    kinds = {
        "codes": (pack_codes, (units, rows, UNIT), "uint8"),
        "scales": (pack_scales, (form.groups, rows), "float16" if form.bits == 4 else "float32"),
        "zeros": (pack_zeros, (form.groups, rows), "uint8"),
    }
    name = f"q{form.bits}g{form.group}" + ("" if form.symmetric else "z")

    def packed(kind: str) -> Storage:
        pack, shape, dtype = kinds[kind]
        return task.packed(storage, Packing(name + kind, shape, lambda array: pack(array, form), dtype))

    return Weight(form, rows, packed("codes"), packed("scales"), None if form.symmetric else packed("zeros"))


def step_terms(form: RowFormat) -> int:
    """Terms of a step of a product: codes are filled up to whole steps."""
    return 128 if form.columns % 128 == 0 or form.columns >= _LONG else 64


def steps_of(form: RowFormat) -> int:
    """Steps of a product."""
    return -(-form.columns // step_terms(form))


def added(form: RowFormat) -> int:
    """What is added to a code, or a zero point, to make its byte."""
    return 128 if form.bits == 8 else 0


def pack_codes(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """Rows (uint8 ``[N, row_bytes]``) as codes in units; terms beyond the last have the code of 0."""
    codes = form.split(torch.from_numpy(rows)).codes.numpy().astype(np.int16) + added(form)
    units, n = steps_of(form) * step_terms(form) * form.bits // (8 * UNIT), len(rows)
    terms: np.ndarray = np.full((n, units * UNIT * 8 // form.bits), form.zero + added(form), np.uint8)
    terms[:, : form.columns] = codes
    if form.bits == 4:
        halves = terms.reshape(n, units, 2, UNIT)
        terms = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return np.ascontiguousarray(terms.reshape(n, units, UNIT).swapaxes(0, 1))


def pack_scales(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """The scales of rows, whose bytes come as numbers of the scales' type: ``[groups, N]``."""
    scales = form.split(torch.from_numpy(rows.astype(np.uint8))).scales.numpy()
    return np.ascontiguousarray(scales.T).astype(rows.dtype)


def pack_zeros(rows: np.ndarray, form: RowFormat) -> np.ndarray:
    """The zero points of rows: ``[groups, N]``."""
    zeros = form.split(torch.from_numpy(rows)).zeros
    assert zeros is not None
    return np.ascontiguousarray((zeros.numpy().astype(np.int16) + added(form)).T).astype(np.uint8)

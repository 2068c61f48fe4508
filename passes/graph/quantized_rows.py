"""How a quantized weight lies in memory: one tensor of bytes, a row per output, so that it is one constant.

A row holds data, then scales, then zero points:

    data     8 bits: one byte per column, two's complement in [-127, 127]
             4 bits: ceil(columns / 2) bytes, an even column in the low half of its byte, codes 0..15
    scales   float32, little-endian, one per group of columns, or one for the row
    zeros    one byte per scale, where the format is not symmetric: a code, as the data has them

A value is ``(code - zero) * scale``. In a symmetric format the zero point is 0 for 8 bits and 8 for 4 bits. A scale may
be negative. Scales of 4-bit formats are float16 numbers, so that kernels may store them as such.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements whose values are computed at a time
LIMITS: dict[int, tuple[int, int]] = {4: (0, 15), 8: (-127, 127)}
"""The smallest and the largest code by the number of bits."""


@dataclass(frozen=True)
class Parts:
    """A quantized weight taken apart.

    Attributes:
        codes: ``[N, columns]``, int8 for 8 bits, uint8 for 4 bits.
        scales: float32 ``[N, groups]``.
        zeros: ``[N, groups]`` in the dtype of the codes; None in a symmetric format.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True)
class RowFormat:
    """The format of a quantized weight's rows.

    Attributes:
        columns: columns of the weight.
        bits: 4 or 8.
        group: columns that share a scale; 0: the whole row does.
        symmetric: whether there are no zero points.

    Raises:
        ValueError: there are no such formats.
    """

    columns: int
    bits: int
    group: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse what is no format."""
        if self.bits not in LIMITS:
            raise ValueError(f"a quantized weight has 4 or 8 bits, not {self.bits}")
        if self.group < 0:
            raise ValueError(f"a group has {self.group} columns; it must have some, or 0 for the whole row")
        if self.columns < 0:
            raise ValueError(f"a quantized weight cannot have {self.columns} columns")

    @property
    def groups(self) -> int:
        """How many scales a row has."""
        return -(-self.columns // self.group) if self.group else 1

    @property
    def group_columns(self) -> int:
        """Columns that share a scale, the last group may have fewer."""
        return self.group or max(self.columns, 1)

    @property
    def data_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.columns if self.bits == 8 else -(-self.columns // 2)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.data_bytes + self.groups * (4 if self.symmetric else 5)

    @property
    def zero(self) -> int:
        """The code of the number 0 in a symmetric format."""
        return 8 if self.bits == 4 else 0

    def check(self, rows: Tensor) -> None:
        """Refuse a tensor that is not made of such rows.

        Raises:
            ValueError: says which shape and dtype it must have.
        """
        if rows.dim() != 2 or rows.dtype != torch.uint8 or rows.shape[1] != self.row_bytes:
            raise ValueError(
                f"a weight of {self.columns} columns in {self.bits} bits with {self.groups} scales"
                f"{'' if self.symmetric else ' and zero points'} per row is uint8 [N, {self.row_bytes}], "
                f"not {str(rows.dtype).removeprefix('torch.')} {list(rows.shape)}"
            )

    def split(self, rows: Tensor) -> Parts:
        """Take rows (uint8 ``[N, row_bytes]``) apart.

        Raises:
            ValueError: they are not of this format.
        """
        self.check(rows)
        ends = (self.data_bytes, self.data_bytes + 4 * self.groups)
        data = rows[:, : ends[0]]
        # A copy begins where float32 may begin; in the rows they lie anywhere.
        scales = rows[:, ends[0] : ends[1]].clone(memory_format=torch.contiguous_format).view(torch.float32)
        zeros = None if self.symmetric else rows[:, ends[1] :].contiguous()
        if self.bits == 8:
            return Parts(data.contiguous().view(torch.int8), scales, None if zeros is None else zeros.view(torch.int8))
        codes = torch.stack((data & 15, data >> 4), -1).flatten(1)[:, : self.columns]
        return Parts(codes.contiguous(), scales, zeros)

    def join(self, parts: Parts) -> Tensor:
        """The rows that :meth:`split` takes apart."""
        codes = parts.codes
        if self.bits == 4:
            if self.columns % 2:
                codes = torch.nn.functional.pad(codes, (0, 1))
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        pieces = [codes.contiguous().view(torch.uint8), parts.scales.contiguous().view(torch.uint8)]
        if parts.zeros is not None:
            pieces.append(parts.zeros.contiguous().view(torch.uint8))
        return torch.cat(pieces, 1)

    def values(self, rows: Tensor) -> Tensor:
        """What rows (uint8 ``[..., row_bytes]``) stand for: float32 ``[..., columns]``."""
        flat = rows.reshape(-1, rows.shape[-1])
        result = torch.empty((len(flat), self.columns), device=rows.device)
        count = max(1, _CHUNK // max(1, self.columns))
        for part, into in zip(flat.split(count), result.split(count), strict=True):
            self._values(part, into)
        return result.reshape(*rows.shape[:-1], self.columns)

    def _values(self, rows: Tensor, into: Tensor) -> None:
        self.check(rows)
        data, scales = rows[:, : self.data_bytes], rows[:, self.data_bytes : self.data_bytes + 4 * self.groups]
        scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float32)
        zeros: Tensor | int = self.zero
        if not self.symmetric:
            stored = rows[:, self.data_bytes + 4 * self.groups :]
            zeros = self._by_column((stored.view(torch.int8) if self.bits == 8 else stored).float())
        if self.bits == 8:
            into.copy_(data.view(torch.int8))
        else:
            into[:, ::2].copy_(data & 15)
            into[:, 1::2].copy_(data[:, : self.columns // 2] >> 4)
        parts = self._by_group(into)
        if not (isinstance(zeros, int) and zeros == 0):
            parts.sub_(zeros)
        parts.mul_(self._by_column(scales))

    def _by_group(self, values: Tensor) -> Tensor:
        """A view of ``[N, columns]`` with an axis of groups, where all have as many columns."""
        even = self.columns == self.groups * self.group_columns
        return values.view(len(values), self.groups, self.group_columns) if even else values

    def _by_column(self, parameters: Tensor) -> Tensor:
        """Parameters of groups, ``[N, groups]``, in a shape that broadcasts to :meth:`_by_group`."""
        if self.columns == self.groups * self.group_columns:
            return parameters.unsqueeze(-1)
        return parameters.repeat_interleave(self.group_columns, 1)[:, : self.columns]

"""What convolutions and pools share: strides, dilations and padding over the spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .registry import Node


@dataclass(frozen=True)
class Windows:
    """Geometry of a sliding window, one entry per spatial axis; sizes may be symbolic."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[Any, ...]
    ends: tuple[Any, ...]

    @staticmethod
    def of(node: Node, x: torch.Tensor, kernel: Sequence[int]) -> Windows:
        """From a node's attributes; ``auto_pad`` is worked out from the input's sizes."""
        rank = len(kernel)
        strides = node.get("strides") or [1] * rank
        dilations = node.get("dilations") or [1] * rank
        pads = node.get("pads") or [0] * (2 * rank)
        begins, ends = pads[:rank], pads[rank:]
        mode = node.get("auto_pad", "NOTSET")
        if mode == "VALID":
            begins = ends = [0] * rank
        elif mode in ("SAME_UPPER", "SAME_LOWER"):
            begins, ends = [], []
            for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
                reach = (k - 1) * d + 1
                total = reach - 1 if s == 1 else torch.sym_max(((n + s - 1) // s - 1) * s + reach - n, 0)
                small = total // 2
                begins.append(small if mode == "SAME_UPPER" else total - small)
                ends.append(total - small if mode == "SAME_UPPER" else small)
        return Windows(tuple(kernel), tuple(strides), tuple(dilations), tuple(begins), tuple(ends))

    @property
    def reach(self) -> tuple[int, ...]:
        """Elements from a window's first to its last, inclusive."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def symmetric(self) -> bool:
        """Whether both ends are padded alike, by plain numbers."""
        return all(isinstance(n, int) for n in (*self.begins, *self.ends)) and self.begins == self.ends

    def rounded_up(self, sizes: Sequence[Any]) -> Windows:
        """With the ends padded further where ``ceil_mode`` adds a window that begins inside input or left padding."""
        ends = []
        for i, n in enumerate(sizes):
            span, s = n + self.begins[i] + self.ends[i] - self.reach[i], self.strides[i]
            count = (span + s - 1) // s + 1
            inside = (count - 1) * s < n + self.begins[i]  # on a symbolic size this leaves a guard
            count = count if inside else count - 1
            ends.append(self.ends[i] + torch.sym_max((count - 1) * s - span, 0))
        return Windows(self.kernel, self.strides, self.dilations, self.begins, tuple(ends))

    def pad(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """The input with its padding made explicit."""
        if all(isinstance(n, int) and n == 0 for n in (*self.begins, *self.ends)):
            return x
        flat = [n for i in reversed(range(len(self.kernel))) for n in (self.begins[i], self.ends[i])]
        return F.pad(x, flat, value=value)

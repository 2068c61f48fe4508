"""What ``benchmarks.kernels`` measures: one layer's kernel and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

POINTERS = "const float *restrict x = buf[0]; const float *restrict w = buf[1]; float *restrict y = buf[2];"


@dataclass(frozen=True)
class Case:
    """One layer: the kernel's source and arguments, and what PyTorch, and BLAS where it can, do for it."""

    name: str
    flops: int
    source: str
    arrays: Sequence[np.ndarray]
    units: int
    torch_call: Callable[[], object]
    dtype: str = "float32"
    blas_call: Callable[[], object] | None = None


def random(*shape: int) -> np.ndarray:
    """Normal numbers, the same each time."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)

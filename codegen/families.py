"""The kernel families by name: what a region's ``family`` selects."""

from __future__ import annotations

from .attention import attention_family
from .convolution import convolution_family
from .matmul import matmul_family
from .regions import Family, loop_family

FAMILIES: dict[str, Family] = {
    "attention": attention_family,
    "loop": loop_family,
    "matmul": matmul_family,
    "convolution": convolution_family,
}

"""The kernel families of the Triton dialect by name: what a region's ``family`` selects."""

from __future__ import annotations

from ..regions import Family
from .attention import attention_family
from .convolution import convolution_family
from .loops import loop_family
from .matmul import matmul_family
from .paged import cache_append_family, paged_attention_family
from .quantized import quantized_family

FAMILIES: dict[str, Family] = {
    "attention": attention_family,
    "loop": loop_family,
    "matmul": matmul_family,
    "convolution": convolution_family,
    "quantized": quantized_family,
    "cache_append": cache_append_family,
    "paged_attention": paged_attention_family,
}

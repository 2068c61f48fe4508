"""How programs that share a tile hand their sums over, in the PTX: nothing of it shows where programs run in turn."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional

from tilewright.codegen.triton.families import FAMILIES


class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2048, 64)

    def forward(self, x):
        return self.linear(x)


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(512, 64, 3, padding=1)

    def forward(self, x):
        return self.convolution(x)


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v)


CASES = {
    "matmul": (Product, lambda: (torch.randn(128, 2048).half(),)),
    "convolution": (Convolution, lambda: (torch.randn(1, 512, 7, 7).half(),)),
    "attention": (Attention, lambda: tuple(torch.randn(1, 2, n, 64).half() for n in (1, 600, 600))),
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CASES)
def test_sums_are_stored_before_they_are_counted_and_counted_before_they_are_read(name, arch, lowered, compile_cubin):
    """In this order, with a barrier of all threads between: stores, the count, loads past the first-level cache."""
    module, given = CASES[name]
    model = lowered(module().half(), given(), passes=True, families=FAMILIES)
    (kernel,) = (kernel for kernel in model.kernels.values() if "counters" in kernel.text)
    tile = next(tile for tile in kernel.tiles if tile.values().get("SPLIT_K", 2) > 1)
    ptx = compile_cubin(kernel.text, kernel.name, kernel.signature, tile, arch).ptx
    before, count, after = re.split(r"(atom\.global\.gpu\.acq_rel\.add[^;]*;)", ptx)
    assert "st.global" in before and "bar.sync" in before[before.rindex("st.global") :], count
    assert "bar.sync" in after[: after.index("ld.global")]
    sums = [kind for kind in re.findall(r"ld\.global(\.[a-z]+)?[^;]*;", after)]
    assert sums[0] == ".cg"
    assert re.search(r"st\.global[.\w]*b32", after), "the counter is zero again"

"""Winograd kernels for ``benchmarks.kernels``: the 3x3 layers of ResNet-50 and U-Net.

Operations are those of direct convolution, so that rows compare with those of the direct kernels; the share of the
limit then exceeds 100 %. Where PyTorch takes Winograd's algorithm too, so do its operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from tilewright.codegen.c import packing
from tilewright.codegen.c.winograd import BANDS, MOST, Choice, scratch_floats, winograd_units
from tilewright.codegen.c.winograd_matrices import pack_winograd
from tilewright.codegen.templating import Hole, render

from .kernels_case import POINTERS, Case, random


def winograd_layers() -> Iterator[Case]:
    """Every layer with both sizes of tiles."""
    for network, ic, oc, size in (
        ("resnet", 64, 64, 56), ("resnet", 128, 128, 28), ("resnet", 256, 256, 14), ("resnet", 512, 512, 7),
        ("unet", 32, 32, 128), ("unet", 64, 32, 128), ("unet", 64, 64, 64), ("unet", 128, 64, 64),
        ("unet", 128, 128, 32), ("unet", 256, 128, 32), ("unet", 256, 256, 16), ("unet", 512, 512, 8),
    ):  # fmt: skip
        for tile in (2, 4):
            yield winograd(f"{network} {ic} to {oc}, {size}x{size}, winograd{tile}", ic, oc, size, tile)


def winograd(name: str, ic: int, oc: int, size: int, tile: int) -> Case:
    """A convolution with a margin of 1, and a ReLU."""
    blocks = -(-oc // 16)
    source = render(
        "winograd.c.jinja", name="kernel", prelude=f"{POINTERS} float *restrict scratch = buf[3];", N=1, H=size, W=size,
        OH=size, OW=size, IC=ic, OC=oc, TILE=tile, GROUPS=1, MOST=MOST, BANDS=BANDS, padding=(1, 1), x_base="x",
        w_base="w", scratch="scratch",
        epilogue=Hole(
            f"float *restrict to = y + ((n * {blocks} + cb) * {size * size} + p) * 16;", "to[lane] = acc > 0 ? acc : 0;"
        ),
    )  # fmt: skip
    x, weight = random(1, ic, size, size), random(oc, ic, 3, 3)
    units = int(winograd_units(1, size, size, Choice(tile)))
    arrays = [
        packing.block_channels(x),
        pack_winograd(weight, tile),
        np.empty(blocks * size * size * 16, np.float32),
        np.empty(units * scratch_floats(ic, tile), np.float32),
    ]
    call = functools.partial(torch.conv2d, torch.from_numpy(x), torch.from_numpy(weight), padding=1)
    return Case(name, 2 * size * size * oc * ic * 9, source, arrays, units, call)

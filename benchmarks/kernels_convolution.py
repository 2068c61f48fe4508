"""Convolutions for ``benchmarks.kernels``: layers of ResNet-50, MobileNetV3 and ViT in float32 and in bfloat16.

Images are channels-blocked in the precision of the layer, but for the first layers of a network, which read float32 in
rows. The results are stored in the precision of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tilewright.codegen.c import packing
from tilewright.codegen.templating import Hole, render

from .kernels_case import Case, random


def convolutions() -> Iterator[Case]:
    """Every layer in both precisions."""
    for bf16 in (False, True):
        for ic, oc, size, kernel, stride in (
            (64, 64, 56, 1, 1), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1), (256, 64, 56, 1, 1), (128, 128, 56, 3, 2),
            (256, 512, 56, 1, 2), (512, 128, 28, 1, 1), (128, 128, 28, 3, 1), (128, 512, 28, 1, 1),
            (256, 256, 14, 3, 1), (1024, 256, 14, 1, 1), (256, 1024, 14, 1, 1), (512, 512, 14, 3, 2),
            (1024, 2048, 14, 1, 2), (2048, 512, 7, 1, 1), (512, 512, 7, 3, 1), (512, 2048, 7, 1, 1),
        ):  # fmt: skip
            name = f"resnet {ic} to {oc}, {size}x{size}, {kernel}x{kernel}/{stride}"
            yield convolution(name, ic, oc, size, kernel, stride, bf16)
        yield gathered("resnet stem 7x7/2", 3, 64, 224, 7, 2, 3, bf16)
        yield gathered("mobilenet stem 3x3/2", 3, 16, 224, 3, 2, 1, bf16)
        yield gathered("vit patches 16x16/16", 3, 768, 224, 16, 16, 0, bf16)
        for channels, size, kernel, stride in (
            (16, 112, 3, 1), (64, 112, 3, 2), (72, 56, 5, 2), (120, 28, 5, 1), (480, 14, 3, 1), (960, 7, 5, 1),
        ):  # fmt: skip
            name = f"mobilenet depthwise {channels}, {size}, {kernel}x{kernel}/{stride}"
            yield depthwise(name, channels, size, kernel, stride, bf16)


class Layer:
    """What the templates of a layer have in common, its arrays, and PyTorch's operands."""

    def __init__(self, ic: int, oc: int, size: int, kernel: int, stride: int, padding: int, bf16: bool, groups: int):
        self.bf16 = bf16
        out = (size + 2 * padding - kernel) // stride + 1
        self.out, self.flops = out, 2 * out * out * oc * (ic // groups) * kernel * kernel
        self.x = torch.from_numpy(random(1, ic, size, size))
        self.weight = torch.from_numpy(random(oc, ic // groups, kernel, kernel))
        blocks = -(-oc // 16)
        self.y = np.empty(blocks * out * out * 16, np.uint16 if bf16 else np.float32)
        to = f"y + ((n * {blocks} + cb) * {out * out} + p) * 16"
        if bf16:
            finish = "tw_store_bf16(to + tw_lane0, kept, tw_lane1 - tw_lane0);"
            element = "kept[lane - tw_lane0] = acc > 0 ? acc : 0;"
            epilogue = Hole(f"uint16_t *restrict to = {to}; float kept[16] TW_ALIGNED;", element, finish)
        else:
            epilogue = Hole(f"float *restrict to = {to};", "to[lane] = acc > 0 ? acc : 0;")
        self.context = {
            "name": "kernel", "kind": "bf16" if bf16 else "f32", "H": size, "W": size, "OH": out, "OW": out,
            "KH": kernel, "KW": kernel, "stride": (stride, stride), "padding": (padding, padding), "dilation": (1, 1),
            "w_base": "w", "epilogue": epilogue,
        }  # fmt: skip
        self.options = {"stride": stride, "padding": padding, "groups": groups}

    def case(self, name: str, template: str, x: np.ndarray, w: np.ndarray, units: int, **context: object) -> Case:
        """The layer as a case."""
        image, weight = ("uint16_t" if array.dtype == np.uint16 else "float" for array in (x, w))
        result = "uint16_t" if self.bf16 else "float"
        prelude = (
            f"const {image} *restrict x = buf[0]; const {weight} *restrict w = buf[1]; {result} *restrict y = buf[2];"
        )
        source = '#include "tw_narrow.h"\n' + render(template, prelude=prelude, **self.context, **context)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        tensors = self.x.to(dtype), self.weight.to(dtype)
        return Case(
            f"{'bf16 ' if self.bf16 else ''}{name}", self.flops, source, [x, w, self.y], int(units),
            lambda: torch.conv2d(*tensors, **self.options), "bfloat16" if "uint16" in str(w.dtype) else "float32",
        )  # fmt: skip

    def stored(self, tensor: torch.Tensor) -> np.ndarray:
        """A tensor in the precision of the layer, as kernels see it."""
        return tensor.bfloat16().view(torch.uint16).numpy() if self.bf16 else tensor.numpy()


def convolution(name: str, ic: int, oc: int, size: int, kernel: int, stride: int, bf16: bool) -> Case:
    layer = Layer(ic, oc, size, kernel, stride, kernel // 2, bf16, 1)
    arrays = packing.block_channels(layer.stored(layer.x)), packing.pack_convolution(layer.stored(layer.weight))
    units = packing.convolution_units(1, layer.out, layer.out, oc)
    return layer.case(name, "convolution.c.jinja", *arrays, units, N=1, IC=ic, OC=oc, groups=1, x_base="x")


def gathered(name: str, ic: int, oc: int, size: int, kernel: int, stride: int, padding: int, bf16: bool) -> Case:
    layer = Layer(ic, oc, size, kernel, stride, padding, bf16, 1)
    load = Hole(
        f"const float *restrict from = x + ((n * {ic} + ic) * {size} + ih) * {size};", "const float x_value = from[iw];"
    )
    weight, out, square = packing.pack_convolution_gathered(layer.stored(layer.weight)), layer.out, (kernel, kernel)
    units = packing.convolution_gathered_units(1, out, out, oc, 1, square, (stride, stride), (1, 1))
    return layer.case(
        name, "convolution_gathered.c.jinja", layer.x.numpy(), weight, units, IC=ic, OC=oc, groups=1, load_x=load
    )


def depthwise(name: str, channels: int, size: int, kernel: int, stride: int, bf16: bool) -> Case:
    layer = Layer(channels, channels, size, kernel, stride, kernel // 2, bf16, channels)
    arrays = packing.block_channels(layer.stored(layer.x)), packing.pack_depthwise(layer.weight.numpy())
    out, square = layer.out, (kernel, kernel)
    units = packing.depthwise_units(1, channels, out, out, square, (stride, stride), (1, 1))
    return layer.case(name, "depthwise.c.jinja", *arrays, units, C=channels, x_base="x")

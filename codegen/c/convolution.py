"""The convolution family: three templates behind one operator.

- ``convolution.c.jinja``: the input lies channels-blocked; rows of pixels stream through the register tile in place.
- ``depthwise.c.jinja``: one filter per channel, channels-blocked.
- ``convolution_gathered.c.jinja``: everything else, through the input's index function: few channels (the first layer
  of a network on RGB), other layouts, odd groups, one-dimensional and transposed convolutions.

A transposed convolution is the convolution of the input with ``stride - 1`` zeros between its pixels, with the kernel
turned around; the zeros are never stored, they are part of the index function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..anchors import find_anchor
from ..expr import Expr
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..registry import overloads
from ..storage import Packing, Storage
from ..values import LANES, Value
from . import packing
from .anchors import Anchored, c_size

PLAIN = frozenset(overloads("conv2d", "conv2d.padding", "conv1d", "conv1d.padding"))
GENERAL = frozenset(overloads("convolution"))
TRANSPOSED = frozenset(overloads("conv_transpose2d.input", "conv_transpose1d"))
TARGETS = PLAIN | GENERAL | TRANSPOSED


@dataclass(frozen=True)
class Geometry:
    """A convolution in two dimensions; a one-dimensional one has height 1.

    ``insert`` is the number of virtual pixels per input pixel (the stride of a transposed convolution, else 1);
    ``turned`` says that the weight lies as a transposed convolution's, ``[IC, OC/groups, KH, KW]``.
    """

    channels: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    insert: tuple[int, int] = (1, 1)
    rank: int = 2
    turned: bool = False


def convolution_family(task: Task) -> Sequence[Made]:
    """``epilogue(conv(x, w) + b)``."""
    anchor = find_anchor(task, TARGETS)
    x, weight, bias = (anchor.args[0], anchor.args[1], anchor.args[2] if len(anchor.args) > 2 else None)
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if anchor.meta["val"].dtype == torch.float64 or not anchor.meta["val"].is_floating_point():
        raise CompileError(
            f"{anchor}: convolutions compute in float32, not {anchor.meta['val'].dtype}; convert the model"
        )
    geometry = _geometry(anchor, weight)
    source = task.storage_of(weight) if weight.op == "placeholder" else None
    if source is None or source.recipe is None:
        raise CompileError(f"{anchor}: a convolution whose weight is not a constant is not supported")
    image = task.storage_of(x) if x.op == "placeholder" else None
    blocked = image is not None and image.layout == "channels16" and image.dtype == "float32"
    depthwise = geometry.groups == geometry.channels == geometry.outputs and geometry.groups > 1
    if blocked and depthwise and packing.can_convolve_depthwise(geometry.kernel, geometry.dilation):
        template, weights = "depthwise.c.jinja", _packing_depthwise(geometry)
    elif (
        blocked
        and not geometry.turned
        and packing.can_convolve_blocked(geometry.channels, geometry.outputs, geometry.groups, geometry.kernel)
    ):
        template, weights = "convolution.c.jinja", _packing_blocked(geometry)
    elif packing.can_gather(geometry.kernel, geometry.dilation):
        template, weights = "convolution_gathered.c.jinja", _packing_gathered(geometry)
    else:
        raise CompileError(f"{anchor}: a window of {geometry.kernel} with dilation {geometry.dilation} is too large")
    packed = task.packed(source, weights)
    frame = Frame(task, skip=[weight], extra=[packed])
    code = _build(task, anchor, frame, template, geometry, x, bias, packed, image if blocked else None)
    return [Made(code, frame.storages)]


def _geometry(anchor: fx.Node, weight: fx.Node) -> Geometry:
    """The operator's arguments, completed with their defaults."""
    shape = tuple(int(extent) for extent in weight.meta["val"].shape)
    rank = len(shape) - 2
    args: list[Any] = list(anchor.args[3:])
    transposed = anchor.target in TRANSPOSED
    if anchor.target in GENERAL:
        stride, padding, dilation, transposed, _, groups = args
    elif transposed:
        stride, padding, _, groups, dilation = args + [1, 0, 0, 1, 1][len(args) :]
    else:
        stride, padding, dilation, groups = args + [1, 0, 1, 1][len(args) :]
    steps, spread = _pair(stride, rank, 1), _pair(dilation, rank, 1)
    kernel = _pair(shape[2:], rank, 1)
    if isinstance(padding, str):
        reach = tuple((taps - 1) * step for taps, step in zip(kernel, spread, strict=True))
        margin = (0, 0) if padding == "valid" else (reach[0] // 2, reach[1] // 2)
    else:
        margin = _pair(padding, rank, 0)
    if not transposed:
        return Geometry(shape[1] * groups, shape[0], groups, kernel, steps, margin, spread, rank=rank)
    turned = tuple(step * (taps - 1) - pad for step, taps, pad in zip(spread, kernel, margin, strict=True))
    return Geometry(
        shape[0],
        shape[1] * groups,
        groups,
        kernel,
        (1, 1),
        (turned[0], turned[1]),
        spread,
        insert=steps,
        rank=rank,
        turned=True,
    )


def _pair(value: Any, rank: int, filler: int) -> tuple[int, int]:
    values: list[int] = [value] if isinstance(value, int) else [int(item) for item in value]
    if len(values) == 1:
        values = values * rank
    if rank == 1:
        values.insert(0, filler)
    return values[0], values[1]


def _filters(geometry: Geometry, weight: np.ndarray) -> np.ndarray:
    """The weight as ``[OC, IC/groups, KH, KW]``."""
    weight = weight.astype(np.float32, copy=False)
    weight = weight.reshape(*weight.shape[:2], *geometry.kernel)
    if not geometry.turned:
        return weight
    groups = geometry.groups
    inputs, outputs = geometry.channels // groups, geometry.outputs // groups
    split = weight.reshape(groups, inputs, outputs, *geometry.kernel)[..., ::-1, ::-1]
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3, 4)).reshape(geometry.outputs, inputs, *geometry.kernel)


def _packing_blocked(g: Geometry) -> Packing:
    depth = g.channels // g.groups * g.kernel[0] * g.kernel[1]
    shape = (-(-g.outputs // packing.PANEL), depth, packing.PANEL)
    return Packing("conv16", shape, lambda weight: packing.pack_convolution(_filters(g, weight)))


def _packing_gathered(g: Geometry) -> Packing:
    depth = g.channels // g.groups * g.kernel[0] * g.kernel[1]
    shape = (g.groups, -(-(g.outputs // g.groups) // packing.PANEL), depth, packing.PANEL)
    name = f"gathered{g.groups}" + ("t" if g.turned else "")
    return Packing(name, shape, lambda weight: packing.pack_convolution_gathered(_filters(g, weight), g.groups))


def _packing_depthwise(g: Geometry) -> Packing:
    shape = (-(-g.channels // LANES), *g.kernel, LANES)
    name = "depthwise16" + ("t" if g.turned else "")
    return Packing(name, shape, lambda weight: packing.pack_depthwise(_filters(g, weight)))


def _build(
    task: Task, anchor: fx.Node, frame: Frame, template: str, g: Geometry, x: fx.Node, bias: Any, packed: Storage,
    image: Storage | None,
) -> KernelCode:  # fmt: skip
    work = Anchored(task, anchor, frame)
    kernel, builder = work.kernel, work.kernel.builder
    shape = work.shape()
    source = work.operand(x)
    assert source is not None
    batchless = len(shape) == g.rank + 1
    n = 1 if batchless else shape[0]
    space = shape[-g.rank :]
    oh, ow = (1, space[0]) if g.rank == 1 else space
    in_space = source.shape[-g.rank :]
    h, w = (1, in_space[0]) if g.rank == 1 else in_space
    h, w = (_inserted(extent, step) for extent, step in zip((h, w), g.insert, strict=True))
    for name, extent in (
        ("n", n), ("cb", -(-g.outputs // LANES)), ("lane", LANES), ("p", sizes.mul(oh, ow)),
        ("ic", g.channels), ("ih", h), ("iw", w),
    ):  # fmt: skip
        kernel.variable(name, extent)

    row, column = (0, "p") if oh == 1 else (sizes.floordiv("p", ow), sizes.mod("p", ow))
    channel = sizes.add(sizes.mul("cb", LANES), "lane")
    place = (column,) if g.rank == 1 else (row, column)
    index = (channel, *place) if batchless else ("n" if n != 1 else 0, channel, *place)
    bias_value = work.operand(bias)

    def acc(total: Expr) -> Expr:
        if bias_value is None:
            return total
        term = builder.cast(bias_value.at((channel,)), "float32")
        return builder.call("add", "float32", total, term)

    context: dict[str, object] = {}
    if template == "convolution_gathered.c.jinja":
        image_value = _virtual(work, source, g, batchless)
        context["load_x"] = work.read(image_value, ("n", "ic", "ih", "iw"), ("n", "ic", "ih"), "iw", "x_value")
        units = packing.convolution_gathered_units(n, oh, ow, g.outputs, g.groups, g.kernel, g.stride, g.dilation)
    else:
        assert image is not None
        context["x_base"] = frame.name(image)
        if template == "depthwise.c.jinja":
            units = packing.depthwise_units(n, g.channels, oh, ow, g.kernel, g.stride, g.dilation)
        else:
            units = packing.convolution_units(n, oh, ow, g.outputs)
    if template == "depthwise.c.jinja":
        context["C"] = g.channels
    else:
        context |= {"IC": g.channels, "OC": g.outputs, "groups": g.groups}
    context["epilogue"] = work.epilogue(index, ("n", "cb", "p"), "lane", acc)
    work_per_output = g.channels // g.groups * g.kernel[0] * g.kernel[1] * 2 // (g.insert[0] * g.insert[1])
    return work.code(
        template,
        family="convolution",
        units=units,
        flops=sizes.mul(n, oh, ow, g.outputs, max(work_per_output, 1)),
        H=c_size(h),
        W=c_size(w),
        OH=c_size(oh),
        OW=c_size(ow),
        KH=g.kernel[0],
        KW=g.kernel[1],
        stride=g.stride,
        dilation=g.dilation,
        padding=g.padding,
        w_base=frame.name(packed),
        **context,
    )


def _inserted(extent: Size, step: int) -> Size:
    """Pixels along an axis with ``step - 1`` zeros between neighbours."""
    return extent if step == 1 else sizes.add(sizes.mul(sizes.add(extent, -1), step), 1)


def _virtual(work: Anchored, source: Value, g: Geometry, batchless: bool) -> Value:
    """The input as ``[n, ic, ih, iw]``, with the zeros that a transposed convolution puts between its pixels."""
    builder, kernel = work.kernel.builder, work.kernel

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        n, channel, *space = index
        kept: Expr | None = None
        own: list[Size] = []
        for position, step in zip(space, g.insert, strict=True):
            quotient, remainder = kernel.split(position, step)
            own.append(quotient)
            if step != 1:
                kept = builder.all_of(
                    kept, builder.call("eq", "bool", builder.index(remainder), builder.const(0, "int64"))
                )
        if g.rank == 1:
            own = own[1:]
        where = (channel, *own) if batchless else (n, channel, *own)
        value = builder.cast(source.at(where, builder.all_of(mask, kept)), "float32")
        return value if kept is None else builder.call("where", "float32", kept, value, builder.const(0, "float32"))

    return Value((), "float32", at)

"""The convolution family: three templates behind one operator.

- ``convolution.c.jinja``: the input lies channels-blocked; rows of pixels stream through the register tile in place.
- ``depthwise.c.jinja``: one filter per channel, channels-blocked.
- ``winograd.c.jinja``: 3x3 convolutions for which ``winograd_selection.py`` chose it.
- ``convolution_gathered.c.jinja``: everything else, through the input's index function: few channels (the first layer
  of a network on RGB), other layouts, odd groups, one-dimensional and transposed convolutions.

A bfloat16 convolution multiplies words of two elements and sums in float32; depthwise ones have no use for words and
multiply in float32. Any other half precision is converted and computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...runtime import sizes
from ...runtime.errors import CompileError
from ..geometry import TARGETS, Convolution, Geometry, convolution_of, filters, images_of, virtual_input, with_bias
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from ..values import LANES
from . import packing, winograd
from .anchors import Anchored, Narrow, c_size
from .machine import MACHINES

__all__ = ["TARGETS", "convolution_family"]


def convolution_family(task: Task) -> Sequence[Made]:
    """``epilogue(conv(x, w) + b)``."""
    found = convolution_of(task)
    geometry, x = found.geometry, found.x
    image = task.storage_of(x) if x.op == "placeholder" else None
    dtype = "bfloat16" if found.dtype == "bfloat16" else "float32"
    blocked = image is not None and image.layout == "channels16" and image.dtype == dtype
    choice = task.node.meta.get(winograd.META)
    if choice is not None:
        assert image is not None and winograd.refuse(found, image) is None
        return [winograd.winograd(task, found, image, choice)]
    if blocked and geometry.depthwise and packing.can_convolve_depthwise(geometry.kernel, geometry.dilation):
        template, weights = "depthwise.c.jinja", _packing_depthwise(geometry)
    elif blocked and not geometry.turned and _fills_blocks(geometry, dtype):
        template, weights = "convolution.c.jinja", _packing_blocked(geometry, dtype)
    elif packing.can_gather(geometry.kernel, geometry.dilation):
        template, weights = "convolution_gathered.c.jinja", _packing_gathered(geometry, dtype)
    else:
        raise CompileError(
            f"{found.anchor}: a window of {geometry.kernel} with dilation {geometry.dilation} is too large"
        )
    packed = task.packed(found.source, weights)
    frame = Frame(task, skip=[found.weight], extra=[packed])
    code = _build(task, found, frame, template, packed, image if blocked else None, dtype)
    return [Made(code, frame.storages)]


def _fills_blocks(g: Geometry, dtype: str) -> bool:
    """Whether ``convolution.c.jinja`` takes it: no word may reach into the lanes beyond the last channel."""
    whole = dtype == "float32" or g.channels // g.groups % 2 == 0
    return whole and packing.can_convolve_blocked(g.channels, g.outputs, g.groups, g.kernel)


def _packing_blocked(g: Geometry, dtype: str) -> Packing:
    panels, depth = -(-g.outputs // packing.PANEL), g.depth
    shape = (panels, depth, packing.PANEL) if dtype == "float32" else (panels, depth // 2, packing.PANEL, 2)
    return Packing("conv16", shape, lambda weight: packing.pack_convolution(filters(g, weight)), dtype)


def _packing_gathered(g: Geometry, dtype: str) -> Packing:
    outer, width = (g.groups, -(-(g.outputs // g.groups) // packing.PANEL)), g.kernel[1]
    segments = g.depth // width
    shape: tuple[int, ...] = (*outer, g.depth, packing.PANEL)
    if dtype != "float32":
        shape = (*outer, -(-segments // 2) * width, packing.PANEL, 2)
    name = f"gathered{g.groups}" + ("t" if g.turned else "")
    return Packing(name, shape, lambda weight: packing.pack_convolution_gathered(filters(g, weight), g.groups), dtype)


def _packing_depthwise(g: Geometry) -> Packing:
    shape = (-(-g.channels // LANES), *g.kernel, LANES)
    name = "depthwise16" + ("t" if g.turned else "")
    return Packing(name, shape, lambda weight: packing.pack_depthwise(filters(g, weight)))


def _build(
    task: Task, found: Convolution, frame: Frame, template: str, packed: Storage, image: Storage | None, dtype: str
) -> KernelCode:
    g = found.geometry
    work = Anchored(task, found.anchor, frame)
    kernel = work.kernel
    images = images_of(work, found.x, g)
    n, oh, ow = images.n, images.oh, images.ow
    for name, extent in (
        ("n", n), ("cb", -(-g.outputs // LANES)), ("lane", LANES), ("p", sizes.mul(oh, ow)),
        ("ic", g.channels), ("ih", images.h), ("iw", images.w),
    ):  # fmt: skip
        kernel.variable(name, extent)

    row, column = (0, "p") if oh == 1 else (sizes.floordiv("p", ow), sizes.mod("p", ow))
    channel = sizes.add(sizes.mul("cb", LANES), "lane")
    index = images.result_index("n", channel, row, column)
    context: dict[str, Any] = {}
    if template == "convolution_gathered.c.jinja":
        value = virtual_input(work, images)
        context["load_x"] = work.read(value, ("n", "ic", "ih", "iw"), ("n", "ic", "ih"), "iw", "x_value")
        units = packing.convolution_gathered_units(n, oh, ow, g.outputs, g.groups, g.kernel, g.stride, g.dilation)
    else:
        assert image is not None
        context["x_base"] = frame.name(image)
        if template == "depthwise.c.jinja":
            units = packing.depthwise_units(n, g.channels, oh, ow, g.kernel, g.stride, g.dilation)
        else:
            units = packing.convolution_units(n, oh, ow, g.outputs)
            if isinstance(oh, int) and isinstance(ow, int):
                context["rows_used"] = {one.rows: packing.tile_rows(oh * ow, one.rows) for one in MACHINES}
    if template == "depthwise.c.jinja":
        context["C"] = g.channels
    else:
        context |= {"IC": g.channels, "OC": g.outputs, "groups": g.groups}
    narrow = Narrow("tw_lane0", "tw_lane1 - tw_lane0", LANES)
    acc = with_bias(work, found.bias, channel)
    context["epilogue"] = work.epilogue(index, ("n", "cb", "p"), "lane", acc, narrow=narrow)
    return work.code(
        template,
        family="convolution",
        units=units,
        kind="bf16" if dtype == "bfloat16" else "f32",
        N=c_size(n),
        flops=g.flops(n, oh, ow),
        H=c_size(images.h),
        W=c_size(images.w),
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

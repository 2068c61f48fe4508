"""What the convolution families of all dialects share: an operator's geometry, and its operands in two dimensions.

A transposed convolution is the convolution of the input with ``stride - 1`` zeros between its pixels, with the kernel
turned around; the zeros are never stored, they are part of the index function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from ..runtime import sizes
from ..runtime.errors import CompileError, UnsupportedOperator
from ..runtime.sizes import Size
from .anchors import Anchored, find_anchor
from .expr import Expr
from .regions import Task
from .registry import overloads
from .storage import Storage
from .values import Value, dtype_name

PLAIN = frozenset(overloads("conv2d", "conv2d.padding", "conv1d", "conv1d.padding"))
GENERAL = frozenset(overloads("convolution"))
TRANSPOSED = frozenset(overloads("conv_transpose2d.input", "conv_transpose1d"))
TARGETS = PLAIN | GENERAL | TRANSPOSED
COMPUTED = ("float32", "float16", "bfloat16")
"""Dtypes that the templates convolve."""


@dataclass(frozen=True)
class Geometry:
    """A convolution in two dimensions; a one-dimensional one has height 1.

    ``insert`` is the number of virtual pixels per input pixel (the stride of a transposed convolution, else 1);
    ``turned`` says that the weight lies as a transposed convolution's, ``[IC, OC/groups, KH, KW]``; ``reaches`` says by
    axis whether windows may reach over the edge of the image.
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
    reaches: tuple[bool, bool] = (True, True)

    @property
    def depthwise(self) -> bool:
        """Whether every channel has one filter of its own."""
        return self.groups == self.channels == self.outputs and self.groups > 1

    @property
    def taps(self) -> int:
        """Pixels in a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def depth(self) -> int:
        """Products that add up to one element of the result, those with inserted zeros included."""
        return self.channels // self.groups * self.taps

    def flops(self, n: Size, oh: Size, ow: Size) -> Size:
        """Arithmetic operations for results of ``oh`` x ``ow`` pixels."""
        per_output = self.depth * 2 // (self.insert[0] * self.insert[1])
        return sizes.mul(n, oh, ow, self.outputs, max(per_output, 1))


@dataclass(frozen=True)
class Convolution:
    """A region's convolution: its operator and operands, and the constant that holds the weight."""

    anchor: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: Any
    geometry: Geometry
    source: Storage

    @property
    def dtype(self) -> str:
        """Of the operands and the result."""
        return dtype_name(self.anchor.meta["val"].dtype)


def convolution_of(task: Task) -> Convolution:
    """The convolution that a region is built around.

    Raises:
        UnsupportedOperator: it has three dimensions.
        CompileError: it is not computed in float32 or less, or its weight is not a constant.
    """
    anchor = find_anchor(task, TARGETS)
    x, weight, bias = (anchor.args[0], anchor.args[1], anchor.args[2] if len(anchor.args) > 2 else None)
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    dtype = anchor.meta["val"].dtype
    if dtype_name(dtype) not in COMPUTED:
        raise CompileError(f"{anchor}: convolutions compute in float32, not {dtype}; convert the model")
    geometry = geometry_of(anchor, weight)
    source = task.storage_of(weight) if weight.op == "placeholder" else None
    if source is None or source.recipe is None:
        raise CompileError(f"{anchor}: a convolution whose weight is not a constant is not supported")
    return Convolution(anchor, x, weight, bias, geometry, source)


def geometry_of(anchor: fx.Node, weight: fx.Node) -> Geometry:
    """The operator's arguments, completed with their defaults.

    Raises:
        UnsupportedOperator: it has three dimensions.
    """
    shape = tuple(int(extent) for extent in weight.meta["val"].shape)
    rank = len(shape) - 2
    if rank not in (1, 2):
        raise UnsupportedOperator(
            f"{anchor}: convolutions in {rank} dimensions cannot be compiled, those in 1 and 2 can"
        )
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
        if padding == "valid":
            reach = (0, 0)
        margin = (reach[0] // 2, reach[1] // 2)
        reaches = (reach[0] > 0, reach[1] > 0)
    else:
        margin = _pair(padding, rank, 0)
        reaches = (margin[0] > 0, margin[1] > 0)
    if not transposed:
        return Geometry(
            shape[1] * groups, shape[0], groups, kernel, steps, margin, spread, rank=rank, reaches=reaches
        )  # fmt: skip
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
        reaches=(rank == 2, True),
    )


def _pair(value: Any, rank: int, filler: int) -> tuple[int, int]:
    values: list[int] = [value] if isinstance(value, int) else [int(item) for item in value]
    if len(values) == 1:
        values = values * rank
    if rank == 1:
        values.insert(0, filler)
    return values[0], values[1]


def filters(geometry: Geometry, weight: np.ndarray) -> np.ndarray:
    """The weight as ``[OC, IC/groups, KH, KW]``."""
    weight = weight.reshape(*weight.shape[:2], *geometry.kernel)
    if not geometry.turned:
        return weight
    groups = geometry.groups
    inputs, outputs = geometry.channels // groups, geometry.outputs // groups
    split = weight.reshape(groups, inputs, outputs, *geometry.kernel)[..., ::-1, ::-1]
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3, 4)).reshape(geometry.outputs, inputs, *geometry.kernel)


@dataclass(frozen=True)
class Images:
    """The operands and the result of a convolution as images.

    Attributes:
        batchless: whether they have no batch axis; then ``n`` is 1.
        n: images.
        h, w: height and width of the input, with the inserted zeros.
        oh, ow: height and width of the result.
        source: the input.
    """

    batchless: bool
    n: Size
    h: Size
    w: Size
    oh: Size
    ow: Size
    source: Value
    geometry: Geometry

    def result_index(self, n: Size, channel: Size, row: Size, column: Size) -> tuple[Size, ...]:
        """The result's logical index."""
        place = (column,) if self.geometry.rank == 1 else (row, column)
        return (channel, *place) if self.batchless else (n if self.n != 1 else 0, channel, *place)


def images_of(work: Anchored, x: fx.Node, g: Geometry) -> Images:
    """The images of a convolution of ``x``."""
    shape, source = work.shape(), work.operand(x)
    assert source is not None
    batchless = len(shape) == g.rank + 1
    n = 1 if batchless else shape[0]
    space, in_space = shape[-g.rank :], source.shape[-g.rank :]
    oh, ow = (1, space[0]) if g.rank == 1 else space
    h, w = (1, in_space[0]) if g.rank == 1 else in_space
    h, w = (_inserted(extent, step) for extent, step in zip((h, w), g.insert, strict=True))
    return Images(batchless, n, h, w, oh, ow, source, g)


def _inserted(extent: Size, step: int) -> Size:
    """Pixels along an axis with ``step - 1`` zeros between neighbours."""
    return extent if step == 1 else sizes.add(sizes.mul(sizes.add(extent, -1), step), 1)


def virtual_input(work: Anchored, images: Images) -> Value:
    """The input as ``[n, ic, ih, iw]``, with the zeros that a transposed convolution puts between its pixels."""
    builder, kernel, g = work.kernel.builder, work.kernel, images.geometry

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
        where = (channel, *own) if images.batchless else (n, channel, *own)
        value = builder.cast(images.source.at(where, builder.all_of(mask, kept)), "float32")
        return value if kept is None else builder.call("where", "float32", kept, value, builder.const(0, "float32"))

    return Value((), "float32", at)


def with_bias(work: Anchored, bias: Any, channel: Size) -> Any:
    """A function from the raw sum to the convolution's value at a channel."""
    builder, value = work.kernel.builder, work.operand(bias)

    def acc(total: Expr) -> Expr:
        if value is None:
            return total
        return builder.call("add", "float32", total, builder.cast(value.at((channel,)), "float32"))

    return acc

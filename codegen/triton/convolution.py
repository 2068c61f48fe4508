"""The convolution family of the Triton dialect: three templates behind one operator.

- ``convolution.py.jinja``: an image in channels_last with at least 16 channels per group, as a product of matrices;
  with fewer channels where rows of a window lie inside of the image (patch embeddings).
- ``convolution_gathered.py.jinja``: the same through the input's index function: few channels (the first layer of a
  network on RGB), other layouts, small groups, one-dimensional and transposed convolutions.
- ``depthwise.py.jinja``: one input channel per group.

Weights are packed with the terms of one output channel in a row of whole 16 bytes, in the dtype of the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...runtime import sizes
from ...runtime.plan_check import ITEM_BYTES
from ...runtime.sizes import Size
from ..expr import Load
from ..geometry import (
    TARGETS,
    Convolution,
    Geometry,
    Images,
    convolution_of,
    filters,
    images_of,
    virtual_input,
    with_bias,
)
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from . import dialect
from .anchors import Anchored
from .convolution_tiles import Choice, Shape, depthwise_tiles, product_tiles
from .emit import Var, merge_shapes
from .frame import COUNTERS as COUNTERS_STORAGE
from .frame import Extra

__all__ = ["TARGETS", "convolution_family"]

LEAST_RUN = 16
"""Neighbouring terms from which on they are read as one run of elements."""

_MOST_TAPS = 32  # along an axis, where a bit says whether a tap lies inside


def convolution_family(task: Task) -> Sequence[Made]:
    """``epilogue(conv(x, w) + b)``."""
    found = convolution_of(task)
    g = found.geometry
    image = task.storage_of(found.x) if found.x.op == "placeholder" else None
    last = image is not None and image.layout == "channels_last"
    if g.groups == g.channels and g.groups > 1:
        packed = task.packed(found.source, _packing(g, "hwoi", found.dtype))
        return [_depthwise(task, found, packed)]
    run = 0
    if last and not g.turned and max(g.kernel) <= _MOST_TAPS:
        run = _run(g)
    order = "ohwi" if last or g.taps == 1 else "oihw"
    packed = task.packed(found.source, _packing(g, order, found.dtype))
    return [_Product(task, found, packed, order, run).made()]


def _run(g: Geometry) -> int:
    """How many terms of a window lie side by side in channels_last, 0 where they are too few to be read together."""
    run = g.channels // g.groups
    if run < LEAST_RUN and g.groups == 1 and g.dilation[1] == 1 and not g.reaches[1]:
        run *= g.kernel[1]
    return run if run >= LEAST_RUN else 0


def _packing(g: Geometry, order: str, dtype: str) -> Packing:
    """The weight with its axes in an order, in rows that are filled up: one per channel, for ``"hwoi"`` one per tap."""
    rows, length = (g.taps, g.outputs) if order == "hwoi" else (g.outputs, g.depth)
    row = _row(length, dtype)
    axes = ["oihw".index(axis) for axis in order]

    def pack(weight: np.ndarray) -> np.ndarray:
        moved = filters(g, weight).transpose(axes).reshape(rows, length)
        packed = np.zeros((rows, row), weight.dtype)
        packed[:, :length] = moved
        return packed

    return Packing(f"{order}{g.groups}t" if g.turned else order, (rows, row), pack, dtype)


def _row(length: int, dtype: str) -> int:
    """Elements of a row, filled up to whole 16 bytes."""
    whole = 16 // ITEM_BYTES[dtype]
    return -(-length // whole) * whole


@dataclass
class _Work:
    """One kernel under construction: the region, its images, and the pixels of all results."""

    work: Anchored
    images: Images
    pixels: Size

    @classmethod
    def of(cls, task: Task, found: Convolution, packed: Storage) -> _Work:
        frame = Frame(task, skip=[found.weight], extra=[packed])
        work = Anchored(task, found.anchor, frame)
        images = images_of(work, found.x, found.geometry)
        pixels = sizes.mul(images.n, images.oh, images.ow)
        for name, extent in (
            ("m", pixels), ("pixel", pixels), ("c", found.geometry.outputs), ("n", images.n),
            ("ic", found.geometry.channels), ("ih", images.h), ("iw", images.w), ("k", found.geometry.depth),
        ):  # fmt: skip
            work.kernel.variable(name, extent)
        return cls(work, images, pixels)

    def epilogue(self, found: Convolution, guard: str) -> str:
        """The stores of ``acc``; ``guard`` is the mask of the channels."""
        n, row, column = self._place("m")
        index = self.images.result_index(n, "c", row, column)
        variables = {
            "m": Var("m[:, None]", ("BLOCK_M", "1"), "live[:, None]"),
            "c": Var("c[None, :]", ("1", "BLOCK_N"), guard),
        }
        return self.work.epilogue(index, variables, with_bias(self.work, found.bias, "c"), ("BLOCK_M", "BLOCK_N"))

    @property
    def n(self) -> Size:
        """The image that a template works on."""
        return 0 if self.images.n == 1 else "n"

    def _place(self, pixel: str) -> tuple[Size, Size, Size]:
        """Image, row and column of one of all pixels."""
        row, column = self.work.kernel.split(pixel, self.images.ow)
        n, row = self.work.kernel.split(row, self.images.oh)
        return n, row, column

    def _windows(self, g: Geometry) -> str:
        """Statements for where the window of a pixel begins."""
        n, *place = self._place("pixel")
        corner = (
            sizes.add(sizes.mul(axis, step), -margin)
            for axis, step, margin in zip(place, g.stride, g.padding, strict=True)
        )
        blocks = dict(zip(("top", "left"), corner, strict=True)) | ({"n": n} if n != 0 else {})
        return "\n".join(f"{name} = {_block(size, 'pixel')}" for name, size in blocks.items())

    def load(self, variables: dict[str, Var], channel: Size, inside: tuple[str, ...], name: str, dtype: str) -> str:
        """A hole that assigns a block of the input to a name, 0 where the mask ``inside`` of a shape is false."""
        builder = self.work.kernel.builder
        mask = builder.scalar("inside", "bool") if inside else None
        value = virtual_input(self.work, self.images).at((self.n, channel, "ih", "iw"), mask)
        if mask is not None and not isinstance(value, Load):
            value = builder.call("where", "float32", mask, value, builder.const(0, "float32"))
        scope = self.work.scope(variables, {"inside": ("inside", inside)})
        text = scope.raw(value, dtype)
        scope.lines.append(f"{name} = {text}")
        return self.work.text(scope)

    def context(self, g: Geometry, packed: Storage) -> dict[str, object]:
        """What all templates are given."""
        images = self.images
        return {
            "M": _text(self.pixels),
            "H": _text(images.h),
            "W": _text(images.w),
            "KH": g.kernel[0],
            "KW": g.kernel[1],
            "dilation": g.dilation,
            "reaches": g.reaches,
            "windows": self._windows(g),
            "w": self.work.frame.name(packed),
            "row": packed.shape[1],
        }

    def sizes_used(self) -> tuple[Size, ...]:
        """The sizes that the templates compute with."""
        images = self.images
        return (self.pixels, sizes.mul(images.n, images.h, images.w), images.h, images.w, images.oh, images.ow)


def _depthwise(task: Task, found: Convolution, packed: Storage) -> Made:
    g = found.geometry
    here = _Work.of(task, found, packed)
    tiles = depthwise_tiles(g.outputs, g.taps)
    guard = f"(c < {g.outputs})[None, :]"
    variables = {
        "n": Var("n[:, None]", ("BLOCK_M", "1")),
        "c": Var("c[None, :]", ("1", "BLOCK_N"), guard),
        "ih": Var("ih[:, None]", ("BLOCK_M", "1")),
        "iw": Var("iw[:, None]", ("BLOCK_M", "1")),
    }
    channel = sizes.floordiv("c", g.outputs // g.channels)
    inside = ("BLOCK_M", "1") if any(g.reaches) else ()
    return here.work.made(
        "depthwise.py.jinja",
        family="convolution",
        units=sizes.mul(sizes.ceildiv(here.pixels, "BLOCK_M"), sizes.ceildiv(g.outputs, "BLOCK_N")),
        flops=g.flops(here.images.n, here.images.oh, here.images.ow),
        tiles=tiles,
        extras=(),
        sizes_used=here.sizes_used(),
        guard=1,
        OC=g.outputs,
        load_x=here.load(variables, channel, inside, "value", "float32"),
        epilogue=here.epilogue(found, guard),
        **here.context(g, packed),
    )


@dataclass
class _Product:
    """A convolution that is a product of matrices.

    ``run`` terms lie side by side, the channels of a tap or of a row of taps; 0 where each is looked up by itself.
    """

    task: Task
    found: Convolution
    packed: Storage
    order: str
    run: int

    @property
    def kernel(self) -> tuple[int, int]:
        """Runs of a window, down and across."""
        g = self.found.geometry
        return g.kernel if self.run == g.channels // g.groups else (g.kernel[0], 1)

    def made(self) -> Made:
        """The kernel with its tiles."""
        found, g = self.found, self.found.geometry
        here = _Work.of(self.task, found, self.packed)
        outputs = g.outputs // g.groups
        columns = sizes.mul(sizes.ceildiv(outputs, "BLOCK_N"), g.groups)
        count = sizes.mul(sizes.ceildiv(here.pixels, "BLOCK_M"), columns)
        choices = self._choices(here.pixels)
        tiles = [
            choice.tile
            if choice.most >= sizes.bounds(here.pixels, self.task.symbols.ranges)[1]
            else replace(choice.tile, guard=sizes.compare("le", here.pixels, choice.most))
            for choice in choices
        ]
        split = any(tile.values()["SPLIT_K"] > 1 for tile in tiles)
        extras: tuple[Extra, ...] = ()
        if split:
            length = _partials(choices, here.pixels, columns)
            extras = (
                Extra("partials", Storage("buffer", (length,), "float32", name="partials")),
                Extra("counters", COUNTERS_STORAGE),
            )
        whole = all(outputs % tile.values()["BLOCK_N"] == 0 for tile in tiles)
        (block_k,) = {tile.values()["BLOCK_K"] for tile in tiles}
        run = self.run or g.depth
        context = here.context(g, self.packed)
        if self.run:
            image = self.task.storage_of(found.x)
            assert image is not None
            h, w, c = here.images.h, here.images.w, g.channels
            position = sizes.mul(sizes.add(sizes.mul(sizes.add(sizes.mul(here.n, h), "top"), w), "left"), c)
            down, right = (sizes.mul(name, step) for name, step in zip(("i", "j"), g.dilation, strict=True))
            context |= {
                "KH": self.kernel[0],
                "KW": self.kernel[1],
                "x": here.work.frame.name(image),
                "first": dialect.size(position),
                "across_taps": _text(sizes.mul(sizes.add(sizes.mul(down, w), right), c)),
            }
        else:
            context |= self._gather(here, run % block_k > 0)
        return here.work.made(
            "convolution.py.jinja" if self.run else "convolution_gathered.py.jinja",
            family="convolution",
            units=sizes.mul(count, "SPLIT_K"),
            flops=g.flops(here.images.n, here.images.oh, here.images.ow),
            tiles=tiles,
            extras=extras,
            sizes_used=(*here.sizes_used(), *(extra.storage.shape[0] for extra in extras)),
            guard=1,
            IC=self.run or g.channels // g.groups,
            OG=outputs,
            groups=g.groups,
            split=split,
            ragged=run % block_k > 0,
            precision=self.task.precision,
            epilogue=here.epilogue(found, "" if whole else f"(oc < {outputs})[None, :]"),
            **context,
        )

    def _choices(self, pixels: Size) -> tuple[Choice, ...]:
        g = self.found.geometry
        least, most = sizes.bounds(pixels, self.task.symbols.ranges)
        runs, run = (self.kernel[0] * self.kernel[1], self.run) if self.run else (0, g.depth)
        unit = self.task.precision if self.found.dtype == "float32" else "half"
        shape = Shape(most, g.outputs // g.groups, g.groups, runs, run, ITEM_BYTES[self.found.dtype], unit)
        return product_tiles(shape, least)

    def _gather(self, here: _Work, ragged: bool) -> dict[str, str]:
        """The holes that look a block of the input up."""
        g, split = self.found.geometry, here.work.kernel.split
        if self.order == "oihw":
            rest, j = split("k", g.kernel[1])
            ic, i = split(rest, g.kernel[0])
        else:
            rest, ic = split("k", g.channels // g.groups)
            i, j = split(rest, g.kernel[1])
        lines = [f"ic = {_block(ic, 'k')}" + (f" + group * {g.channels // g.groups}" if g.groups > 1 else "")]
        column, row, block = ("BLOCK_M", "1"), ("1", "BLOCK_K"), ("BLOCK_M", "BLOCK_K")
        variables = {"n": Var("n[:, None]", column), "ic": Var("ic[None, :]", row)}
        inside: tuple[str, ...] = row if ragged else ()
        axes = zip(("ih", "iw"), ("top", "left"), (i, j), g.dilation, g.reaches, strict=True)
        for name, corner, tap, step, reaches in axes:
            varies = tap != 0
            further = f" + ({dialect.size(sizes.mul(tap, step))})[None, :]" if varies else ""
            lines.append(f"{name} = {corner}[:, None]{further}")
            variables[name] = Var(name, block if varies else column)
            if reaches:
                inside = merge_shapes(inside, variables[name].shape)
        return {"lookup": "\n".join(lines), "load_x": here.load(variables, "ic", inside, "a", self.found.dtype)}


def _partials(choices: Sequence[Choice], pixels: Size, columns: Size) -> Size:
    """Elements that the partial sums of all tiles that split take, at the sizes that they are used at."""
    lengths = []
    for choice in choices:
        values = choice.tile.values()
        if values["SPLIT_K"] > 1:
            m, n = values["BLOCK_M"], values["BLOCK_N"]
            count = sizes.mul(
                sizes.ceildiv(sizes.minimum(pixels, choice.most), m), sizes.substitute(columns, {"BLOCK_N": n})
            )
            lengths.append(sizes.mul(count, values["SPLIT_K"] * m * n))
    return sizes.maximum(*lengths)


def _block(size: Size, name: str) -> str:
    """An index expression in one block as text; a block of zeros where the expression is a number."""
    return f"{name} * 0 + {size}" if isinstance(size, int) else dialect.size(size)


def _text(size: Size) -> str:
    """A size in a template, in parentheses where it is compound."""
    text = dialect.size(size)
    return text if isinstance(size, int | str) else f"({text})"

"""The Winograd kernels: which convolutions they take, their scratch memory, their work units, and the kernel.

Which of them are computed so, and by which tile, is decided for the whole model before it is lowered
(``winograd_selection.py``): transformed weights are larger, and the artifact must not grow without bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...runtime import sizes
from ...runtime.sizes import Size, add, ceildiv, minimum, mul
from ..geometry import Convolution, Geometry, filters, images_of, with_bias
from ..kernel import KernelCode
from ..regions import Frame, Made, Task
from ..storage import Packing, Storage
from ..values import LANES
from . import packing
from .anchors import Anchored, c_size
from .winograd_matrices import pack_winograd

META = "winograd"
"""The key of a region's meta: its :class:`Choice`."""
MOST = 14
"""Most tiles of a block: as many as make use of a weight that is read, few enough to stay in the second cache."""
BANDS = 32
"""Most bands that the blocks of a call are grouped into: each has scratch memory of its own."""


@dataclass(frozen=True)
class Choice:
    """How a convolution is computed: outputs of a tile in each direction (4 or 2), and groups of panels."""

    tile: int
    groups: int = 1

    @property
    def points(self) -> int:
        """Products per tile and pair of channels."""
        return (self.tile + 2) ** 2


def refuse(found: Convolution, image: Storage | None) -> str | None:
    """Why a convolution cannot be computed so; None if it can."""
    g = found.geometry
    if g.kernel != (3, 3):
        return f"its windows are {g.kernel[0]}x{g.kernel[1]}, not 3x3"
    if g.stride != (1, 1) or g.dilation != (1, 1) or g.insert != (1, 1) or g.turned:
        return "it has a stride or a dilation, or is transposed"
    if g.groups != 1:
        return f"it has {g.groups} groups"
    if found.dtype != "float32" or image is None or image.dtype != "float32":
        return "it is not computed in float32 on float32 images"
    if image.layout != "channels16":
        return f"its image lies in {image.layout}, not channels16"
    return None


def scratch_floats(channels: int, tile: int) -> int:
    """Elements of scratch memory of one unit of ``winograd.c.jinja``: a block's inputs and one panel's products."""
    inputs = -(-channels // packing.CHANNELS) * MOST * packing.CHANNELS + packing.CHANNELS
    products = MOST * packing.PANEL + packing.CHANNELS
    return (tile + 2) ** 2 * (inputs + products)


def tiles_of(n: Size, oh: Size, ow: Size, tile: int) -> Size:
    """Tiles of ``n`` images of ``oh`` x ``ow`` outputs."""
    return mul(n, ceildiv(oh, tile), ceildiv(ow, tile))


def blocks_of(tiles: Size) -> Size:
    """Blocks of at most :data:`MOST` tiles each: an even number, so that two threads have as much to do."""
    return mul(ceildiv(tiles, 2 * MOST), 2)


def winograd_units(n: Size, oh: Size, ow: Size, choice: Choice) -> Size:
    """Work units of ``winograd.c.jinja``: a group of panels of a band of blocks each."""
    return mul(minimum(blocks_of(tiles_of(n, oh, ow, choice.tile)), BANDS), choice.groups)


def packing_winograd(g: Geometry, tile: int) -> Packing:
    """The weight, transformed."""
    shape = (-(-g.outputs // packing.PANEL), (tile + 2) ** 2, g.channels, packing.PANEL)
    return Packing(f"winograd{tile}", shape, lambda weight: pack_winograd(filters(g, weight), tile))


def winograd(task: Task, found: Convolution, image: Storage, choice: Choice) -> Made:
    """``epilogue(conv(x, w) + b)`` by Winograd's algorithm."""
    g = found.geometry
    packed = task.packed(found.source, packing_winograd(g, choice.tile))
    space = task.symbols.shape(found.anchor.meta["val"])
    n = space[0] if len(space) == 4 else 1
    units = winograd_units(n, space[-2], space[-1], choice)
    scratch = Storage(
        "buffer", (units, scratch_floats(g.channels, choice.tile)), "float32", name=f"{task.node.name}_scratch"
    )
    frame = Frame(task, skip=[found.weight], extra=[packed], scratch=[scratch])
    code = _build(task, found, frame, packed, image, scratch, choice, units)
    return Made(code, frame.storages)


def _build(
    task: Task, found: Convolution, frame: Frame, packed: Storage, image: Storage, scratch: Storage, choice: Choice,
    units: Size,
) -> KernelCode:  # fmt: skip
    g = found.geometry
    work = Anchored(task, found.anchor, frame)
    images = images_of(work, found.x, g)
    n, oh, ow = images.n, images.oh, images.ow
    for name, extent in (
        ("n", n), ("cb", -(-g.outputs // LANES)), ("lane", LANES), ("p", mul(oh, ow)),
    ):  # fmt: skip
        work.kernel.variable(name, extent)
    row, column = (0, "p") if oh == 1 else (sizes.floordiv("p", ow), sizes.mod("p", ow))
    channel = add(mul("cb", LANES), "lane")
    index = images.result_index("n", channel, row, column)
    code = work.code(
        "winograd.c.jinja",
        family="convolution",
        units=units,
        flops=g.flops(n, oh, ow),
        N=c_size(n),
        H=c_size(images.h),
        W=c_size(images.w),
        OH=c_size(oh),
        OW=c_size(ow),
        IC=g.channels,
        OC=g.outputs,
        TILE=choice.tile,
        GROUPS=choice.groups,
        MOST=MOST,
        BANDS=BANDS,
        padding=g.padding,
        x_base=frame.name(image),
        w_base=frame.name(packed),
        scratch=frame.name(scratch),
        epilogue=work.epilogue(index, ("n", "cb", "p"), "lane", with_bias(work, found.bias, channel)),
    )
    traffic = add(*(item.bytes() for item in frame.parameters if item.name != frame.name(scratch)))
    return replace(code, label=f"winograd{choice.tile}_{code.label}", bytes=traffic)

"""Choose how values with channels lie in memory, so that nothing is transposed between two convolutions.

Before:  y = convolution(x); z = max_pool(y); convolution(z)                       all [N][C][H][W]
After:   y, z as [N][ceil(C/16)][H][W][16] ("channels16") for a CPU, as [N][H][W][C] ("channels_last") for a GPU;
         x copied into it only if the kernel of the first convolution reads nothing else

Logical shapes do not change: ``meta["layouts"]`` of a region says how each of its results lies, and is absent where all
lie in rows. Kernels that read through index functions (everything but most convolutions) read any layout. Convolutions
read the layout of images (``graph/layouts.py`` says which): their operand is made so by its producer, or copied by a
region of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .base import Pass, Report
from .graph.edit import inherit
from .graph.layouts import (
    BLOCKED,
    BLOCKED_DTYPES,
    ROWS,
    has_channels,
    layout_of,
    prefers_image,
    reads_image,
    refuse_layout,
)
from .graph.program import Program
from .graph.query import aten
from .graph.regions import Region, body, is_region, outline
from .graph.roles import Roles


@dataclass(frozen=True)
class Image:
    """A convolution's input: the region that reads it, the value, and whether it is copied if it lies otherwise."""

    region: fx.Node
    value: fx.Node
    copied: bool


class AlignLayouts(Pass):
    """Annotate regions with layouts and copy what no kernel of ours makes; runs on a graph of regions.

    Args:
        roles: the layout of images, the number of channels in a block, and which operators are convolutions.
    """

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.layout = roles.image_layout

    def run(self, program: Program, report: Report) -> None:
        """Ask what convolutions want, then decide region by region in graph order."""
        regions = [node for node in program.graph.nodes if is_region(node, "kernel")]
        images = [image for region in regions if (image := self._image(region)) is not None]
        wanted = {image.value for image in images}
        before = len(report.changes)
        for region in regions:
            self._decide(region, wanted, report)
        copies = self._copy(program, images, report)
        if len(report.changes) > before:
            end = program.graph.output_node()
            delivered = sum(1 for value in end.all_input_nodes if layout_of(value) != ROWS)
            report.change(end, f"{copies + delivered} conversions: {copies} of operands, {delivered} of outputs")

    # -- what convolutions read ----------------------------------------------------------------------------------------

    def _image(self, region: fx.Node) -> Image | None:
        """The operand that a region's convolution wants in the layout of images, if it does."""
        if region.meta["region"].family != "convolution":
            return None
        for node, inner in zip(region.args, body(region).graph.find_nodes(op="placeholder"), strict=True):
            for user in inner.users:
                if user.target not in self.roles.anchors or user.args[0] is not inner:
                    continue
                reads = reads_image(user, self.roles)
                if reads or prefers_image(user, self.roles):
                    assert isinstance(node, fx.Node)
                    return Image(region, node, reads)
        return None

    # -- what regions make ---------------------------------------------------------------------------------------------

    def _decide(self, region: fx.Node, wanted: set[fx.Node], report: Report) -> None:
        if "layouts" in region.meta:
            return
        results = _results(region)
        if not all(has_channels(result) for result in results):
            return
        answer, why = self._layout(region, results, wanted)
        if answer != ROWS:
            value = region.meta["val"]
            region.meta["layouts"] = (answer,) * (len(value) if isinstance(value, tuple) else 1)
            report.change(region, f"{answer}: {why}")
        elif region.meta["region"].family == "convolution" or wanted & set(results) or _reads_images(region):
            report.refuse(region, f"lies in rows: {why}")

    def _layout(self, region: fx.Node, results: list[fx.Node], wanted: set[fx.Node]) -> tuple[str, str]:
        """The layout of a region's results, and why."""
        family = region.meta["region"].family
        if family not in ("convolution", "loop"):
            return ROWS, f"a {family} kernel stores rows"
        if reason := refuse_layout(results[0], self.roles):
            return ROWS, reason
        if any(result in wanted for result in results):
            return self.layout, "a convolution reads it so"
        if all(user.op == "output" for result in results for user in result.users):
            return ROWS, "it is only given out"
        if family == "convolution":
            return self.layout, "a convolution makes it so"
        images, rows = 0, 0
        for operand in region.all_input_nodes:
            if has_channels(operand) and not _is_constant(operand):
                weight = _weight(operand)
                images, rows = (images + weight, rows) if layout_of(operand) != ROWS else (images, rows + weight)
        return (self.layout if images > rows else ROWS), "most of what it reads is"

    # -- copies --------------------------------------------------------------------------------------------------------

    def _copy(self, program: Program, images: list[Image], report: Report) -> int:
        """Convert, once for all its readers, what a convolution reads so and no region stores so; how many."""
        graph = program.graph
        readers: dict[fx.Node, list[fx.Node]] = {}
        copies = 0
        for image in images:
            if image.copied and layout_of(image.value) != self.layout:
                readers.setdefault(image.value, []).append(image.region)
        for value, regions in readers.items():
            if self.layout == BLOCKED and value.meta["val"].dtype not in BLOCKED_DTYPES:
                report.refuse(regions[0], f"reads %{value} as it lies: it is {value.meta['val'].dtype}")
                continue
            first = min(regions)
            with graph.inserting_before(first):
                clone = graph.call_function(aten.clone.default, (value,))
            clone.meta["val"] = value.meta["val"]
            inherit(clone, (value,))
            for region in regions:
                region.replace_input_with(value, clone)
            copy = outline(program.module, [clone], Region("kernel", "loop"), f"image_of_{value.name}")
            copy.meta["layouts"] = (self.layout,)
            readers_of = ", ".join(f"%{region}" for region in regions)
            report.change(copy, f"{self.layout}: a copy of %{value} for {readers_of}")
            copies += 1
        return copies


def _results(region: fx.Node) -> list[fx.Node]:
    """The nodes that stand for a region's results: itself, or its items."""
    return list(region.users) if isinstance(region.meta["val"], tuple | list) else [region]


def _reads_images(region: fx.Node) -> bool:
    return any(layout_of(operand) != ROWS for operand in region.all_input_nodes)


def _is_constant(value: fx.Node) -> bool:
    """Whether an operand is a constant, which lies as its reader wants it."""
    return value.op == "get_attr" or is_region(value, "constant")


def _weight(value: fx.Node) -> int:
    """Elements of a value, varying sizes counted as one."""
    count = 1
    for size in value.meta["val"].shape:
        count *= size if isinstance(size, int) else 1
    return count

"""Choose how values with channels lie in memory, so that nothing is transposed between two convolutions.

Before:  y = convolution(x); z = max_pool(y); convolution(z)                       all [N][C][H][W]
After:   y, z as [N][ceil(C/16)][H][W][16] ("channels16"); x copied into it only if the first convolution reads blocks

Logical shapes do not change: ``meta["layouts"]`` of a region says how each of its results lies, and is absent where all
lie in rows. Kernels that read through index functions (everything but blocked convolutions) read any layout. A blocked
convolution reads ``channels16``: its operand is made so by its producer, or copied by a region of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .base import Pass, Report
from .graph.edit import inherit
from .graph.layouts import BLOCKED, ROWS, has_channels, layout_of, reads_blocks
from .graph.program import Program
from .graph.query import aten
from .graph.regions import Region, body, is_region, outline
from .graph.roles import Roles


@dataclass(frozen=True)
class Image:
    """A blocked convolution's input: the region that reads it and the value."""

    region: fx.Node
    value: fx.Node


class AlignLayouts(Pass):
    """Annotate regions with layouts and copy what no kernel of ours makes; runs on a graph of regions.

    Args:
        roles: the number of channels in a block, and which operators are convolutions.
    """

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

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
            delivered = sum(1 for value in end.all_input_nodes if layout_of(value) == BLOCKED)
            report.change(end, f"{copies + delivered} conversions: {copies} of operands, {delivered} of outputs")

    # -- what convolutions read ----------------------------------------------------------------------------------------

    def _image(self, region: fx.Node) -> Image | None:
        """The operand that a region's convolution reads in blocks of channels, if it does."""
        if region.meta["region"].family != "convolution":
            return None
        for node, inner in zip(region.args, body(region).graph.find_nodes(op="placeholder"), strict=True):
            for user in inner.users:
                if user.target in self.roles.anchors and user.args[0] is inner and reads_blocks(user, self.roles.lanes):
                    assert isinstance(node, fx.Node)
                    return Image(region, node)
        return None

    # -- what regions make ---------------------------------------------------------------------------------------------

    def _decide(self, region: fx.Node, wanted: set[fx.Node], report: Report) -> None:
        if "layouts" in region.meta:
            return
        results = _results(region)
        if not all(has_channels(result) for result in results):
            return
        answer, why = self._layout(region, results, wanted)
        if answer == BLOCKED:
            value = region.meta["val"]
            region.meta["layouts"] = (BLOCKED,) * (len(value) if isinstance(value, tuple) else 1)
            report.change(region, f"{BLOCKED}: {why}")
        elif region.meta["region"].family == "convolution" or wanted & set(results) or _reads_blocked(region):
            report.refuse(region, f"lies in rows: {why}")

    def _layout(self, region: fx.Node, results: list[fx.Node], wanted: set[fx.Node]) -> tuple[str, str]:
        """The layout of a region's results, and why."""
        family = region.meta["region"].family
        value = results[0].meta["val"]
        channels = value.shape[1]
        if family not in ("convolution", "loop"):
            return ROWS, f"a {family} kernel stores rows"
        if value.dtype != torch.float32:
            return ROWS, f"blocks of channels are float32, this is {str(value.dtype).removeprefix('torch.')}"
        if not isinstance(channels, int) or channels < self.roles.lanes:
            return ROWS, f"{channels} channels do not fill a block of {self.roles.lanes}"
        if any(result in wanted for result in results):
            return BLOCKED, "a convolution reads it in blocks"
        if all(user.op == "output" for result in results for user in result.users):
            return ROWS, "it is only given out"
        if family == "convolution":
            return BLOCKED, "a convolution makes blocks"
        blocks, rows = 0, 0
        for operand in region.all_input_nodes:
            if has_channels(operand) and not _is_constant(operand):
                weight = _weight(operand)
                blocks, rows = (blocks + weight, rows) if layout_of(operand) == BLOCKED else (blocks, rows + weight)
        return (BLOCKED, "most of what it reads is") if blocks > rows else (ROWS, "most of what it reads is")

    # -- copies --------------------------------------------------------------------------------------------------------

    def _copy(self, program: Program, images: list[Image], report: Report) -> int:
        """Convert, once for all its readers, what a blocked convolution reads and no region stores so; how many."""
        graph = program.graph
        readers: dict[fx.Node, list[fx.Node]] = {}
        copies = 0
        for image in images:
            if layout_of(image.value) != BLOCKED:
                readers.setdefault(image.value, []).append(image.region)
        for value, regions in readers.items():
            if value.meta["val"].dtype != torch.float32:
                report.refuse(regions[0], f"reads %{value} as it lies: it is {value.meta['val'].dtype}")
                continue
            first = min(regions)
            with graph.inserting_before(first):
                clone = graph.call_function(aten.clone.default, (value,))
            clone.meta["val"] = value.meta["val"]
            inherit(clone, (value,))
            for region in regions:
                region.replace_input_with(value, clone)
            copy = outline(program.module, [clone], Region("kernel", "loop"), f"blocks_of_{value.name}")
            copy.meta["layouts"] = (BLOCKED,)
            report.change(copy, f"{BLOCKED}: a copy of %{value} for {', '.join(f'%{region}' for region in regions)}")
            copies += 1
        return copies


def _results(region: fx.Node) -> list[fx.Node]:
    """The nodes that stand for a region's results: itself, or its items."""
    return list(region.users) if isinstance(region.meta["val"], tuple | list) else [region]


def _reads_blocked(region: fx.Node) -> bool:
    return any(layout_of(operand) == BLOCKED for operand in region.all_input_nodes)


def _is_constant(value: fx.Node) -> bool:
    """Whether an operand is a constant, which lies as its reader wants it."""
    return value.op == "get_attr" or is_region(value, "constant")


def _weight(value: fx.Node) -> int:
    """Elements of a value, varying sizes counted as one."""
    count = 1
    for size in value.meta["val"].shape:
        count *= size if isinstance(size, int) else 1
    return count

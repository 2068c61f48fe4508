"""Turn transposed convolutions whose windows do not overlap into a pointwise convolution and a shuffle of pixels.

Before:  conv_transpose(x, w, b)    w: [IC, OC, s, s], stride s, no padding, one group
After:   pixel_shuffle(channel_shuffle(conv(x, w'), s*s), s)
                                    w': [s*s*OC, IC, 1, 1], w'[(i*s + j)*OC + o, c] = w[c, o, i, j]

Each input pixel makes its own s*s output pixels, so nothing is added up; the general form would multiply s*s - 1
zeros for each pixel. The shuffles are views: whoever reads the result reads it in place. All channels of an output
pixel are made side by side, so that they are read as they lie where channels are innermost. Expects canonical form.
Source: Shi et al., "Is the deconvolution layer the same as a convolutional layer?", arXiv:1609.07009.
"""

from __future__ import annotations

from torch import fx

from .base import Pass, Report
from .graph.edit import tensor_shape
from .graph.emit import Emitter
from .graph.program import Program
from .graph.query import arguments, aten, calls, is_constant, supersede


class SplitTransposedConvolution(Pass):
    """Rewrite upsampling convolutions with kernel = stride."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every transposed convolution."""
        for node in calls(program.graph, [aten.convolution.default]):
            given = arguments(node)
            if not given["transposed"]:
                continue
            if reason := _refusal(node):
                report.refuse(node, reason)
                continue
            new = _split(node)
            report.change(node, f"as a pointwise convolution and a shuffle by {given['stride'][0]}")
            supersede(node, new)


def _refusal(node: fx.Node) -> str | None:
    given = arguments(node)
    if not is_constant(given["weight"]) or (given["bias"] is not None and not is_constant(given["bias"])):
        return "its weight or bias is not a constant"
    shape = tensor_shape(given["weight"])
    if len(shape) != 4 or len(tensor_shape(given["input"])) != 4:
        return "it is not two-dimensional over a batch"
    if given["groups"] != 1:
        return f"it has {given['groups']} groups"
    if any(given["padding"]) or any(given["output_padding"]) or any(step != 1 for step in given["dilation"]):
        return "it has padding or dilation"
    if not (shape[2] == shape[3] and list(shape[2:]) == list(given["stride"])):
        return f"its windows of {list(shape[2:])} overlap or leave gaps at stride {list(given['stride'])}"
    return None


def _split(node: fx.Node) -> fx.Node:
    given = arguments(node)
    weight, bias, factor = given["weight"], given["bias"], given["stride"][0]
    inputs, outputs = (int(extent) for extent in tensor_shape(weight)[:2])
    emit = Emitter(node, node)
    filters = emit.reshape(emit(aten.permute.default, weight, [2, 3, 1, 0]), [factor * factor * outputs, inputs, 1, 1])
    if bias is not None:
        spread = emit(aten.expand.default, emit.reshape(bias, [1, outputs]), [factor * factor, outputs])
        bias = emit.reshape(spread, [factor * factor * outputs])
    wide = emit(aten.convolution.default, given["input"], filters, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    return emit(aten.pixel_shuffle.default, emit(aten.channel_shuffle.default, wide, factor * factor), factor)

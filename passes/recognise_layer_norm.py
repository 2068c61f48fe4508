"""Recognise the layer norm that was written out, as exporters before ONNX operator set 17 do.

Before:  d = x - mean(x, trailing axes);  d / sqrt(mean(d**2) + eps) * w + b
After:   layer_norm(x, sizes, w, b, eps)

Weight and bias may be missing; the variance may be taken with ``var`` (biased).
"""

from __future__ import annotations

from torch import fx

from .base import Pass, Report
from .graph.edit import insert
from .graph.match import ADD, DIV, MUL, aten, dtype_of, substitute
from .graph.norms import Normalised, absorb, convert, normalised, vector, widens
from .graph.program import Program
from .graph.query import calls


class RecogniseLayerNorm(Pass):
    """Replace written-out layer norms by ``aten.layer_norm.default``."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every product and quotient."""
        for node in calls(program.graph, MUL | DIV):
            norm = None if node._erased else normalised(node)
            if norm is None or not norm.centred:
                continue
            if all(isinstance(size, int) for size in norm.sizes):
                _rewrite(norm, report)
            else:
                report.refuse(node, f"normalises over sizes that vary: {norm.sizes}")


def _rewrite(norm: Normalised, report: Report) -> None:
    result, weight, bias = norm.result, None, None
    if found := absorb(norm, MUL, result):
        result, weight = found
    found = absorb(norm, ADD, result)
    if found and (weight is None or widens(dtype_of(weight), dtype_of(found[0]))):
        result, bias = found
    dtype = dtype_of(result)
    x = convert(norm.x, dtype, result)
    operands = [None if value is None else vector(value, norm.sizes, dtype, result) for value in (weight, bias)]
    origins: list[fx.Node] = [norm.result, result]
    args = (x, norm.sizes, *operands, norm.eps, False)
    new = insert(result.graph, result, aten.layer_norm.default, args, origins=origins)
    names = ", ".join(
        f"{kind} {value.name}" if value is not None else f"no {kind}"
        for kind, value in (("weight", weight), ("bias", bias))
    )
    report.change(result, f"layer_norm over {norm.sizes}, eps {norm.eps:g}, {names}")
    substitute(result, new)

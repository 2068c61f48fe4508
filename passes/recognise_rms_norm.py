"""Recognise the root-mean-square norm that was written out.

Before:  x * rsqrt(mean(x**2, trailing axes) + eps) * w
After:   rms_norm(x, sizes, w, eps)

The weight may be any vector over the normalised axes (``1 + w`` too, which stays an operator on constants) and may be
missing. Where the graph computes the moments in a wider dtype and comes back before the weight, the operator takes the
narrow tensors: it computes in fp32 inside (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4).
"""

from __future__ import annotations

from torch import fx

from .base import Pass, Report
from .graph.edit import insert
from .graph.match import DIV, MUL, aten, dtype_of, substitute
from .graph.norms import Normalised, absorb, convert, normalised, vector
from .graph.program import Program
from .graph.query import calls


class RecogniseRmsNorm(Pass):
    """Replace written-out root-mean-square norms by ``aten.rms_norm.default``."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every product and quotient."""
        for node in calls(program.graph, MUL | DIV):
            if node._erased:
                continue
            norm = normalised(node)
            if norm is None:
                continue
            if norm.centred:
                report.refuse(node, "the mean was subtracted before: a layer norm")
            elif not all(isinstance(size, int) for size in norm.sizes):
                report.refuse(node, f"normalises over sizes that vary: {norm.sizes}")
            else:
                _rewrite(norm, report)


def _rewrite(norm: Normalised, report: Report) -> None:
    absorbed = absorb(norm, MUL, norm.result)
    result, weight = absorbed or (norm.result, None)
    dtype = dtype_of(result)
    x = convert(norm.x, dtype, result)
    operand = None if weight is None else vector(weight, norm.sizes, dtype, result)
    origins: list[fx.Node] = [norm.result, result]
    new = insert(result.graph, result, aten.rms_norm.default, (x, norm.sizes, operand, norm.eps), origins=origins)
    text = f"rms_norm over {norm.sizes}, eps {norm.eps:g}, {'no weight' if weight is None else f'weight {weight.name}'}"
    report.change(result, text)
    substitute(result, new)

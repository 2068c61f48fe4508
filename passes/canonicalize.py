"""Bring a graph into canonical form: one way to write each thing, and nothing that does nothing.

What later passes and lowering may rely on:

- Views: ``aten.reshape.default`` is the only operator that regroups axes (no ``view``, ``_unsafe_view``, ``flatten``,
  ``unflatten``), never two in a row, at most one size is ``-1`` and only where it varies. It promises nothing about
  strides. ``aten.permute.default`` with non-negative axes is the only one that reorders them (no ``transpose``, ``t``),
  never two in a row, never before a ``select``. ``expand`` is left only where a later operator does not broadcast by
  itself. Axes of other operators may be negative. Parts are ``select`` and ``slice`` (no ``unbind``, ``split``).
- Copies: no ``clone``, ``contiguous``, ``alias``, ``detach``, ``lift_fresh``, ``dropout``;
  ``aten._to_copy.default(x, dtype=...)`` is the only cast and it does change the dtype. Layout and memory format are
  lowering's. Padding with a number is ``constant_pad_nd``.
- Products: ``aten.linear.default(x, w, b)`` where the weight is a constant matrix ``[out, in]`` (possibly ``permute``
  of one), whatever it was written as (``mm``, ``addmm``, ``matmul``, rows flattened or not); ``aten.matmul.default``
  for every other product (no ``mm``, ``bmm``, ``baddbmm``, and ``einsum`` only for diagonals).
- Convolutions: ``aten.convolution.default`` with all nine arguments explicit, for 1, 2 and 3 dimensions, transposed or
  not; inputs have a batch axis; an uneven ``"same"`` padding is a ``constant_pad_nd`` before it.
- Norms: ``aten.batch_norm.default`` in inference mode, ``layer_norm``, ``group_norm``, ``rms_norm`` (no ``native_*``).
- Arithmetic: constants come second; numbers (also constants without dimensions) are Python numbers; ``alpha`` is 1; no
  ``rsub``, no ``sub`` of a number, no ``div`` by a number (floating point), no ``square``, no ``pow`` with an exponent
  of 2, 1/2, -1/2 or -1; ``bitwise_and`` (no ``__and__``). Neutral elements are gone. ``silu``, ``hardswish``, ``gelu``
  stay whole.
- Tensors of one number: ``aten.full.default(sizes, number, dtype=...)`` (no ``zeros``, ``ones_like``, ``new_full``...).
- Checks (``_assert_*``, ``sym_constrain_*``) are gone: the exporter's guards are in ``Program.guards``.

Before:  add(mul(view(clone(x), [4, 8]), 1), rsub(y, 2))
After:   add(reshape(x, [4, 8]), add(neg(y), 2))
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from .base import Pass, Report
from .canonical_arithmetic import ARITHMETIC
from .canonical_einsum import EINSUM
from .canonical_factories import FACTORIES
from .canonical_products import PRODUCTS
from .canonical_views import VIEWS
from .graph.program import Program
from .graph.query import is_assertion, remove_unused, supersede

# A rule looks at one call and returns what stands for it, in words what it did, or None where it does not apply.
Rule = Callable[[fx.Node], tuple[fx.Node, str] | None]
RULES: dict[object, list[Rule]] = {}
for _table in (VIEWS, FACTORIES, ARITHMETIC, EINSUM, PRODUCTS):
    for _target, _rules in _table.items():
        RULES.setdefault(_target, []).extend(_rules)


class Canonicalize(Pass):
    """Apply every rule until none applies; see the module's description for the form that this gives."""

    def run(self, program: Program, report: Report) -> None:
        """Rewrite in sweeps over the graph until a sweep changes nothing."""
        graph = program.graph
        for node in list(graph.nodes):
            if is_assertion(node) and not node.users:
                report.change(node, "check removed: it holds for every input that the guards admit")
                operands = node.all_input_nodes
                graph.erase_node(node)
                remove_unused(*operands)
        while self._sweep(graph, report):
            pass

    def _sweep(self, graph: fx.Graph, report: Report) -> bool:
        changed = False
        known = set(graph.nodes)
        for node in list(graph.nodes):
            if node._erased or node.op != "call_function":
                continue
            for rule in RULES.get(node.target, ()):
                rewritten = rule(node)
                if rewritten is None:
                    continue
                changed = True
                new, text = rewritten
                report.change(node, text)
                if new is node:  # its users were changed
                    remove_unused(node)
                else:
                    supersede(node, new, name=new.name if new in known else None)
                    known.add(new)
                break
        return changed

"""Group operators into regions: one region becomes one kernel, and what lies between regions becomes a buffer.

Before:  y = relu(linear(x, w, b) + r); z = layer_norm(permute(y))
After:   y = linear_add_relu(x, w, b, r); z = layer_norm(y)      the permutation is inside the second region

A matrix product, convolution or attention takes in views of its operands before it and pointwise operators after it.
Everything else becomes loop kernels: an operator is computed inside the kernel that reads it unless that would compute
it more than once (and it is not cheap), several kernels read it, or it is an output. A value that a kernel computes
anyway can be one of its results. Views cost nothing: every kernel has its own.

A region is convex: no path leaves it and comes back. ``passes/fusion`` holds the rules (``legality``), the dependency
graph that refuses cycles (``grouping``), and the two stages (``anchors``, then ``loops``).
"""

from __future__ import annotations

from torch import fx

from .base import Pass, Report
from .fusion.anchors import grow_anchors
from .fusion.grouping import Grouping
from .fusion.loops import LoopFusion
from .fusion.operators import part
from .fusion.outlines import outline_regions
from .graph.edit import same_size
from .graph.program import Program
from .graph.query import aten, calls, is_pure
from .graph.roles import Roles

_OPERATORS = ("anchor", "pointwise", "assembled", "view", "gather", "reduction", "window", "item")


class FuseOperators(Pass):
    """Make regions of all operators that kernels can be made of; others stay as they are, for lowering to name.

    Args:
        roles: what the kernel families can take in, as code generation describes it.
    """

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    def run(self, program: Program, report: Report) -> None:
        """Anchors first, with what follows them; then everything else from the outputs to the inputs."""
        graph = program.graph
        _remove_dead(graph, report)
        _measure_inputs(graph, report)
        nodes = [node for node in graph.nodes if part(node, self.roles) in _OPERATORS]
        if not nodes:
            return
        grouping = Grouping(graph)
        grow_anchors(grouping, nodes, self.roles, report.refuse)
        LoopFusion(grouping, self.roles, report.refuse).run(nodes)
        outline_regions(program, grouping, self.roles, report)


def _remove_dead(graph: fx.Graph, report: Report) -> None:
    """A region computes what something uses; results of an operator that nothing uses go first."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            report.change(node, "nothing uses it")
            graph.erase_node(node)


def _measure_inputs(graph: fx.Graph, report: Report) -> None:
    """Take sizes from inputs where possible, so that a value need not lie in memory for its size."""
    inputs = graph.find_nodes(op="placeholder")
    for node in calls(graph, (aten.sym_size.int,)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.op != "call_function":
            continue
        for given in inputs:
            axes = [axis for axis, size in enumerate(given.meta["val"].shape) if same_size(size, node.meta["val"])]
            if axes:
                node.args = (given, axes[0])
                report.change(node, f"the size of %{source} is that of %{given}")
                break

"""Remove what nothing uses: nodes, and the weights and region bodies that only they held.

Before:  y = f(x); z = g(x, w); return y
After:   y = f(x); return y
"""

from __future__ import annotations

from torch import fx

from .base import Pass, Report
from .graph.program import Program
from .graph.query import is_pure


class EliminateDeadCode(Pass):
    """Erase unused values, last first; inputs and states stay, and so do checks."""

    def run(self, program: Program, report: Report) -> None:
        """Walk backwards once, so that operands of what went are seen after it; then drop unused attributes."""
        for node in reversed(list(program.graph.nodes)):
            if not node.users and is_pure(node):
                report.change(node, "nothing uses it")
                program.graph.erase_node(node)
        drop_unused_attributes(program.module)


def drop_unused_attributes(module: fx.GraphModule) -> None:
    """Let go of the tensors and nested modules that no node names, so that their memory can be freed."""
    named = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for holder in (module._buffers, module._parameters, module._modules):
        for name in [name for name in holder if not any(one == name or one.startswith(f"{name}.") for one in named)]:
            del holder[name]

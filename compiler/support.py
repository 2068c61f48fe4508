"""Which nodes of a program cannot be compiled, all at once and each with where it comes from."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..codegen.interpret import is_size
from ..codegen.provenance import origin_of
from ..codegen.roles import fusion_roles
from ..passes.graph.program import Program
from ..passes.graph.regions import is_region
from ..runtime.errors import UnsupportedOperator


@dataclass(frozen=True)
class Unsupported:
    """One node that no kernel can be made of."""

    entry: str
    node: str
    operator: str
    module: str
    source: str
    device: str = "cpu"

    def __str__(self) -> str:
        where = " ".join(
            part for part in (self.module and f"in {self.module}", self.source and f"at {self.source}") if part
        )
        return f"{self.operator} (node {self.node}{', ' + where if where else ''})"


def find_unsupported(programs: Sequence[Program], device: str = "cpu") -> list[Unsupported]:
    """Nodes outside regions that fusion could make nothing of.

    Args:
        programs: after the passes for the kind of device.
        device: that kind.
    """
    roles = fusion_roles(device)
    found = []
    for program in programs:
        for node in program.graph.nodes:
            if _is_plain(node) or (node.op == "call_function" and roles.known(node.target)):
                continue
            origin = origin_of(node)
            found.append(Unsupported(program.name, node.name, str(node.target), origin.module, origin.source, device))
    return found


def require_supported(programs: Sequence[Program], device: str = "cpu") -> None:
    """Raise for everything that is unsupported; arguments as for :func:`find_unsupported`.

    Raises:
        UnsupportedOperator: lists every node.
    """
    found = find_unsupported(programs, device)
    if found:
        lines = "\n".join(f"  {item}" for item in found)
        where = "" if device == "cpu" else f" for {device}"
        raise UnsupportedOperator(
            f"{len(found)} operator{'s are' if len(found) > 1 else ' is'} not supported{where}:\n{lines}\n"
            "Rewrite these lines of the model with supported operators (docs/operators.md lists them), or leave the "
            "part out with an entry point that starts after it."
        )


def _is_plain(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr", "output") or is_region(node) or is_size(node):
        return True
    # Results of an operator that computes several are no operators of their own.
    return node.target is operator.getitem

"""What a pass is: one rewrite with a name, and the report of what it did and what it refused.

A pass's module docstring states its equation (Before / After). Its file's name is its name: ``fold_batch_norm.py``
holds ``FoldBatchNorm`` whose ``name`` is ``"fold_batch_norm"``. Passes only rewrite; the manager runs, times, lints,
dumps and verifies them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import fx

from .graph.program import Program


@dataclass(frozen=True)
class Note:
    """One rewrite or refusal: the node it is about and, in words, what or why."""

    node: str
    text: str


@dataclass
class Report:
    """What one pass did to one program. ``changed`` is honest: no note in ``changes`` means the graph is as before."""

    changes: list[Note] = field(default_factory=list)
    refusals: list[Note] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether the pass rewrote anything."""
        return bool(self.changes)

    def change(self, node: fx.Node | str, text: str) -> None:
        """Record a rewrite of (what was) a node."""
        self.changes.append(Note(str(node), text))

    def refuse(self, node: fx.Node | str, reason: str) -> None:
        """Record why a candidate was left alone."""
        self.refusals.append(Note(str(node), reason))


class Pass(ABC):
    """One rewrite. Instances are cheap; options come through the constructor.

    ``approximate`` passes change numbers on purpose; later ones are verified against what they leave.
    """

    approximate = False

    @property
    def name(self) -> str:
        """The class's name in snake case, which is its file's name."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def run(self, program: Program, report: Report) -> None:
        """Rewrite the program in place. Running twice changes nothing the second time."""

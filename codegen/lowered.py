"""What lowering leaves of an entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..passes.graph.program import Program
from ..runtime.plan import Buffer, Check, Constant, Plan, Port, Ref, StateBuffer, Step, Symbol


@dataclass
class Lowered:
    """One entry point, lowered: everything of the plan but the places of constants in the weight file.

    ``initial`` are the constants that states start as, by their place in the table.
    """

    program: Program
    symbols: tuple[Symbol, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    results: Any
    checks: tuple[Check, ...]
    states: tuple[StateBuffer, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]

    initial: tuple[int, ...] = ()

    def constants(self) -> set[int]:
        """The constants that the entry point reads, by their place in the table."""
        refs = (ref for step in self.steps for variant in step.variants for ref in variant.operands)
        return {ref.index for ref in refs if ref.kind == "constant"} | set(self.initial)

    def plan(self, constants: Sequence[Constant], numbers: Mapping[int, int]) -> Plan:
        """The finished plan.

        Args:
            constants: those of the plan.
            numbers: place in the table of constants -> place in ``constants``, for all of :meth:`constants`.
        """

        def place(ref: Ref) -> Ref:
            return Ref("constant", numbers[ref.index]) if ref.kind == "constant" else ref

        def placed(step: Step) -> Step:
            variants = (replace(item, operands=tuple(map(place, item.operands))) for item in step.variants)
            return replace(step, variants=tuple(variants))

        return Plan(
            self.program.name, self.symbols, self.inputs, self.outputs, self.results, self.checks, self.states,
            tuple(constants), self.buffers, tuple(map(placed, self.steps)),
        )  # fmt: skip

"""What lowering leaves of an entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..runtime.plan import Constant, Plan, Ref, Step


@dataclass(frozen=True)
class Lowered:
    """One entry point, lowered: everything of the plan but the places of constants in the weight file.

    Attributes:
        draft: the plan without constants, whose operands name them by their place in the table.
        initial: the constants that states start as, by their place in the table.
    """

    draft: Plan
    initial: tuple[int, ...] = ()

    def constants(self) -> set[int]:
        """The constants that the entry point reads, by their place in the table."""
        refs = (ref for step in self.draft.steps for variant in step.variants for ref in variant.operands)
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

        return replace(self.draft, constants=tuple(constants), steps=tuple(map(placed, self.draft.steps)))

"""Sizes that only states have, such as the blocks of a cache: chosen when their memory is made, the same for all calls.

A session names them (``model.session(sizes={"blocks": 512})``); a plain call takes those of the sample.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import sizes
from .binding import StateSizes
from .errors import ShapeError, UsageError
from .plan import Plan, Symbol

ALIGNMENT = 64
"""Bytes; every state begins at a multiple."""


def symbols_of_states(plans: Mapping[str, Plan]) -> dict[str, Symbol]:
    """The sizes that states have, over all entry points, by name."""
    return {symbol.name: symbol for plan in plans.values() for symbol in plan.symbols if symbol.state != -1}


def resolve(plans: Mapping[str, Plan], given: Mapping[str, int] | None = None) -> dict[str, int]:
    """A value for every size that states have: those given, else the sample's.

    Raises:
        UsageError: a name that is no size of a state, or a value that is no whole number.
        ShapeError: a value out of range.
    """
    symbols = symbols_of_states(plans)
    values = {name: symbol.sample for name, symbol in symbols.items()}
    for name, value in (given or {}).items():
        if name not in symbols:
            known = f"the sizes of its states are {', '.join(symbols)}" if symbols else "its states have fixed sizes"
            raise UsageError(f"the model has no state whose size is called {name!r}; {known}")
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise UsageError(f"the size {name!r} must be a whole number, got {value!r}")
        number, symbol = value.__index__(), symbols[name]
        if not symbol.minimum <= number <= symbol.maximum:
            raise ShapeError(
                f"the size {name!r} of the states must be {symbol.minimum} to {symbol.maximum}, got {number}"
            )
        values[name] = number
    return values


def of_plan(plan: Plan, values: Mapping[str, int]) -> StateSizes:
    """What binding a call of one entry point takes."""
    return tuple(values[symbol.name] for symbol in plan.symbols if symbol.state != -1)


def bytes_of_states(plans: Mapping[str, Plan], values: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every state by name; entry points share states of one name."""
    return {state.name: sizes.evaluate(state.bytes, values) for plan in plans.values() for state in plan.states}


def total_bytes(plans: Mapping[str, Plan], values: Mapping[str, int]) -> int:
    """Bytes that all states take together, in memory."""
    return sum(-(-count // ALIGNMENT) * ALIGNMENT for count in bytes_of_states(plans, values).values())

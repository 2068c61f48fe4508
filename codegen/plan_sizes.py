"""The sizes that a plan depends on: where each is read when the model is called, and what is checked of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..passes.graph.program import Program
from ..runtime import sizes
from ..runtime.errors import CompileError
from ..runtime.plan import Check, Symbol
from .storage import Storage
from .symbols import SymbolTable


def plan_symbols(
    program: Program, table: SymbolTable, inputs: Sequence[Storage], states: Sequence[Storage]
) -> tuple[Symbol, ...]:
    """The program's symbols, each with the axis of a state or an input that it is read from.

    Raises:
        CompileError: there is no such axis.
    """
    found = []
    for symbol, entry in program.symbols.items():
        name = table.names[symbol]
        limits = entry.name, entry.minimum, entry.maximum
        if place := _where(name, states):
            number, axis, factor, offset = place
            sample = (program.states[number].initial.shape[axis] - offset) // factor
            found.append(Symbol(*limits, sample, -1, axis, factor, offset, number))
        elif place := _where(name, inputs):
            number, axis, factor, offset = place
            given = program.sample
            sample = (given[number].shape[axis] - offset) // factor if given else entry.minimum
            found.append(Symbol(*limits, sample, number, axis, factor, offset))
        else:
            raise CompileError(
                f"the size {entry.name} is not an axis of any input, so it cannot be read when the model is called"
            )
    return tuple(found)


def plan_checks(program: Program, table: SymbolTable) -> tuple[Check, ...]:
    """What the exporter assumed of sizes, as conditions to check when the model is called.

    Raises:
        CompileError: one never holds.
    """
    checks = []
    for guard in program.guards:
        condition = table.public(table.size(guard))
        if isinstance(condition, int):
            if not condition:
                raise CompileError(f"the exporter assumed {guard}, which never holds for the declared sizes")
            continue
        checks.append(Check(condition, f"the model was traced assuming {sizes.show(condition)}"))
    return tuple(checks)


def _where(name: str, storages: Sequence[Storage]) -> tuple[int, int, int, int] | None:
    """(storage, axis, factor, offset) where a symbol can be read, as ``factor * symbol + offset``; as it is, if it is.

    A sum of sizes, or one times another, gives none of them away.
    """
    found = None
    for number, storage in enumerate(storages):
        for axis, extent in enumerate(storage.shape):
            if extent == name:
                return number, axis, 1, 0
            if found is not None or sizes.symbols_of(extent) != {name}:
                continue
            offset = sizes.evaluate(extent, {name: 0})
            factor = sizes.evaluate(extent, {name: 1}) - offset
            if factor > 0 and offset >= 0 and extent == sizes.add(sizes.mul(name, factor), offset):
                found = (number, axis, factor, offset)
    return found

"""The description of an entry point that its library exports (``tw_entry.h``), for programs without a JSON reader."""

from __future__ import annotations

from collections.abc import Sequence

from ...runtime import sizes
from ...runtime.plan import Plan, Port
from ...runtime.plan_check import ITEM_BYTES
from ...runtime.sizes import Size
from ..symbols import PREFIX
from . import dialect


def size_text(size: Size) -> str:
    """A size of the plan in C, its symbols under the names of :func:`symbol_lines`."""
    return dialect.size(sizes.substitute(size, {name: PREFIX + name for name in sizes.symbols_of(size)}))


def symbol_lines(plan: Plan, source: str) -> list[str]:
    """Declarations of the call's symbols, read from the array ``source``."""
    lines = []
    for position, symbol in enumerate(plan.symbols):
        name = PREFIX + symbol.name
        lines += [f"    const int64_t {name} = {source}[{position}];", f"    (void){name};"]
    return lines


def description(plan: Plan) -> list[str]:
    """The lines that define ``tw_entry_<entry>``; ``tw_arena_<entry>`` and ``tw_run_<entry>`` are declared before."""
    starts = {constant.name: constant.offset for constant in plan.constants}
    symbols = [f"{{{text(symbol.name)}, {symbol.minimum}, {symbol.maximum}}}" for symbol in plan.symbols]
    states = [
        f"{{{text(state.name)}, {state.bytes if isinstance(state.bytes, int) else -1}, "
        f"{starts[state.initial] if state.initial else -1}}}"
        for state in plan.states
    ]
    lines = _table("tw_symbol", "symbols", symbols)
    lines += _table("tw_port", "inputs", [_port(port) for port in plan.inputs])
    lines += _table("tw_port", "outputs", [_port(port) for port in plan.outputs])
    lines += _table("tw_state", "states", states)
    lines += ["", *_check_function(plan), "", *_shapes_function(plan), "", *_state_bytes_function(plan), ""]
    counts = ", ".join(str(len(items)) for items in (plan.symbols, plan.inputs, plan.outputs, plan.states))
    name = f"tw_entry_{plan.entry}"
    return [
        *lines,
        f"TW_API extern const tw_entry {name};",
        f"const tw_entry {name} = {{",
        f"    {text(plan.entry)}, {counts}, tw_symbols, tw_inputs, tw_outputs, tw_states,",
        f"    tw_check, tw_shapes, tw_arena_{plan.entry}, tw_run_{plan.entry}, tw_state_bytes,",
        "};",
    ]


def text(value: str) -> str:
    """A C string of the UTF-8 bytes of a text, whatever is in it."""
    plain = {byte for byte in range(32, 127)} - set(b'"\\?')
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in value.encode()) + '"'


def _port(port: Port) -> str:
    return f"{{{text(port.name)}, {text(port.dtype)}, {ITEM_BYTES[port.dtype]}, {len(port.shape)}}}"


def _table(kind: str, name: str, items: Sequence[str]) -> list[str]:
    """An array of what there is; C has no empty arrays, so a table without items has one of zeros."""
    return [f"static const {kind} tw_{name}[] = {{{', '.join(items) or '{0}'}}};"]


def _check_function(plan: Plan) -> list[str]:
    """Ranges of the symbols, then the relations between them."""
    lines = ["static const char *tw_check(const int64_t *symbols) {", *symbol_lines(plan, "symbols")]
    for symbol in plan.symbols:
        name = PREFIX + symbol.name
        message = text(f"{symbol.name} must be {symbol.minimum} to {symbol.maximum}")
        lines.append(f"    if ({name} < {symbol.minimum} || {name} > {symbol.maximum}) return {message};")
    for check in plan.checks:
        lines.append(f"    if (!({size_text(check.condition)})) return {text(check.message)};")
    return [*lines, "    (void)symbols;", "    return NULL;", "}"]


def _shapes_function(plan: Plan) -> list[str]:
    dims = [size for port in (*plan.inputs, *plan.outputs) for size in port.shape]
    lines = ["static void tw_shapes(const int64_t *symbols, int64_t *dims) {", *symbol_lines(plan, "symbols")]
    lines += [f"    dims[{index}] = {size_text(size)};" for index, size in enumerate(dims)]
    return [*lines, "    (void)symbols;", "    (void)dims;", "}"]


def _state_bytes_function(plan: Plan) -> list[str]:
    lines = ["static void tw_state_bytes(const int64_t *symbols, int64_t *bytes) {", *symbol_lines(plan, "symbols")]
    lines += [f"    bytes[{index}] = {size_text(state.bytes)};" for index, state in enumerate(plan.states)]
    return [*lines, "    (void)symbols;", "    (void)bytes;", "}"]

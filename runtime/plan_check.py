"""What must hold in a plan beyond the types of its fields: references, names, sizes, lifetimes and arena order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import sizes
from .typed_json import FieldError

if TYPE_CHECKING:
    from .plan import Buffer, Plan, Port, Ref, StateBuffer, Step, Variant
    from .sizes import Size

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip
_TILE_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


def check(plan: Plan) -> None:
    """Validate a plan whose fields have the right types.

    Raises:
        FieldError: with the path of the offending field.
    """
    _identifier(plan.entry, "entry")
    known = _check_symbols(plan)
    for group, ports in (("inputs", plan.inputs), ("outputs", plan.outputs)):
        _unique([port.name for port in ports], group)
        for index, port in enumerate(ports):
            _check_port(port, known, f"{group}[{index}]")
    for index, item in enumerate(plan.checks):
        _check_size(item.condition, known, f"checks[{index}].condition")
    _check_results(plan.results, known, len(plan.outputs), "results")
    _check_constants(plan)
    _check_states(plan, known)
    for index, step in enumerate(plan.steps):
        _check_step(plan, index, step, known)
    for index, buffer in enumerate(plan.buffers):
        _check_buffer(plan, buffer, known, f"buffers[{index}]")
    _check_arena(plan.buffers)


def topological(buffers: tuple[Buffer, ...]) -> list[int]:
    """Indices of the buffers so that each comes after all in its ``below``.

    Raises:
        FieldError: ``below`` has a cycle.
    """
    above: list[list[int]] = [[] for _ in buffers]
    waiting = [len(buffer.below) for buffer in buffers]
    for index, buffer in enumerate(buffers):
        for other in buffer.below:
            above[other].append(index)
    order = [index for index, count in enumerate(waiting) if count == 0]
    for index in order:
        for other in above[index]:
            waiting[other] -= 1
            if waiting[other] == 0:
                order.append(other)
    if len(order) < len(buffers):
        stuck = next(index for index, count in enumerate(waiting) if count)
        raise _fault(f"buffers[{stuck}].below", "the order of the buffers has a cycle")
    return order


def _fault(path: str, problem: str) -> FieldError:
    return FieldError(problem).within(path)


def _identifier(name: str, path: str) -> None:
    if not (name.isascii() and name.isidentifier()):
        raise _fault(path, f"{name!r} is not an identifier")


def _unique(names: list[str], group: str) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not name or not name.isprintable():
            raise _fault(f"{group}[{index}].name", f"{name!r} is not a usable name")
        if name in seen:
            raise _fault(f"{group}[{index}].name", f"{name!r} occurs twice")
        seen.add(name)


def _check_size(size: sizes.Size, known: frozenset[str], path: str) -> None:
    if type(size) is int:
        return
    for name in sizes.symbols_of(size):
        if name not in known:
            raise _fault(path, f"unknown symbol {name!r}")


def _check_symbols(plan: Plan) -> frozenset[str]:
    _unique([symbol.name for symbol in plan.symbols], "symbols")
    for index, symbol in enumerate(plan.symbols):
        path = f"symbols[{index}]"
        _identifier(symbol.name, f"{path}.name")
        if not 0 <= symbol.minimum <= symbol.sample <= symbol.maximum < 2**48:
            raise _fault(path, "expected 0 <= minimum <= sample <= maximum < 2**48")
        if symbol.factor < 1:
            raise _fault(f"{path}.factor", f"expected a positive factor, got {symbol.factor}")
        if symbol.offset < 0:
            raise _fault(f"{path}.offset", f"expected 0 or more, got {symbol.offset}")
        of_state = symbol.state != -1
        kind, number = ("state", symbol.state) if of_state else ("input", symbol.input)
        if of_state and symbol.input != -1:
            raise _fault(f"{path}.input", "a size is read from an input or from a state, not from both")
        ports: Sequence[Port | StateBuffer] = plan.states if of_state else plan.inputs
        if not 0 <= number < len(ports):
            raise _fault(f"{path}.{kind}", f"there is no {kind} {number}")
        shape = ports[number].shape
        if not 0 <= symbol.axis < len(shape):
            raise _fault(f"{path}.axis", f"{kind} {number} has no axis {symbol.axis}")
        expected = sizes.add(sizes.mul(symbol.name, symbol.factor), symbol.offset)
        if shape[symbol.axis] != expected:
            raise _fault(f"{path}.axis", f"the size of that axis is not {sizes.show(expected)}")
    return frozenset(symbol.name for symbol in plan.symbols)


def _check_dtype(dtype: str, path: str) -> None:
    if dtype not in ITEM_BYTES:
        raise _fault(f"{path}.dtype", f"unknown dtype {dtype!r}")


def _check_port(port: Port, known: frozenset[str], path: str) -> None:
    _check_dtype(port.dtype, path)
    for axis, size in enumerate(port.shape):
        _check_size(size, known, f"{path}.shape[{axis}]")
        if isinstance(size, int) and size < 0:
            raise _fault(f"{path}.shape[{axis}]", f"negative size {size}")


def _check_results(tree: Any, known: frozenset[str], outputs: int, path: str) -> None:
    if not isinstance(tree, dict) or len(tree) != 1:
        raise _fault(path, 'expected one of {"output": ...}, {"size": ...}, {"constant": ...}, {"tuple": ...}, ...')
    ((kind, value),) = tree.items()
    if kind == "output":
        if type(value) is not int or not 0 <= value < outputs:
            raise _fault(path, f"there is no output {value!r}")
    elif kind == "size":
        try:
            _check_size(sizes.from_json(value), known, path)
        except FieldError:
            raise
        except ValueError as error:
            raise _fault(path, str(error)) from None
    elif kind == "constant":
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise _fault(path, "a constant result is null, a number, a truth value or a string")
    elif kind in ("tuple", "list") and isinstance(value, list):
        for index, part in enumerate(value):
            _check_results(part, known, outputs, f"{path}.{kind}[{index}]")
    elif kind == "dict" and isinstance(value, dict):
        for key, part in value.items():
            _check_results(part, known, outputs, f"{path}.dict[{key!r}]")
    else:
        raise _fault(path, f"unknown or malformed result {kind!r}")


def _check_constants(plan: Plan) -> None:
    _unique([constant.name for constant in plan.constants], "constants")
    for index, constant in enumerate(plan.constants):
        path = f"constants[{index}]"
        _check_dtype(constant.dtype, path)
        if any(size < 0 for size in constant.shape):
            raise _fault(f"{path}.shape", "negative size")
        expected = nbytes(constant.dtype, constant.shape)
        if constant.bytes != expected:
            raise _fault(f"{path}.bytes", f"expected {expected} for its dtype and shape, got {constant.bytes}")
        if constant.offset < 0 or constant.offset % 64:
            raise _fault(f"{path}.offset", f"expected a non-negative multiple of 64, got {constant.offset}")


def _check_states(plan: Plan, known: frozenset[str]) -> None:
    _unique([state.name for state in plan.states], "states")
    chosen = {symbol.name for symbol in plan.symbols if symbol.state != -1}
    constants = {constant.name: constant for constant in plan.constants}
    for index, state in enumerate(plan.states):
        path = f"states[{index}]"
        _check_dtype(state.dtype, path)
        for axis, size in enumerate(state.shape):
            _check_size(size, known, f"{path}.shape[{axis}]")
            if others := sizes.symbols_of(size) - chosen:
                raise _fault(f"{path}.shape[{axis}]", f"{min(others)} is not a size of states")
            if sizes.bounds(size, plan.ranges())[0] < 0:
                raise _fault(f"{path}.shape[{axis}]", "negative size")
        expected = sizes.mul(sizes.product(state.shape), ITEM_BYTES[state.dtype])
        if state.bytes != expected:
            shown = f"expected {sizes.show(expected)} for its dtype and shape, got {sizes.show(state.bytes)}"
            raise _fault(f"{path}.bytes", shown)
        if state.initial and not isinstance(state.bytes, int):
            raise _fault(f"{path}.initial", "a state whose size varies starts as zeros")
        if state.initial:
            initial = constants.get(state.initial)
            if initial is None:
                raise _fault(f"{path}.initial", f"there is no constant {state.initial!r}")
            if initial.bytes != state.bytes:
                raise _fault(f"{path}.initial", f"constant {state.initial!r} has another size than the state")


def _check_step(plan: Plan, index: int, step: Step, known: frozenset[str]) -> None:
    path = f"steps[{index}]"
    if not step.variants:
        raise _fault(f"{path}.variants", "a step needs a variant")
    if step.variants[-1].guard != 1:
        raise _fault(f"{path}.variants[{len(step.variants) - 1}].guard", "the last variant's guard must be 1")
    for number, variant in enumerate(step.variants):
        where = f"{path}.variants[{number}]"
        _identifier(variant.kernel, f"{where}.kernel")
        for name in ("guard", "flops", "bytes"):
            _check_size(getattr(variant, name), known, f"{where}.{name}")
        _check_tiles(variant, known, where)
        for position, size in enumerate(variant.sizes):
            _check_size(size, known, f"{where}.sizes[{position}]")
        for position, ref in enumerate(variant.operands):
            _check_ref(plan, ref, index, f"{where}.operands[{position}]")
        for position in step.writes:
            if not 0 <= position < len(variant.operands):
                raise _fault(f"{path}.writes", f"variant {number} has no operand {position}")
            if variant.operands[position].kind in ("input", "constant"):
                raise _fault(f"{path}.writes", f"operand {position} is read-only: {variant.operands[position].kind}")


def _check_tiles(variant: Variant, known: frozenset[str], path: str) -> None:
    """Names and values of the tiles, and the units, which may name constants that all tiles have."""
    seen: set[str] = set()
    shared: frozenset[str] | None = None
    for number, tile in enumerate(variant.tiles):
        where = f"{path}.tiles[{number}]"
        if not tile.name or not _TILE_LETTERS.issuperset(tile.name) or tile.name in seen:
            raise _fault(f"{where}.name", f"{tile.name!r} is not a usable name, or occurs twice")
        seen.add(tile.name)
        for constant in tile.constants:
            _identifier(constant.name, f"{where}.constants")
            if constant.name in known:
                raise _fault(f"{where}.constants", f"{constant.name!r} is the name of a symbol")
        if tile.warps not in (1, 2, 4, 8, 16, 32) or not 1 <= tile.stages <= 16:
            raise _fault(where, f"{tile.warps} warps and {tile.stages} stages are not possible")
        _check_size(tile.guard, known, f"{where}.guard")
        names = frozenset(tile.values())
        shared = names if shared is None else shared & names
    _check_size(variant.units, known | (shared or frozenset()), f"{path}.units")


def _check_ref(plan: Plan, ref: Ref, step: int, path: str) -> None:
    if ref.kind in ("fault", "counters"):
        if ref.index != (step if ref.kind == "fault" else 0):
            raise _fault(path, f"there is no {ref.kind} {ref.index} for this step")
        return
    count = len(getattr(plan, f"{ref.kind}s"))
    if not 0 <= ref.index < count:
        raise _fault(path, f"there is no {ref.kind} {ref.index}")
    if ref.kind == "buffer":
        buffer = plan.buffers[ref.index]
        if not buffer.first <= step <= buffer.last:
            raise _fault(path, f"buffer {ref.index} lives from step {buffer.first} to {buffer.last} only")


def _may_divide_by_zero(size: Size, plan: Plan) -> bool:
    """Whether a divisor may be 0; the plan's checks may exclude the sizes at which a varying one is."""
    if not isinstance(size, sizes.Op):
        return False
    if size.op in ("floordiv", "mod"):
        low, high = sizes.bounds(size.args[1], plan.ranges())
        if high <= 0 or (low <= 0 and not plan.checks):
            return True
    return any(_may_divide_by_zero(part, plan) for part in size.args)


def _check_buffer(plan: Plan, buffer: Buffer, known: frozenset[str], path: str) -> None:
    _check_dtype(buffer.dtype, path)
    _check_size(buffer.bytes, known, f"{path}.bytes")
    for axis, size in enumerate(buffer.shape):
        _check_size(size, known, f"{path}.shape[{axis}]")
    if _may_divide_by_zero(buffer.bytes, plan):
        raise _fault(f"{path}.bytes", "may divide by zero")
    lowest = sizes.bounds(buffer.bytes, plan.ranges())[0]
    if lowest < 0:
        raise _fault(f"{path}.bytes", "may be negative")
    if not 0 <= buffer.first <= buffer.last < len(plan.steps):
        raise _fault(path, f"expected 0 <= first <= last < {len(plan.steps)} steps, got {buffer.first}, {buffer.last}")
    for other in buffer.below:
        if not 0 <= other < len(plan.buffers):
            raise _fault(f"{path}.below", f"there is no buffer {other}")


def _check_arena(buffers: tuple[Buffer, ...]) -> None:
    """Any two buffers alive at the same step must be ordered, so that no sizes can make them overlap."""
    under = [0] * len(buffers)  # bit set of all buffers below, directly or through others
    for index in topological(buffers):
        for other in buffers[index].below:
            under[index] |= under[other] | 1 << other
    by_first = sorted(range(len(buffers)), key=lambda index: buffers[index].first)
    alive: list[int] = []
    for index in by_first:
        alive = [other for other in alive if buffers[other].last >= buffers[index].first]
        for other in alive:
            if not (under[index] >> other & 1 or under[other] >> index & 1):
                raise _fault(f"buffers[{index}].below", f"lives while buffer {other} does and is not ordered with it")
        alive.append(index)


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a C-contiguous array."""
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return count

"""Lowering: a program of regions becomes a plan, kernel sources and a table of constants.

Every kernel region becomes one step, in graph order. Nothing is fused or split here; copies are added only where a
result must lie in memory of its own (an output that is an input, a constant or given twice, a state's new value).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..passes.graph.program import Program
from ..passes.graph.regions import body, is_region
from ..runtime import sizes
from ..runtime.errors import CompileError, UnsupportedOperator
from ..runtime.plan import (
    Buffer,
    Check,
    Constant,
    Origin,
    Plan,
    Port,
    Ref,
    StateBuffer,
    Step,
    Symbol,
    Tile,
    Variant,
)  # fmt: skip
from ..runtime.plan_check import ITEM_BYTES
from ..runtime.sizes import Size
from .in_place import refuse_later_readers
from .interpret import is_size
from .kernel import NAME, KernelCode, elements
from .memory import plan_memory
from .provenance import origin_of
from .regions import Chooser, Family, Made, Task
from .storage import ConstantTable, Recipe, Storage, is_constant, recipe_of
from .symbols import PREFIX, SymbolTable
from .values import dtype_name


@dataclass(frozen=True)
class KernelSource:
    """A kernel with its name: one source file."""

    name: str
    family: str
    text: str
    tiles: tuple[Tile, ...] = ()
    signature: tuple[str, ...] = ()


@dataclass
class KernelTable:
    """All kernels of an artifact: equal sources are one kernel, whose name spells out its specialisation."""

    kernels: list[KernelSource] = field(default_factory=list)
    _known: dict[object, str] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def add(self, code: KernelCode) -> str:
        """The kernel's name, after adding it if its source is new."""
        identity = (code.source, code.tiles, code.signature)
        known = self._known.get(identity)
        if known is not None:
            return known
        shape = max((parameter.shape for parameter in code.parameters if parameter.written), key=len, default=())
        dims = "x".join(str(extent).removeprefix(PREFIX) if isinstance(extent, int | str) else "n" for extent in shape)
        base = re.sub(r"\W+", "_", f"{code.family}_{code.label[:72]}_{dims}").strip("_").replace("__", "_")
        name, count = base, 1
        while name in self._names:
            count += 1
            name = f"{base}_v{count}"
        self._names.add(name)
        self._known[identity] = name
        source = code.source.replace(NAME, name)
        self.kernels.append(KernelSource(name, code.family, source, code.tiles, code.signature))
        return name


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


def lower(
    program: Program,
    kernels: KernelTable,
    constants: ConstantTable,
    families: Mapping[str, Family],
    precision: str = "ieee",
    tuner: Chooser | None = None,
    panel: int = 32,
) -> Lowered:
    """Lower one entry point.

    Args:
        program: of regions.
        kernels: where the kernels go.
        constants: where the constants go.
        families: the kernel families of the dialect to lower to, by the names that regions have.
        precision: :attr:`Task.precision` of every region.
        tuner: chooses among the kernels that families offer; without it theirs are taken.
        panel: :attr:`Task.panel` of every region.

    Raises:
        UnsupportedOperator: nodes outside regions remain; lists all of them.
        CompileError: a size or a value cannot be expressed.
    """
    before = _assumptions(program)
    lowered = _Lowering(program, kernels, constants, families, precision, tuner, panel).run()
    if len(_assumptions(program)) > len(before):
        raise CompileError(
            f"lowering {program.name} took a size that varies for a number: {_assumptions(program)[len(before)]}; "
            "this is an error of the compiler"
        )
    return lowered


def _assumptions(program: Program) -> list[Any]:
    """What has been assumed of symbolic sizes so far; looking at a symbol's example value adds to it."""
    for node in program.graph.find_nodes(op="placeholder"):
        environment = getattr(getattr(node.meta["val"], "fake_mode", None), "shape_env", None)
        if environment is not None:
            return [guard.expr for guard in environment.guards]
    return []


class _Lowering:
    def __init__(
        self,
        program: Program,
        kernels: KernelTable,
        constants: ConstantTable,
        families: Mapping[str, Family],
        precision: str,
        tuner: Chooser | None,
        panel: int,
    ) -> None:
        self.program = program
        self.panel = panel
        self.tuner = tuner
        self.families = families
        self.precision = precision
        self.kernels = kernels
        self.constants = constants
        self.symbols = SymbolTable(program)
        self.storages: dict[fx.Node, Storage | tuple[Storage, ...]] = {}
        self.inputs: list[Storage] = []
        self.states: list[Storage] = []
        self.outputs: list[Storage] = []
        self.initial: list[int] = []
        self.output_of: dict[fx.Node, Storage] = {}
        self.steps: list[tuple[str, Sequence[Made], Origin, Sequence[Storage]]] = []

    def run(self) -> Lowered:
        graph = self.program.graph
        (returned,) = next(node for node in graph.nodes if node.op == "output").args
        state_outputs = {state.output for state in self.program.states}
        leaves = [item for position, item in enumerate(returned) if position not in state_outputs]  # type: ignore[arg-type, union-attr]
        self._claim_outputs(leaves)
        for node in graph.nodes:
            self._visit(node)
        for leaf in leaves:
            self._deliver(leaf)
        self._update_states([returned[state.output] for state in self.program.states])  # type: ignore[index]
        return self._finish(leaves)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            value = node.meta["val"]
            kind, places = (
                ("input", self.inputs) if len(self.inputs) < len(self.program.inputs) else ("state", self.states)
            )
            storage = Storage(
                kind, self.symbols.shape(value), dtype_name(value.dtype), name=node.name, index=len(places)
            )
            places.append(storage)
            self.storages[node] = storage
        elif is_constant(node):
            recipe = recipe_of(self.program, node)
            self.storages[node] = Storage(
                "constant", recipe.shape, recipe.dtype, name=recipe.label, recipe=recipe, value=_single_value(recipe)
            )
        elif is_region(node, "kernel"):
            self._region(node)
        elif node.target is operator.getitem and node.args[0] in self.storages:
            source, position = node.args
            self.storages[node] = self.storages[source][position]  # type: ignore[index]
        elif node.op == "output" or is_size(node):
            return
        else:
            raise UnsupportedOperator(f"{node}: {node.target} is outside of any region when lowering starts")

    def _region(self, node: fx.Node) -> None:
        nested = body(node)
        values = node.meta["val"]
        several = isinstance(values, tuple | list)
        layouts = node.meta.get("layouts", ())
        users = {user.args[1]: user for user in node.users if user.target is operator.getitem} if several else {0: node}
        operands = [None if is_size(operand) else self._storage(operand) for operand in node.args]  # type: ignore[arg-type]
        results: list[Storage] = []
        for position, value in enumerate(values if several else (values,)):
            if self._works_in_place(node, operands):
                results.append(operands[node.meta["region"].updates])  # type: ignore[arg-type]
                continue
            user = users.get(position)
            layout = layouts[position] if layouts else "rows"
            claimed = self.output_of.get(user) if user is not None else None
            if claimed is not None and layout == "rows":
                results.append(claimed)
                claimed.kind = "output"
                continue
            name = user.name if user is not None else f"{node.name}_{position}"
            results.append(Storage("buffer", self.symbols.shape(value), dtype_name(value.dtype), layout, name))
        updates = node.meta["region"].updates
        if updates is not None and operands[updates] is not results[0]:  # no state: the kernel updates a copy
            old = node.args[updates]
            assert isinstance(old, fx.Node)
            self._copy(old, self._storage(old), results[0])
            operands[updates] = results[0]
        tuned_for = self.tuner.base if self.tuner else ""
        task = Task(
            node, nested, operands, results, self.symbols, self.constants, self.precision, tuned_for, self.panel
        )
        family = node.meta["region"].family
        try:
            made = self.families[family](task)
            if self.tuner is not None:
                values = {PREFIX + symbol.name: symbol.sample for symbol in self._symbols()}
                made = [self.tuner.choose(item, values) for item in made]
        except (CompileError, UnsupportedOperator) as error:
            raise type(error)(f"{origin_of(node).source or node.name}: {error}") from error
        self.steps.append((family, made, origin_of(node), results))
        self.storages[node] = tuple(results) if several else results[0]

    def _works_in_place(self, node: fx.Node, operands: Sequence[Storage | None]) -> bool:
        """Whether a region's result is the memory of a state that it updates.

        Raises:
            CompileError: it ought to be, but something still reads what was there.
        """
        updates = node.meta["region"].updates
        storage = operands[updates] if updates is not None else None
        if storage is None or storage.kind != "state":
            return False
        refuse_later_readers(self.program, node, self.program.states[storage.index])
        return True

    def _storage(self, node: fx.Node) -> Storage:
        storage = self.storages[node]
        assert isinstance(storage, Storage), node
        return storage

    # -- outputs and states --------------------------------------------------------------------------------------------

    def _claim_outputs(self, leaves: Sequence[Any]) -> None:
        """Give every tensor result an output; a node given twice has two, the first of which it may write itself."""
        for leaf in leaves:
            if not isinstance(leaf, fx.Node) or is_size(leaf):
                continue
            value = leaf.meta["val"]
            storage = Storage(
                "copied", self.symbols.shape(value), dtype_name(value.dtype), name=leaf.name, index=len(self.outputs)
            )
            self.outputs.append(storage)
            self.output_of.setdefault(leaf, storage)

    def _deliver(self, leaf: Any) -> None:
        """Copy a result that its producer did not write into its output."""
        if not isinstance(leaf, fx.Node) or is_size(leaf):
            return
        for storage in self.outputs:
            if storage.kind == "copied" and storage.name == leaf.name:
                storage.kind = "output"
                self._copy(leaf, self._storage(leaf), storage)

    def _update_states(self, values: Sequence[fx.Node]) -> None:
        """Copy new values into their states, where one may be the old value of another: that one is copied first."""
        pending = {
            state: (node, self._storage(node))
            for state, node in zip(self.states, values, strict=True)
            if self._storage(node) is not state
        }
        while pending:
            read = [source for _, source in pending.values()]
            target = next((state for state in pending if state not in read), None)
            if target is None:  # states exchange their values: put one aside
                target = next(iter(pending))
                node = next(node for node, source in pending.values() if source is target)
                aside = Storage("buffer", target.shape, target.dtype, name=f"{target.name}_before")
                self._copy(node, target, aside)
                pending = {
                    state: (node, aside if source is target else source) for state, (node, source) in pending.items()
                }
            node, source = pending.pop(target)
            self._copy(node, source, target)

    def _copy(self, node: fx.Node, origin: Storage, target: Storage) -> None:
        """Add a step that copies a node's value from one storage into another."""
        graph = fx.Graph()
        source = graph.placeholder("x")
        source.meta["val"] = node.meta["val"]
        copy = graph.call_function(torch.ops.aten.clone.default, (source,))
        copy.meta["val"] = node.meta["val"]
        graph.output(copy)
        nested = fx.GraphModule(torch.nn.Module(), graph)
        task = Task(node, nested, [origin], [target], self.symbols, self.constants, self.precision)
        self.steps.append(("loop", self.families["loop"](task), origin_of(node), [target]))

    # -- the plan ------------------------------------------------------------------------------------------------------

    def _finish(self, leaves: Sequence[Any]) -> Lowered:
        buffers = self._buffers()
        steps = tuple(self._step(number, *step) for number, step in enumerate(self.steps))
        symbols = self._symbols()
        return Lowered(
            program=self.program,
            symbols=symbols,
            inputs=tuple(
                Port(given.name, s.dtype, self._shape(s))
                for given, s in zip(self.program.inputs, self.inputs, strict=True)
            ),
            outputs=tuple(
                Port(name, s.dtype, self._shape(s))
                for name, s in zip(output_names(self.program.results, leaves), self.outputs, strict=True)
            ),
            results=self._results(leaves),
            checks=self._checks(),
            states=tuple(self._state(state, s) for state, s in zip(self.program.states, self.states, strict=True)),
            buffers=plan_memory(buffers, _assignments(symbols)),
            steps=steps,
            initial=tuple(self.initial),
        )

    def _buffers(self) -> list[Buffer]:
        """Scratch buffers with their lives, numbered by first use."""
        lives: dict[int, tuple[Storage, int, int]] = {}
        for number, (_, made, _, _) in enumerate(self.steps):
            for variant in made:
                for storage in variant.storages:
                    if storage.kind == "buffer":
                        first = lives[id(storage)][1] if id(storage) in lives else number
                        lives[id(storage)] = (storage, first, number)
        buffers = []
        for index, (storage, first, last) in enumerate(lives.values()):
            storage.index = index
            size = sizes.mul(elements(storage.shape, storage.layout), ITEM_BYTES[storage.dtype])
            shape = self._shape(storage)
            buffers.append(
                Buffer(storage.name, storage.dtype, shape, storage.layout, self.symbols.public(size), first, last)
            )
        return buffers

    def _shape(self, storage: Storage) -> tuple[Size, ...]:
        return tuple(map(self.symbols.public, storage.shape))

    def _step(self, number: int, family: str, made: Sequence[Made], origin: Origin, results: Sequence[Storage]) -> Step:
        variants = []
        name = ""
        public = self.symbols.public
        for item in made:
            code = item.code
            name = self.kernels.add(code)
            operands = tuple(_ref(storage, number) for storage in item.storages)
            work = (public(code.units), public(item.guard), public(code.flops), public(code.bytes))
            tiles = tuple(replace(tile, guard=public(tile.guard)) for tile in code.tiles)
            variants.append(Variant(name, operands, tuple(map(public, code.symbols)), *work, tiles=tiles))
        written = {_positions(item.storages, results) for item in made}
        if len(written) > 1:
            raise CompileError(f"the variants of step {number} ({name}) take its results at different places")
        return Step(name, family, tuple(variants), written.pop(), origin)

    def _symbols(self) -> tuple[Symbol, ...]:
        found = []
        for symbol, entry in self.program.symbols.items():
            name = self.symbols.names[symbol]
            limits = entry.name, entry.minimum, entry.maximum
            if place := _where(name, self.states):
                number, axis, factor, offset = place
                sample = (self.program.states[number].initial.shape[axis] - offset) // factor
                found.append(Symbol(*limits, sample, -1, axis, factor, offset, number))
            elif place := _where(name, self.inputs):
                number, axis, factor, offset = place
                given = self.program.sample
                sample = (given[number].shape[axis] - offset) // factor if given else entry.minimum
                found.append(Symbol(*limits, sample, number, axis, factor, offset))
            else:
                raise CompileError(
                    f"the size {entry.name} is not an axis of any input, so it cannot be read when the model is called"
                )
        return tuple(found)

    def _checks(self) -> tuple[Check, ...]:
        checks = []
        for guard in self.program.guards:
            condition = self.symbols.public(self.symbols.size(guard))
            if isinstance(condition, int):
                if not condition:
                    raise CompileError(f"the exporter assumed {guard}, which never holds for the declared sizes")
                continue
            checks.append(Check(condition, f"the model was traced assuming {sizes.show(condition)}"))
        return tuple(checks)

    def _state(self, state: Any, storage: Storage) -> StateBuffer:
        shape = self._shape(storage)
        size = sizes.mul(sizes.product(shape), ITEM_BYTES[storage.dtype])
        initial = ""
        if bool(torch.any(state.initial != 0)):
            tensor = state.initial
            recipe = Recipe(
                (tensor.data_ptr(), tuple(tensor.shape)),
                (state.name,),
                state.name,
                storage.dtype,
                tuple(tensor.shape),
                lambda: tensor,
            )
            index = self.constants.request(recipe)
            self.initial.append(index)
            initial = self.constants.constants[index].key
        return StateBuffer(state.name, storage.dtype, shape, size, initial)

    def _results(self, leaves: Sequence[Any]) -> Any:
        numbers: dict[int, Any] = {}
        tensors = 0
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, fx.Node) and not is_size(leaf):
                numbers[position] = {"output": tensors}
                tensors += 1
            elif isinstance(leaf, fx.Node):
                numbers[position] = {"size": self.symbols.public(self.symbols.size(leaf.meta["val"]))}
            else:
                numbers[position] = {"constant": leaf}

        def build(tree: Any) -> Any:
            ((kind, value),) = tree.items()
            if kind == "leaf":
                return numbers[value]
            if kind == "dict":
                return {"dict": {key: build(item) for key, item in value.items()}}
            if kind in ("tuple", "list"):
                return {kind: [build(item) for item in value]}
            return tree

        return build(self.program.results)


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


def _positions(storages: Sequence[Storage], results: Sequence[Storage]) -> tuple[int, ...]:
    """Where the results of a step are among a kernel's operands."""
    places = {id(storage): position for position, storage in enumerate(storages)}
    return tuple(places[id(result)] for result in results)


def _ref(storage: Storage, step: int) -> Ref:
    """The plan's reference to a storage; the words of faults are numbered by step, counters are shared by all."""
    index = step if storage.kind == "fault" else 0 if storage.kind == "counters" else storage.index
    return Ref(storage.kind, index)  # type: ignore[arg-type]


def _single_value(recipe: Recipe) -> float | int | bool | None:
    """The value of a constant with one element, which kernels write down instead of loading it."""
    if recipe.shape == () or (all(extent == 1 for extent in recipe.shape) and len(recipe.shape) <= 2):
        return recipe.load().item()
    return None


def output_names(tree: Any, leaves: Sequence[Any]) -> list[str]:
    """A name per tensor result: its key in a dictionary, else ``output`` with its position."""
    names: dict[int, str] = {}

    def visit(node: Any, path: str) -> None:
        ((kind, value),) = node.items()
        if kind == "leaf":
            names[value] = path or "output"
        elif kind == "dict":
            for key, item in value.items():
                visit(item, f"{path}.{key}" if path else str(key))
        elif kind in ("tuple", "list"):
            for position, item in enumerate(value):
                visit(item, f"{path}.{position}" if path else f"output{position}")

    visit(tree, "")
    return [
        names.get(position, f"output{position}")
        for position, leaf in enumerate(leaves)
        if isinstance(leaf, fx.Node) and not is_size(leaf)
    ]


def _assignments(symbols: tuple[Symbol, ...]) -> list[dict[str, int]]:
    """The smallest, the sample's and the largest sizes."""
    return [
        {symbol.name: symbol.minimum for symbol in symbols},
        {symbol.name: symbol.sample for symbol in symbols},
        {symbol.name: symbol.maximum for symbol in symbols},
    ]

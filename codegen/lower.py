"""Lowering: a program of regions becomes a plan, kernel sources and a table of constants.

Every kernel region becomes one step, in graph order. Nothing is fused or split here; copies are added only where a
result must lie in memory of its own (an output that is an input, a constant or given twice, a state's new value).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..passes.graph.program import Program
from ..passes.graph.regions import body, is_region
from ..runtime import sizes
from ..runtime.errors import CompileError, UnsupportedOperator
from ..runtime.plan import Buffer, Origin, Plan, Port, Ref, Step, Symbol, Variant
from ..runtime.plan_check import ITEM_BYTES
from ..runtime.sizes import Size
from .in_place import refuse_later_readers
from .interpret import is_size
from .kernel import elements
from .kernel_table import KernelTable
from .lowered import Lowered
from .memory import plan_memory
from .outputs import Outputs, output_names, result_tree
from .plan_sizes import plan_checks, plan_symbols
from .provenance import origin_of
from .regions import Chooser, Family, Made, Task
from .states import state_buffer, updates
from .storage import ConstantTable, Packing, Recipe, Storage, is_constant, recipe_of
from .symbols import PREFIX, SymbolTable
from .values import dtype_name


def lower(
    program: Program,
    kernels: KernelTable,
    constants: ConstantTable,
    families: Mapping[str, Family],
    precision: str = "ieee",
    tuner: Chooser | None = None,
    panel: int = 32,
    tables: Mapping[fx.Node, Packing] | None = None,
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
        tables: constants that all readers take in a packing whose layout index functions know.

    Raises:
        UnsupportedOperator: nodes outside regions remain; lists all of them.
        CompileError: a size or a value cannot be expressed.
    """
    before = _assumptions(program)
    lowered = _Lowering(program, kernels, constants, families, precision, tuner, panel, tables or {}).run()
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
        tables: Mapping[fx.Node, Packing],
    ) -> None:
        self.program = program
        self.tables = tables
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
        self.steps: list[tuple[str, Sequence[Made], Origin, Sequence[Storage]]] = []

    def run(self) -> Lowered:
        graph = self.program.graph
        (returned,) = next(node for node in graph.nodes if node.op == "output").args
        state_outputs = {state.output for state in self.program.states}
        leaves = [item for position, item in enumerate(returned) if position not in state_outputs]  # type: ignore[arg-type, union-attr]
        outputs = self.outputs = Outputs(leaves, self.symbols)
        for node in graph.nodes:
            self._visit(node)
        for leaf in leaves:
            for storage in outputs.unwritten(leaf):
                storage.kind = "output"
                self._copy(leaf, self._storage(leaf), storage)
        values = [returned[state.output] for state in self.program.states]  # type: ignore[index]
        places = [(node, self._storage(node)) for node in values]  # type: ignore[arg-type]
        for node, origin, target in updates(dict(zip(self.states, places, strict=True))):
            self._copy(node, origin, target)
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
            recipe, packed = recipe_of(self.program, node), self.tables.get(node)
            self.storages[node] = Storage(
                "constant", recipe.shape, recipe.dtype, packed.layout if packed else "rows", recipe.label,
                recipe=recipe, packed=packed, value=_single_value(recipe),
            )  # fmt: skip
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
            claimed = self.outputs.written_by(user)
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
        for first in (item.before for item in made if item.before):
            self.steps.append((first.code.family, [first], origin_of(node), first.storages[-1:]))
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

    # -- copies --------------------------------------------------------------------------------------------------------

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
        states = [
            state_buffer(state, s.dtype, self._shape(s), self.constants)
            for state, s in zip(self.program.states, self.states, strict=True)
        ]
        draft = Plan(
            entry=self.program.name,
            symbols=symbols,
            inputs=tuple(
                Port(given.name, s.dtype, self._shape(s))
                for given, s in zip(self.program.inputs, self.inputs, strict=True)
            ),
            outputs=tuple(
                Port(name, s.dtype, self._shape(s))
                for name, s in zip(output_names(self.program.results, leaves), self.outputs.storages, strict=True)
            ),
            results=result_tree(self.program.results, leaves, self.symbols),
            checks=plan_checks(self.program, self.symbols),
            states=tuple(state for state, _ in states),
            constants=(),
            buffers=plan_memory(buffers, _assignments(symbols)),
            steps=steps,
        )
        return Lowered(draft, tuple(index for _, index in states if index is not None))

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

    def _symbols(self) -> tuple[Symbol, ...]:
        return plan_symbols(self.program, self.symbols, self.inputs, self.states)

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


def _assignments(symbols: tuple[Symbol, ...]) -> list[dict[str, int]]:
    """The smallest, the sample's and the largest sizes."""
    return [
        {symbol.name: symbol.minimum for symbol in symbols},
        {symbol.name: symbol.sample for symbol in symbols},
        {symbol.name: symbol.maximum for symbol in symbols},
    ]

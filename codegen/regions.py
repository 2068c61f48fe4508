"""From a region to kernels: what every kernel family of every dialect is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from ..runtime.errors import CompileError
from ..runtime.sizes import Size
from .interpret import Env, interpret, result_values
from .kernel import KernelCode, Parameter
from .registry import Region
from .storage import ConstantTable, Packing, Storage, unique
from .symbols import SymbolTable
from .values import Kernel, Value


@dataclass(frozen=True)
class Output:
    """A result of a loop kernel: the parameter it is stored to and its value."""

    parameter: Parameter
    value: Value


@dataclass
class Task:
    """One region to be made into kernels.

    Attributes:
        node: the region's node in the program.
        nested: its graph.
        operands: a storage per placeholder, or ``None`` for a size.
        results: a storage per result.
        symbols: translation of symbolic sizes.
        constants: where packed weights are requested.
        precision: how GPU kernels multiply float32: ``"ieee"``, or ``"tf32"`` where that was asked for.
        tuned_for: the base instruction set of the CPU kernels that will be measured; empty where none are.
        panel: columns of the panels of bfloat16 and int8 weights of CPU kernels (``codegen/c/packing.py``).
    """

    node: fx.Node
    nested: fx.GraphModule
    operands: list[Storage | None]
    results: list[Storage]
    symbols: SymbolTable
    constants: ConstantTable
    precision: str = "ieee"
    tuned_for: str = ""
    panel: int = 32

    def placeholders(self) -> list[fx.Node]:
        """The region's placeholders, in the order of ``operands``."""
        return [node for node in self.nested.graph.nodes if node.op == "placeholder"]

    def storage_of(self, placeholder: fx.Node) -> Storage | None:
        """The storage behind a placeholder."""
        return self.operands[self.placeholders().index(placeholder)]

    def packed(self, storage: Storage, packing: Packing) -> Storage:
        """A constant operand in the layout that a kernel streams through."""
        assert storage.recipe is not None
        index = self.constants.request(storage.recipe, packing)
        return Storage("constant", packing.shape, packing.dtype, name=self.constants.constants[index].key, index=index)

    def label(self) -> str:
        """Words for a kernel's name: the operators of the region."""
        words = []
        for node in self.nested.graph.nodes:
            if node.op == "call_function" and hasattr(node.target, "_schema"):
                words.append(str(node.target._schema.name).split("::")[-1].strip("_"))
        return "_".join(dict.fromkeys(words))


@dataclass(frozen=True)
class Made:
    """A kernel and the storages of its parameters, under a guard.

    ``others`` do the same to the last bit in ways that may be faster on some machine; there are some only where kernels
    are measured (:attr:`Task.tuned_for`). ``before`` is a step of its own that runs first; its last storage is what it
    writes.
    """

    code: KernelCode
    storages: tuple[Storage, ...]
    guard: Size = 1
    others: tuple[KernelCode, ...] = ()
    before: Made | None = None


class Frame:
    """The parameters of one kernel: operands that it reads, in first-use order, then results, then scratch memory."""

    def __init__(
        self,
        task: Task,
        *,
        skip: Sequence[fx.Node] = (),
        extra: Sequence[Storage] = (),
        scratch: Sequence[Storage] = (),
    ) -> None:
        self.task = task
        self.scratch = tuple(scratch)
        self._placeholders = [node for node in task.placeholders() if node not in skip]
        reads = [task.storage_of(node) for node in self._placeholders]
        inline = [storage for storage in reads if storage is not None and storage.value is not None]
        plain = [storage for storage in reads if storage is not None and storage not in inline]
        for storage in plain:
            if storage.recipe is not None and storage.index < 0:
                storage.index = task.constants.request(storage.recipe, storage.packed)
        self.reads = unique([*plain, *extra])
        self.storages = (*self.reads, *task.results, *self.scratch)
        names = {id(storage): f"x{position}" for position, storage in enumerate(self.reads)}
        names |= {id(storage): f"y{position}" for position, storage in enumerate(task.results)}
        names |= {id(storage): f"scratch{position}" for position, storage in enumerate(self.scratch)}
        self._names = names
        self.parameters = tuple(self.parameter(storage) for storage in self.storages)

    def name(self, storage: Storage) -> str:
        """The parameter's name in the source."""
        return self._names[id(storage)]

    def parameter(self, storage: Storage) -> Parameter:
        """The parameter that stands for a storage."""
        written = any(storage is result for result in (*self.task.results, *self.scratch))
        return Parameter(self.name(storage), storage.shape, storage.dtype, storage.layout, written)

    def results(self) -> list[Parameter]:
        """The parameters of the results."""
        return [self.parameter(storage) for storage in self.task.results]

    def env(self, kernel: Kernel) -> Env:
        """Values of the placeholders in a fresh kernel."""
        env: Env = {}
        for node in self._placeholders:
            storage = self.task.storage_of(node)
            if storage is None:
                continue
            if storage.value is not None:
                env[node] = kernel.constant(storage.value, storage.dtype, storage.shape)
            else:
                env[node] = kernel.buffer(self.name(storage), storage.shape, storage.dtype, storage.layout)
        return env


Family = Callable[[Task], Sequence[Made]]


class Chooser(Protocol):
    """Who chooses among the kernels that a family offers (``codegen/c/tuning.py``)."""

    @property
    def base(self) -> str:
        """:attr:`Task.tuned_for`."""
        ...

    def choose(self, made: Made, values: Mapping[str, int]) -> Made:
        """The kernel with one of its codes, given the symbols' values by their names in kernels."""
        ...


def region_of(task: Task, kernel: Kernel) -> Region:
    """The lowering context of a task in a kernel."""
    return Region(kernel, task.symbols)


@dataclass(frozen=True)
class LoopRegion:
    """A region that is an index function of its operands, ready to be built as often as a form of kernel needs it."""

    frame: Frame
    make: Callable[[Kernel], tuple[Sequence[Parameter], Sequence[Output]]]


def loop_region(task: Task) -> LoopRegion:
    """What the loop families of all dialects start from.

    Raises:
        CompileError: the results have different shapes.
    """
    if any(result.shape != task.results[0].shape for result in task.results):
        shapes = ", ".join(str(result.shape) for result in task.results)
        raise CompileError(f"{task.node}: the results of one loop kernel must have one shape, not {shapes}")
    used = _used_placeholders(task)
    unread = [node for node in task.placeholders() if node not in used]
    frame = Frame(task, skip=unread)

    def make(kernel: Kernel) -> tuple[Sequence[Parameter], Sequence[Output]]:
        env = frame.env(kernel)
        for node in unread:
            if (storage := task.storage_of(node)) is not None:
                env[node] = kernel.constant(0, storage.dtype, storage.shape)
        interpret(region_of(task, kernel), task.nested.graph.nodes, env)
        values: list[Value] = result_values(task.nested, env)
        outputs = [Output(parameter, value) for parameter, value in zip(frame.results(), values, strict=True)]
        return frame.parameters, outputs

    return LoopRegion(frame, make)


def _used_placeholders(task: Task) -> set[fx.Node]:
    """Placeholders whose elements are read; operands that only give their size are not passed."""
    return {
        node
        for node in task.placeholders()
        if any(
            not str(user.target).startswith(("aten.sym_size", "aten.zeros_like", "aten.ones_like", "aten.full_like"))
            for user in node.users
        )
    }

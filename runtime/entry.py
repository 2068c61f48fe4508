"""Entry points: what all devices share of checking a call, describing its tensors and naming its faults.

A device (``runtime/device.py``) has its own subclass of :class:`Entry`, which runs the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from . import sizes
from .errors import InputError, UsageError
from .plan import Plan, Port
from .records import frozen

if TYPE_CHECKING:
    from .inspection import Reader

W = TypeVar("W")

TraceCallback = Callable[[int, int, "Reader"], None]


@frozen
class TensorSpec:
    """A tensor at the border: a size is a number or an expression such as ``"batch"`` over symbols with ranges."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    ranges: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        where = ", ".join(f"{name} {low}..{high}" for name, (low, high) in self.ranges.items())
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]{f' with {where}' if where else ''}"


class StepTime(NamedTuple):
    """When a step of the plan ran, by a clock of the device; only differences mean something."""

    step: int
    variant: int
    begin_ns: int
    end_ns: int


class Source(Protocol[W]):
    """Where calls get their workspace: the pool of a model (fresh state each time) or a session (its own)."""

    fresh: bool
    sizes: Mapping[str, int]
    """Of the states that its workspaces have (``state_sizes.py``)."""

    def take(self) -> W:
        """A workspace for one call."""

    def give(self, workspace: W) -> None:
        """Return it."""


class Entry(ABC, Generic[W]):
    """One entry point, to be called: ``entry(x)``, ``entry(input_ids=..., attention_mask=...)``."""

    def __init__(self, plan: Plan, source: Source[W]) -> None:
        """Bind an entry point to where its calls run; devices do this."""
        self._plan = plan
        self._source = source

    @property
    def name(self) -> str:
        """The entry point's name."""
        return self._plan.entry

    @property
    def plan(self) -> Plan:
        """What it executes."""
        return self._plan

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes, symbolic shapes and ranges of the inputs."""
        return tuple(self._spec(port) for port in self.plan.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The same of the outputs."""
        return tuple(self._spec(port) for port in self.plan.outputs)

    @abstractmethod
    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            *args: inputs in order: numpy arrays or DLPack tensors of exactly the input's dtype, in host memory or on
                the model's own device; Python numbers and lists of them take the input's dtype. Or buffers (``bytes``,
                ``bytearray``, ``array.array``, ``mmap``, a ``memoryview``), for which no numpy is imported: a view
                whose format and shape are the input's, or, where the input's sizes do not vary, one without a shape
                of exactly its bytes.
            out: memory to write the outputs to: one array or writable buffer, a sequence, or a dictionary by output
                name.
            **kwargs: inputs by name.

        Returns:
            What the model returns (array, tuple, list or dictionary), with arrays that belong to the caller. They are
            numpy arrays; but on a CPU, where everything that was given (inputs and ``out``) is a buffer, they are
            views of the outputs' shapes, in the formats of ``struct``: ``f``, ``q``, ``?``. Half precision is ``H``,
            the bits of float16 or bfloat16, and may come in like this.

        Raises:
            ShapeError: an input's dtype or format, rank or size does not fit.
            InputError: an index in an input is out of range.
            UsageError: an input is missing or unknown, ``out`` does not fit, or the model is closed.
        """

    @abstractmethod
    def profile(self, *args: Any, **kwargs: Any) -> list[StepTime]:
        """Run once and give when each step ran; takes the inputs as a call does."""

    @abstractmethod
    def trace(self, callback: TraceCallback, *args: Any, **kwargs: Any) -> Any:
        """Run, stopping after each step.

        Args:
            callback: called with the step's index, the index of the variant that ran, and a function that reads any
                operand of the plan (a ``Ref``) as a numpy array as it is at that moment. What it raises ends the run
                and is raised here.
            *args: inputs, as for a call.
            **kwargs: inputs by name.

        Returns:
            What a call returns, in host memory.
        """

    def _spec(self, port: Port) -> TensorSpec:
        shape = tuple(size if isinstance(size, int) else sizes.show(size) for size in port.shape)
        used = frozenset().union(*(sizes.symbols_of(size) for size in port.shape))
        ranges = {name: limits for name, limits in self.plan.ranges().items() if name in used}
        return TensorSpec(port.name, port.dtype, shape, ranges)

    def __repr__(self) -> str:
        inputs, outputs = ("; ".join(map(str, specs)) for specs in (self.inputs, self.outputs))
        return f"<entry {self.name}({inputs}) -> ({outputs})>"


def ordered(plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The inputs of a call in the order of the plan.

    Raises:
        UsageError: too many, one that there is not, one given twice, or one missing.
    """
    names = [port.name for port in plan.inputs]
    expected = f"entry {plan.entry!r} takes {', '.join(names) or 'no inputs'}"
    if len(args) > len(names):
        raise UsageError(f"{expected}; got {len(args)} positional inputs")
    values = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise UsageError(f"{expected}; there is no input {name!r}")
        if name in values:
            raise UsageError(f"{expected}; {name!r} was given twice")
        values[name] = value
    if missing := [name for name in names if name not in values]:
        raise UsageError(f"{expected}; {', '.join(missing)} missing")
    return [values[name] for name in names]


def describe_step(plan: Plan, step: int) -> str:
    """A step as messages name it: its number and name, and where in the model it comes from."""
    origin = plan.steps[step].origin
    where = [f"module {origin.module}"] if origin.module else []
    where += [origin.source] if origin.source else []
    where += [f"node {', '.join(origin.nodes)}"] if origin.nodes else []
    return f"step {step} ({plan.steps[step].name}; {'; '.join(where) or 'origin unknown'})"


def index_error(plan: Plan, step: int) -> InputError:
    """The error for a step that met an index out of range."""
    return InputError(
        f"an index is out of range in {describe_step(plan, step)}: "
        f"an input holds a value that the model's tables do not have"
    )

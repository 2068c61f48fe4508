"""Comparing an artifact with eager PyTorch: per output, and per kernel where asked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..codegen.outputs import output_names
from ..passes.base import Report
from ..passes.graph.program import Program
from ..passes.graph.regions import is_region
from ..passes.verify import TOLERANCES, error_of, node_tolerances, tolerances_of
from ..passes.verify import compare as compare_outputs
from ..passes.widen_floats import WidenFloats
from ..runtime.artifact import read_artifact
from ..runtime.entry import Entry
from ..runtime.errors import NumericsError
from ..runtime.plan import Plan, Ref
from ..runtime.sizes import evaluate
from .samples import assignments, make_inputs


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference, at one assignment of the symbols."""

    entry: str
    output: str
    sizes: Mapping[str, int]
    error: float
    tolerance: float
    device: str = "cpu"

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        at = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        where = "" if self.device == "cpu" else f" for {self.device}"
        found = f"{self.entry}{where}: {self.output}: error {self.error:.2e}, tolerance {self.tolerance:.0e}"
        return f"{found} at {at}" if at else found


def reference_of(program: Program) -> Program:
    """A program with its own copy of the graph (weights shared): what later passes do does not touch it."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(program.graph, copied)
    graph.output(returned)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    module = fx.GraphModule(program.module, graph)
    return Program(
        program.name,
        module,
        program.inputs,
        program.states,
        program.results,
        program.symbols,
        program.guards,
        program.sample,
        program.make,
    )


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest error for an output of the dtype; 0 for integers."""
    return TOLERANCES.get(dtype, 0.0)


def why_not_here(path: Path, device: str) -> str:
    """Why an artifact's code for a kind of device cannot be run on this machine; empty where it can."""
    if device == "cpu":
        return ""  # loading says what the processor lacks
    from ..runtime.cuda.probe import why_not

    return why_not(read_artifact(path))


def verify_outputs(
    entry: Entry, reference: Program, device: str = "cpu", precision: str = "auto",
    between: Callable[[], None] = lambda: None,
) -> list[OutputError]:  # fmt: skip
    """Run eager PyTorch and then an entry point on the same inputs at several sizes.

    Args:
        entry: of the loaded artifact.
        reference: the program as captured, before any pass (:func:`reference_of`).
        device: the kind of device that the entry point's plan is for.
        precision: what it computes in (``precision.py``); a coarser one than the model's sets the tolerance.
        between: called when the reference's weights have served.

    Returns:
        One error per output and assignment of the symbols; empty where the model returns no tensor. Integers that
        follow from half-precision numbers are compared where a CPU computes those in float32; elsewhere a unit in the
        last place decides them.
    """
    cases = []
    tolerances = tolerances_of(reference, precision)
    widened = device == "cpu" and precision in ("auto", "fp32")
    wide = _widened(reference) if inf in tolerances and widened else reference
    for values in assignments(reference):
        inputs = make_inputs(reference, values)
        eager = reference.run(inputs)
        exact = eager if wide is reference else wide.run(inputs)
        expected = [
            (value, tolerance) if tolerance < inf or not widened else (same, 0.0)
            for value, same, tolerance in zip(eager, exact, tolerances, strict=True)
            if isinstance(value, torch.Tensor)
        ]
        cases.append((values, inputs, expected))
    between()
    found = []
    for values, inputs, expected in cases:
        results = zip(entry.plan.outputs, expected, run_entry(entry, inputs, values), strict=False)
        for port, (want, tolerance), got in results:
            if tolerance < inf:
                found.append(OutputError(entry.name, port.name, values, error_of(want, got), tolerance, device))
    return found


def verify_program(
    program: Program, reference: Program, device: str = "cuda", precision: str = "auto"
) -> list[OutputError]:
    """Run a program after the passes in eager PyTorch against the one before them, at several sizes.

    This is what can be said of code for a device that is not here. Integers that follow from half-precision numbers
    are not compared: a unit in the last place decides them.

    Args:
        program: after the passes, of regions.
        reference: the program as captured (:func:`reference_of`).
        device: the kind of device that the program is for.
        precision: what it computes in; a coarser one than the model's sets the tolerance.
    """
    (returned,) = program.graph.output_node().args
    names = output_names(program.results, returned[: len(returned) - len(program.states)])  # type: ignore[index, arg-type]
    limits = tolerances_of(reference, precision)
    found = []
    for values in assignments(reference):
        inputs = make_inputs(reference, values)
        pairs = zip(reference.run(inputs), program.run(inputs), limits, strict=True)
        tensors = [item for item in pairs if isinstance(item[0], torch.Tensor)]
        for name, (want, got, limit) in zip(names, tensors, strict=False):
            if limit < inf:
                found.append(OutputError(program.name, name, values, error_of(want, got), limit, device))
    return found


def _widened(program: Program) -> Program:
    wide = reference_of(program)
    WidenFloats().run(wide, Report())
    wide.module.recompile()
    return wide


def require_equal(errors: Sequence[OutputError], hint: str) -> None:
    """Raise if an output is beyond its tolerance.

    Raises:
        NumericsError: lists every such output.
    """
    bad = [error for error in errors if not error.ok]
    if bad:
        raise NumericsError(
            "\n".join([f"{len(bad)} outputs differ from eager PyTorch:", *(f"  {item}" for item in bad), hint])
        )


def run_entry(entry: Entry, inputs: Sequence[torch.Tensor], values: Mapping[str, int]) -> list[torch.Tensor]:
    """The flat tensor outputs of an entry point."""
    arrays = []
    for port in entry.plan.outputs:
        shape = [evaluate(extent, values) for extent in port.shape]
        arrays.append(torch.empty(shape, dtype=getattr(torch, port.dtype)))
    entry(*inputs, out=[_array(tensor) for tensor in arrays])
    return arrays


@dataclass(frozen=True)
class KernelError:
    """How far one kernel's result is from the region run in eager PyTorch on the same operands as the graph had."""

    step: int
    kernel: str
    node: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def verify_kernels(entry: Entry, lowered: Program, precision: str = "auto") -> list[KernelError]:
    """Compare what every kernel wrote with the value of its node in eager PyTorch, on the sample.

    Args:
        entry: of the loaded artifact.
        lowered: the program after all passes, whose regions are the artifact's steps.
        precision: what it computes in; a coarser one than the model's sets the tolerance.
    """
    expected, updates = _node_values(lowered, node_tolerances(lowered, precision))
    plan = entry.plan
    found: list[KernelError] = []

    def compare(step: int, variant: int, read: Any) -> None:
        launched = plan.steps[step].variants[variant]
        for position in plan.steps[step].writes:
            ref = launched.operands[position]
            name = _written_name(plan, ref)
            waiting = updates.get(ref.index) if ref.kind == "state" else None
            if waiting or name in expected:
                got = _tensor(read(ref))
                name, want, limit = waiting.pop(0) if waiting else (name, *expected[name])
                error = error_of(want, got.reshape(want.shape) if got.numel() == want.numel() else got)
                tolerance = max(tolerance_of(want.dtype), limit if want.is_floating_point() else 0.0)
                found.append(KernelError(step, plan.steps[step].name, name, error, tolerance))

    entry.trace(compare, *lowered.sample)
    return found


def first_divergence(
    entry: Entry, lowered: Program, reference: Program, sizes: Mapping[str, int], precision: str = "auto"
) -> str:
    """Where outputs that are wrong at some sizes first go wrong, in words: a kernel, or the passes before all kernels.

    Args:
        entry: of the loaded artifact.
        lowered: the program after all passes, whose regions are the artifact's steps.
        reference: the program before any pass.
        sizes: an assignment of the symbols at which an output is beyond its tolerance.
        precision: what it computes in.
    """
    program = replace(lowered, sample=make_inputs(reference, sizes))
    kernel = next((error for error in verify_kernels(entry, program, precision) if not error.ok), None)
    if kernel is not None:
        origin = entry.plan.steps[kernel.step].origin
        where = " ".join(
            part for part in (origin.module and f"in {origin.module}", origin.source and f"at {origin.source}") if part
        )
        return (
            f"The first kernel that diverges is {kernel.kernel} (step {kernel.step}, node {kernel.node}"
            f"{', ' + where if where else ''}): error {kernel.error:.2e}, tolerance {kernel.tolerance:.0e}. "
            "Compile with --verify off to get the artifact and look at it with tilewright verify --kernels."
        )
    limits = tolerances_of(reference, precision)
    errors = compare_outputs(reference.run(program.sample), lowered.run(program.sample))
    if any(not error <= limit for error, limit in zip(errors, limits, strict=True)):
        return "A pass changed the model: compile with --verify passes to find it."
    return "No kernel and no pass diverges by itself: the errors of several add up beyond the tolerance."


def _written_name(plan: Plan, ref: Ref) -> str:
    return plan.buffers[ref.index].name if ref.kind == "buffer" else f"{ref.kind}:{ref.index}"


def _node_values(
    program: Program, limits: Mapping[fx.Node, float]
) -> tuple[dict[str, tuple[torch.Tensor, float]], dict[int, list[tuple[str, torch.Tensor, float]]]]:
    """Values of all region results and their limits by node name; those that are outputs also as ``output:i``.

    Beside them those of regions that work in place, by the number of the state that they update, in order.
    """
    values: dict[str, tuple[torch.Tensor, float]] = {}
    updates: dict[int, list[tuple[str, torch.Tensor, float]]] = {}
    numbers = {state.placeholder: number for number, state in enumerate(program.states)}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            source = node.args[0] if node.target is operator.getitem else node
            if isinstance(result, torch.Tensor) and isinstance(source, fx.Node) and is_region(source, "kernel"):
                values[node.name] = (result, limits[node])
                number = numbers.get(_updated(node).name)
                if number is not None:
                    updates.setdefault(number, []).append((node.name, result, limits[node]))
            return result

    with torch.no_grad():
        outputs = Recorder(program.module).run(*program.sample, *(state.initial.clone() for state in program.states))
    states = {state.output for state in program.states}
    (nodes,) = program.graph.output_node().args
    pairs = zip(outputs, nodes, strict=True)  # type: ignore[arg-type]
    results = [(value, node) for i, (value, node) in enumerate(pairs) if i not in states]
    tensors = [(value, limits[node]) for value, node in results if isinstance(value, torch.Tensor)]  # type: ignore[index]
    values |= {f"output:{i}": value for i, value in enumerate(tensors)}
    return values, updates


def _updated(node: fx.Node) -> fx.Node:
    """The value in whose memory a region works, through all regions that do so; the node itself if it has its own."""
    while is_region(node, "kernel") and node.meta["region"].updates is not None:
        operand = node.args[node.meta["region"].updates]
        assert isinstance(operand, fx.Node)
        node = operand
    return node


def _tensor(array: Any) -> torch.Tensor:
    """A copy of an array, which may be of bfloat16 as ml_dtypes has it."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _array(tensor: torch.Tensor) -> Any:
    """The numpy array over a tensor's memory, with bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

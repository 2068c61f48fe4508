"""Comparing an artifact with eager PyTorch.

First PyTorch: what the outputs are to be at several sizes (:func:`expect`), while the model's weights are in memory.
Then, when they may have gone, the artifact (:func:`verify_outputs`).

Quantized weights change the numbers on purpose, so there are two questions. Whether the passes before that left the
model as it was is seen with the weights as they were. What comes after is compared with a model that has what
quantization left of its weights in their place. Where activations are rounded on the fly, too, a last digit decides a
rounding, that decides others, and outputs say little about kernels: there every kernel is compared on the operands that
it read (``kernel_verification.py``), and the passes with activations as they come (``float_activations.py``). There a
large model's weights take the time, so all sizes are run at once (``together.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch

from ..passes.base import Report
from ..passes.graph.float_activations import rounds_activations
from ..passes.graph.program import Program
from ..passes.graph.together import run_together
from ..passes.verify import error_of, tolerances_of
from ..passes.widen_floats import WidenFloats
from ..runtime.artifact import read_artifact
from ..runtime.entry import Entry
from ..runtime.errors import NumericsError
from ..runtime.plan import Ref
from ..runtime.sizes import evaluate
from .copies import late_constants, reference_of
from .kernel_verification import KernelError, array_of, follow, tensor_of
from .quantization import Watch, deviation, names_of_outputs
from .samples import assignments, make_inputs, sample_sizes


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


def why_not_here(path: Path, device: str) -> str:
    """Why an artifact's code for a kind of device cannot be run on this machine; empty where it can."""
    if device == "cpu":
        return ""  # loading says what the processor lacks
    from ..runtime.cuda.probe import why_not

    return why_not(read_artifact(path))


@dataclass(frozen=True)
class Case:
    """A call: sizes, inputs, and what its outputs are to be with the largest error of each; None where kernels tell."""

    sizes: Mapping[str, int]
    inputs: Sequence[torch.Tensor]
    outputs: Sequence[tuple[torch.Tensor, float]] | None


@dataclass(frozen=True)
class Expected:
    """What an entry point is to compute.

    Attributes:
        lowered: the program after all passes, its quantized weights settled.
        device: the kind of device that it is for.
        precision: what it computes in.
        cases: the calls to make.
        passes: how far the passes moved the outputs, where that can be told apart from the kernels.
        deviation: how far quantization moves each output on the sample, by name.
    """

    lowered: Program
    device: str
    precision: str
    cases: list[Case]
    passes: list[OutputError]
    deviation: dict[str, float] = field(default_factory=dict)


def expect(
    reference: Program, lowered: Program, device: str = "cpu", precision: str = "auto",
    annotated: Program | None = None, watch: Watch | None = None, runs: bool = True,
    give_back: Callable[[], None] = lambda: None,
) -> Expected:  # fmt: skip
    """Run eager PyTorch at several sizes.

    Args:
        reference: the program as captured, before any pass (:func:`reference_of`).
        lowered: the program after all passes.
        device: the kind of device that the entry point's plan is for.
        precision: what it computes in (``precision.py``); a coarser one than the model's sets the tolerance.
        annotated: where weights are quantized, the program right before they are.
        watch: has their rows.
        runs: whether the artifact can be run here; else what can be said of it are the passes.
        give_back: called when weights that were read are not needed for a while.
    """
    # Where passes make float32 of half precision, they and the kernels are to be as exact as that.
    wide = device == "cpu" if precision == "auto" else precision == "fp32"
    model = late_constants(_widened(reference) if wide else reference)
    if annotated is None or watch is None:
        found = Expected(late_constants(lowered), device, precision, [], [])
        for sizes, inputs, results in _runs(model, reference):
            found.cases.append(Case(sizes, inputs, _limited(results, model, precision)))
            if not runs:
                got = found.lowered.run(inputs)
                found.passes.extend(_errors(found, sizes, results, got, tolerances_of(model, precision)))
        return found
    before = late_constants(annotated)
    target = late_constants(watch.dequantized(reference_of(annotated)))
    settled = late_constants(watch.settled(reference_of(lowered)))
    by_kernel = rounds_activations(lowered)
    found = Expected(settled, device, precision, [], [], {})
    sample = sample_sizes(reference)
    cases = [(sizes, make_inputs(reference, sizes)) for sizes in assignments(reference)]
    sets = [given for _, given in cases]
    # Each program's weights are other ones: those before it may go, and it reads its own once for all cases.
    every = run_together(model, sets)
    for (sizes, _), one, got in zip(cases, every, run_together(before, sets), strict=True):
        _warn_of_nothing(reference, one)
        found.passes.extend(_errors(found, sizes, one, got, tolerances_of(model)))
    give_back()
    wanted, limits = run_together(target, sets), tolerances_of(target, precision)
    give_back()
    for (sizes, given), want in zip(cases, wanted, strict=True):
        found.cases.append(Case(sizes, given, None if by_kernel else _limited(want, target, precision)))
    if by_kernel or not runs:
        for (sizes, _), want, got in zip(cases, wanted, run_together(settled, sets, in_float=True), strict=True):
            found.passes.extend(_errors(found, sizes, want, got, limits))
        give_back()
    for (sizes, given), one in zip(cases, every, strict=True):
        if sizes == sample:
            found.deviation.update(deviation(reference, one, settled.run(given)))
    give_back()
    return found


def _runs(model: Program, reference: Program) -> Iterable[tuple[Mapping[str, int], tuple[torch.Tensor, ...], Any]]:
    for sizes in assignments(reference):
        inputs = make_inputs(reference, sizes)
        results = model.run(inputs)
        _warn_of_nothing(reference, results)
        yield sizes, inputs, results


def _warn_of_nothing(reference: Program, results: Sequence[Any]) -> None:
    """Tell of outputs without a single finite number: whatever equals them proves nothing."""
    for name, value in zip(names_of_outputs(reference), results, strict=False):
        if isinstance(value, torch.Tensor) and value.numel() and not bool(value.isfinite().any()):
            warnings.warn(
                f"{reference.name}: {name} has no finite number in PyTorch, so comparing it says nothing; "
                f"look at the model's weights and its sample inputs",
                stacklevel=1,
            )


def _limited(results: Sequence[Any], program: Program, precision: str) -> list[tuple[torch.Tensor, float]]:
    """The tensors among the flat outputs of a program, with their limits."""
    pairs = zip(results, tolerances_of(program, precision), strict=True)
    return [(value, limit) for value, limit in pairs if isinstance(value, torch.Tensor)]


def _errors(
    found: Expected, sizes: Mapping[str, int], want: Sequence[Any], got: Sequence[Any], limits: Sequence[float]
) -> list[OutputError]:
    """The errors of the results among the flat outputs of a program; states come behind them and have no names."""
    names = names_of_outputs(found.lowered)
    items = [item for item in zip(want, got, limits, strict=True) if isinstance(item[0], torch.Tensor)]
    return [
        OutputError(found.lowered.name, name, sizes, error_of(wanted, value), limit, found.device)
        for name, (wanted, value, limit) in zip(names, items, strict=False)
        if limit < inf
    ]


def verify_outputs(
    entry: Entry, expected: Expected, between: Callable[[], None] | None = None
) -> tuple[list[OutputError], list[KernelError]]:
    """Run an entry point at the sizes that were expected.

    Args:
        entry: of the loaded artifact.
        expected: what :func:`expect` gave for it.
        between: called after every step; then the artifact is run step by step.

    Returns:
        One error per output and assignment of the symbols, those of the passes among them; none where the model returns
        no tensor. Integers that follow from half-precision numbers are not compared: a unit in the last place decides
        them. And the errors of all kernels at the first sizes where one is off, where they are compared one by one.

    Raises:
        NumericsError: kernels are to be compared one by one, and there is none for a part of the graph.
    """
    found = list(expected.passes)
    by_kernel = [case.inputs for case in expected.cases if case.outputs is None]
    every = iter(follow(entry, expected.lowered, by_kernel, expected.precision) if by_kernel else [])
    for case in expected.cases:
        got = run_entry(entry, case.inputs, case.sizes, between)
        outputs, worst = case.outputs, None
        if outputs is None:
            followed = next(every)
            if followed.missing:
                raise NumericsError(
                    f"entry {entry.name}: no kernel writes {', '.join(followed.missing)} of the graph, so nothing is "
                    "known of it: the artifact was compiled from another model, or this is an error of the compiler"
                )
            if not all(kernel.ok for kernel in followed.kernels):
                return found, followed.kernels
            worst = max(followed.kernels, key=lambda kernel: kernel.error, default=None)
            outputs = [(value, 0.0) for value in followed.outputs]  # the same kernels have written both
        for port, (want, limit), value in zip(entry.plan.outputs, outputs, got, strict=False):
            error = error_of(want, value)
            if worst is not None and error <= limit and worst.error > error:
                error, limit = worst.error, worst.tolerance
            if limit < inf:
                found.append(OutputError(entry.name, port.name, case.sizes, error, limit, expected.device))
    return found, []


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


A_PASS = "A pass changed the model: compile with --verify passes to find it."


def require_right(entry: Entry, expected: Expected, between: Callable[[], None] | None = None) -> list[OutputError]:
    """What :func:`verify_outputs` finds, if all of it is within tolerance.

    Raises:
        NumericsError: says what goes wrong first: a kernel, the passes before all kernels, or several together.
    """
    found, kernels = verify_outputs(entry, expected, between)
    kernels = [kernel for kernel in kernels if not kernel.ok]
    if kernels:
        differ = "1 kernel result differs" if len(kernels) == 1 else f"{len(kernels)} kernel results differ"
        raise NumericsError(
            f"{differ} from eager PyTorch on the operands that the kernel read.\n{_named(entry, kernels[0])}"
        )
    wrong = next((error for error in found if not error.ok), None)
    require_equal(found, "" if wrong is None else first_divergence(entry, expected, wrong.sizes))
    return found


def first_divergence(entry: Entry, expected: Expected, sizes: Mapping[str, int]) -> str:
    """Where outputs that are wrong at some sizes first go wrong, in words: a kernel, or the passes before all kernels.

    Args:
        entry: of the loaded artifact.
        expected: what :func:`expect` gave for it.
        sizes: an assignment of the symbols at which an output is beyond its tolerance.
    """
    case = next(case for case in expected.cases if case.sizes == sizes)
    (followed,) = follow(entry, expected.lowered, [case.inputs], expected.precision)
    kernels = followed.kernels
    kernel = next((error for error in kernels if not error.ok), None)
    if kernel is not None:
        return _named(entry, kernel)
    got = [value for value in expected.lowered.run(tuple(case.inputs)) if isinstance(value, torch.Tensor)]
    pairs = zip(case.outputs or (), got, strict=False)
    if any(not error_of(want, value) <= limit for (want, limit), value in pairs):
        return A_PASS
    return "No kernel and no pass diverges by itself: the errors of several add up beyond the tolerance."


def _named(entry: Entry, kernel: KernelError) -> str:
    origin = entry.plan.steps[kernel.step].origin
    where = " ".join(
        part for part in (origin.module and f"in {origin.module}", origin.source and f"at {origin.source}") if part
    )
    return (
        f"The first kernel that diverges is {kernel.kernel} (step {kernel.step}, node {kernel.node}"
        f"{', ' + where if where else ''}): error {kernel.error:.2e}, tolerance {kernel.tolerance:.0e}. "
        "Compile with --verify off to get the artifact and look at it with tilewright verify --kernels."
    )


def run_entry(
    entry: Entry, inputs: Sequence[torch.Tensor], values: Mapping[str, int], between: Callable[[], None] | None = None
) -> list[torch.Tensor]:
    """The flat tensor outputs of an entry point; ``between``: called after every step of it."""
    if between is not None and entry.plan.steps:
        return _step_by_step(entry, inputs, between)
    arrays = []
    for port in entry.plan.outputs:
        shape = [evaluate(extent, values) for extent in port.shape]
        arrays.append(torch.empty(shape, dtype=getattr(torch, port.dtype)))
    entry(*inputs, out=[array_of(tensor) for tensor in arrays])
    return arrays


def _step_by_step(entry: Entry, inputs: Sequence[torch.Tensor], between: Callable[[], None]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def after(step: int, variant: int, read: Any) -> None:
        if step == len(entry.plan.steps) - 1:
            found.extend(tensor_of(read(Ref("output", number))) for number in range(len(entry.plan.outputs)))
        between()

    entry.trace(after, *inputs)
    return found

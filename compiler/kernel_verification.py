"""Comparing every kernel of an artifact with its part of the graph, on the operands that the kernel really read.

The artifact is run step by step, and what every kernel wrote is kept. Then the program of regions is interpreted in
eager PyTorch, for all calls at once (``together.py``), and the result of every region is replaced by what its kernel
wrote, so that the regions after it start from that. No error is carried from one comparison to the next: each is held
to the tolerance of what its own kernel computes, however deep the model is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..passes.graph.program import Program
from ..passes.graph.regions import body, is_region
from ..passes.graph.together import run_together
from ..passes.verify import STORED, TOLERANCES, error_of, own_tolerance
from ..runtime.entry import Entry
from ..runtime.plan import Plan, Ref
from .copies import late_constants
from .roundings import follow_roundings, rounded_linear


@dataclass(frozen=True)
class KernelError:
    """How far one kernel's result is from its region run in eager PyTorch on the operands that the kernel read."""

    step: int
    kernel: str
    node: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Followed:
    """One call of an artifact, followed kernel by kernel.

    Attributes:
        kernels: one error per result of a kernel, in order of the steps.
        outputs: the flat tensor outputs that follow from what the kernels wrote.
        missing: names of results that no step wrote: none, or plan and program do not belong together.
    """

    kernels: list[KernelError]
    outputs: list[torch.Tensor]
    missing: list[str]


def verify_kernels(entry: Entry, lowered: Program, precision: str = "auto") -> list[KernelError]:
    """Compare what every kernel wrote with its region, on the sample.

    Args:
        entry: of the loaded artifact.
        lowered: the program after all passes, whose regions are the artifact's steps.
        precision: what it computes in; a coarser one than the model's sets the tolerance.
    """
    return follow(entry, lowered, [lowered.sample], precision)[0].kernels


def follow(
    entry: Entry, lowered: Program, calls: Sequence[Sequence[torch.Tensor]], precision: str = "auto"
) -> list[Followed]:
    """Run an entry point and compare what every kernel wrote.

    Args:
        entry: of the loaded artifact.
        lowered: the program after all passes, whose regions are the artifact's steps.
        calls: the inputs of every call.
        precision: what it computes in.
    """
    followers = [_Follower(lowered, _Written(entry.plan), precision) for _ in calls]
    for follower, inputs in zip(followers, calls, strict=True):
        entry.trace(follower.written.note, *inputs)

    def kernel(node: fx.Node, operands: Sequence[Sequence[Any]], results: list[Any]) -> list[Any]:
        return [one.kernel(node, *each) for one, *each in zip(followers, operands, results, strict=True)]

    results = run_together(late_constants(lowered), calls, kernel=kernel)
    return [follower.followed(flat) for follower, flat in zip(followers, results, strict=True)]


class _Written:
    """What the steps of one call wrote, by the name of the place, until it is taken."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._values: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def note(self, step: int, variant: int, read: Any) -> None:
        """The callback of :meth:`Entry.trace`."""
        launched = self.plan.steps[step].variants[variant]
        for position in self.plan.steps[step].writes:
            ref = launched.operands[position]
            values = self._values.setdefault(_place(self.plan, ref), [])
            if ref.kind != "state":  # what is updated in place several times has several values, others the last one
                values.clear()
            values.append((step, tensor_of(read(ref))))

    def take(self, name: str) -> tuple[int, torch.Tensor] | None:
        """The step that wrote to a place, and what; None if none did. The next value if there are several."""
        values = self._values.get(name)
        return values.pop(0) if values else None


class _Follower:
    """Compares what kernels wrote with their regions, each run on what the kernels before it wrote; of one call."""

    def __init__(self, program: Program, written: _Written, precision: str) -> None:
        self.written = written
        self._errors: list[KernelError] = []
        self._missing: list[str] = []
        self._precision = precision
        self._state_outputs = {state.output for state in program.states}
        self._states = {state.placeholder: number for number, state in enumerate(program.states)}
        self._outputs = _output_places(program)

    def kernel(self, node: fx.Node, operands: Sequence[Any], result: Any) -> Any:
        """What the kernel of a region wrote, in place of the region's result on the operands that the kernel read."""
        wanted = list(result) if isinstance(result, tuple | list) else [result]
        found = [self._take(name) for name in self._places(node, len(wanted))]
        limit = own_tolerance(node, self._precision)
        got = [want if item is None else _shaped(item[1], want) for item, want in zip(found, wanted, strict=True)]
        if rounded_linear(body(node)) is not None and any(
            not error_of(*pair) <= limit for pair in zip(wanted, got, strict=True)
        ):
            wanted = follow_roundings(body(node), operands, wanted, got, limit)
        for item, name, want, value in zip(found, _names(node, len(wanted)), wanted, got, strict=True):
            if item is None:
                self._missing.append(name)
            else:
                kernel = self.written.plan.steps[item[0]].name
                allowed = _allowed(want.dtype, limit)
                self._errors.append(KernelError(item[0], kernel, name, error_of(want, value), allowed))
        return tuple(got) if isinstance(result, tuple | list) else got[0]

    def followed(self, results: Sequence[Any]) -> Followed:
        """What was found, given the flat outputs of the program."""
        outputs = [
            value
            for at, value in enumerate(results)
            if at not in self._state_outputs and isinstance(value, torch.Tensor)
        ]
        return Followed(sorted(self._errors, key=lambda error: error.step), outputs, self._missing)

    def _take(self, places: Sequence[str]) -> tuple[int, torch.Tensor] | None:
        return next((item for item in map(self.written.take, places) if item is not None), None)

    def _places(self, node: fx.Node, count: int) -> list[tuple[str, ...]]:
        """For each result of a kernel the places where it may have been written, in order."""
        number = self._states.get(_updated(node).name)
        if number is not None and _updated(node) is not node:
            return [(f"state:{number}",)]
        return [(name, *self._outputs.get(name, ())) for name in _names(node, count)]


def _names(node: fx.Node, count: int) -> list[str]:
    """The names that lowering gives to the results of a region."""
    if not isinstance(node.meta["val"], tuple | list):
        return [node.name]
    users = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
    return [users.get(position, f"{node.name}_{position}") for position in range(count)]


def _output_places(program: Program) -> Mapping[str, tuple[str]]:
    """Node names -> the place of the first output that a node is."""
    states = {state.output for state in program.states}
    (returned,) = program.graph.output_node().args
    leaves = [item for at, item in enumerate(returned) if at not in states and isinstance(item, fx.Node)]  # type: ignore[arg-type]
    tensors = [leaf for leaf in leaves if isinstance(leaf.meta["val"], torch.Tensor)]
    found: dict[str, tuple[str]] = {}
    for number, leaf in enumerate(tensors):
        found.setdefault(leaf.name, (f"output:{number}",))
    return found


def _updated(node: fx.Node) -> fx.Node:
    """The value in whose memory a region works, through all regions that do so; the node itself if it has its own."""
    while is_region(node, "kernel") and node.meta["region"].updates is not None:
        operand = node.args[node.meta["region"].updates]
        assert isinstance(operand, fx.Node)
        node = operand
    return node


def _allowed(dtype: torch.dtype, limit: float) -> float:
    """The largest error of a kernel's result, given that of what it computes."""
    if not dtype.is_floating_point:
        return 0.0
    if limit == STORED:  # computed in a wider type: a rounding that falls the other way is a unit in the last place
        return TOLERANCES[torch.float32] + torch.finfo(dtype).eps
    return max(TOLERANCES.get(dtype, 0.0), limit)


def _place(plan: Plan, ref: Ref) -> str:
    return plan.buffers[ref.index].name if ref.kind == "buffer" else f"{ref.kind}:{ref.index}"


def _shaped(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    return got.reshape(want.shape) if got.numel() == want.numel() else got


def tensor_of(array: Any) -> torch.Tensor:
    """A copy of an array, which may be of bfloat16 as ml_dtypes has it."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array_of(tensor: torch.Tensor) -> Any:
    """The numpy array over a tensor's memory, with bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

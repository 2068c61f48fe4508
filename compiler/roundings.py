"""Products with activations that are rounded on the fly: telling a rounding that fell the other way from an error.

A kernel that computes its activations while it reads them (a gate times what it lets through) may differ from eager
PyTorch in their last digits. Where such a number lies halfway between two codes, kernel and PyTorch may round it to
different ones, and both are right. The result then moves by exactly one step of the row's scale times one column of the
weight: one number of freedom for all results of a row. So what is looked for is a set of such roundings that explains
what the kernel wrote; what is left after them is the kernel's error, and is held to the same tolerance as ever. A wrong
scale, code, zero point or bias moves single results, which no rounding does.

Activations that come from memory leave no such freedom: kernels round them exactly as the operator says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..codegen.quantized import format_of
from ..passes.graph.match import aten
from ..passes.graph.quantized_ops import QUANTIZED_LINEAR, SMALLEST_ROW
from ..passes.graph.query import arguments, calls
from ..passes.verify import TOLERANCES, error_of

# How far from the middle between two codes a number may lie, in steps, to be rounded to either: what is computed in
# float32 may be off by the table's tolerance of the largest number of the row, which is 127 steps.
_MARGIN = 127 * TOLERANCES[torch.float32]
_SWEEPS = 3
# What gives the same numbers as its operand, in other places or another type.
_MOVES = frozenset(
    [
        aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor,
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.expand.default,
        aten.flatten.using_ints, aten.clone.default,
    ]
)  # fmt: skip


def rounded_linear(module: fx.GraphModule) -> fx.Node | None:
    """The product of a region whose activations are rounded on the fly; None if it has none."""
    found = [node for node in calls(module.graph, (QUANTIZED_LINEAR,)) if arguments(node)["activations"] >= 0]
    return found[0] if found else None


def follow_roundings(
    module: fx.GraphModule, operands: Sequence[Any], wanted: Sequence[Any], got: Sequence[torch.Tensor], limit: float
) -> list[Any]:
    """The results of a region with those roundings turned that explain what its kernel wrote.

    Args:
        module: the region's, with a :func:`rounded_linear`.
        operands: what the kernel read.
        wanted: the region's results, as rounded by eager PyTorch.
        got: what the kernel wrote.
        limit: the error at which nothing more is to be explained.

    Returns:
        ``wanted``, or what it is with some roundings the other way. Only numbers within a margin of the middle between
        two codes turn, only those that the kernel computes itself, and only where the squared error of the row's
        results gets smaller.
    """
    node = rounded_linear(module)
    assert node is not None, "a region with rounded activations"
    if _read_as_they_lie(arguments(node)["x"]):
        return list(wanted)
    region = _Region(module, node, operands)
    if any(value.dim() < 1 or value.shape[:-1].numel() != region.rows for value in got):
        return list(wanted)  # results that are not rows of the product's: there is no telling which row moved
    return region.explain(list(wanted), got, limit)


def _read_as_they_lie(x: fx.Node) -> bool:
    """Whether activations are an operand of the region, read in whatever order."""
    while x.op == "call_function" and x.target in _MOVES:
        x = x.all_input_nodes[0]
    return x.op == "placeholder"


class _Region:
    """A region split at its product: what comes before has been computed, what comes after can be for any product."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, operands: Sequence[Any]) -> None:
        self._module, self._node, self._operands = module, node, operands
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        interpreter.run(*operands)
        after = _after(node)
        self._before = {one: value for one, value in interpreter.env.items() if one not in after}
        self._product: torch.Tensor = interpreter.env[node]
        given = {name: interpreter.env[value] if isinstance(value, fx.Node) else value
                 for name, value in arguments(node).items()}  # fmt: skip
        self.rows = self._product.shape[:-1].numel()
        self._form = format_of(given)
        self._weight: torch.Tensor = given["weight"]
        self._x = given["x"].float().reshape(self.rows, -1)
        self._group = given["activations"] or max(1, self._form.columns)

    def results(self, product: torch.Tensor) -> list[torch.Tensor]:
        """The region's results where its product is this (``[rows, N]``)."""
        env = self._before | {self._node: product.reshape(self._product.shape).to(self._product.dtype)}
        found = fx.Interpreter(self._module, garbage_collect_values=False).run(*self._operands, initial_env=env)
        return list(found) if isinstance(found, tuple | list) else [found]

    def explain(self, wanted: list[Any], got: Sequence[torch.Tensor], limit: float) -> list[Any]:
        """Turn roundings one after another, in all rows at once, those nearest to the middle first."""
        columns, steps = self._halfway()
        if not columns.shape[1]:
            return wanted
        numbers, places = columns.unique(return_inverse=True)
        weight = torch.cat([self._form.values(part)[:, numbers] for part in self._weight.split(1 << 10)]).t()
        product = self._product.float().reshape(self.rows, -1)
        turned = torch.zeros(columns.shape, dtype=torch.bool)
        best = _row_errors(wanted, got)
        for _ in range(_SWEEPS):
            before = turned.clone()
            for place in range(columns.shape[1]):
                if _explained(wanted, got, limit):
                    return wanted
                sign = torch.where(turned[:, place], -1.0, 1.0)
                moved = product + (sign * steps[:, place]).unsqueeze(1) * weight[places[:, place]]
                trial = self.results(moved)
                errors = _row_errors(trial, got)
                better = errors < best
                best = torch.where(better, errors, best)
                turned[better, place] = ~turned[better, place]
                product = torch.where(better.unsqueeze(1), moved, product)
                wanted = [_by_row(torch.where, better, new, old) for new, old in zip(trial, wanted, strict=True)]
            if torch.equal(before, turned):
                break
        return wanted

    def _halfway(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which columns of each row may be rounded either way, nearest to the middle first, and what that adds to them.

        Rows with fewer of them than others are filled up with columns that move by nothing.
        """
        groups = -(-self._form.columns // self._group)
        parts = torch.nn.functional.pad(self._x, (0, groups * self._group - self._form.columns))
        parts = parts.unflatten(-1, (groups, self._group))
        largest = parts.abs().amax(-1, keepdim=True)
        codes = torch.where(largest > SMALLEST_ROW, parts * (torch.full_like(largest, 127.0) / largest), 0.0)
        off = codes - codes.round()
        size = torch.where(off.abs() >= 0.5 - _MARGIN, off.sign() * largest / 127.0, 0.0).flatten(1)
        distance = torch.where(size != 0, 0.5 - off.abs().flatten(1), torch.inf)
        most = int((size != 0).sum(1).max()) if size.numel() else 0
        columns = distance.topk(most, dim=1, largest=False).indices
        steps = size.gather(1, columns)
        return columns.clamp(max=max(0, self._form.columns - 1)), steps


def _after(node: fx.Node) -> set[fx.Node]:
    """A node and everything that is computed from it."""
    found = {node}
    for one in node.graph.nodes:
        if any(operand in found for operand in one.all_input_nodes):
            found.add(one)
    return found


def _row_errors(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared error of every row over all results, each relative to its result's largest number; NaN is large."""
    total = torch.zeros(wanted[0].shape[:-1].numel(), dtype=torch.float64)
    for want, value in zip(wanted, got, strict=True):
        if want.shape == value.shape and want.is_floating_point():
            rows = (want.double() - value.double()).reshape(len(total), -1).square().sum(1)
            total += rows / max(float(want.double().square().max()), 1e-300)
    return total.nan_to_num(nan=torch.inf)


def _explained(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor], limit: float) -> bool:
    return all(error_of(want, value) <= limit for want, value in zip(wanted, got, strict=True))


def _by_row(
    choose: Callable[..., torch.Tensor], rows: torch.Tensor, new: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    return choose(rows.reshape(*new.shape[:-1], 1), new, old)

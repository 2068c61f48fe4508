"""Making the operator's mask from what written-out attention adds to its scores and hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .attention import Scores
from .edit import insert, tensor_shape
from .index_rules import value_at
from .index_values import CAUSAL, Choice, Test, Value
from .masks import always_finite, is_causal, negligible, shows_each_row_something, shows_everything
from .match import aten, dtype_of, is_op, position_after

NOT = (aten.logical_not.default, aten.bitwise_not.default)


class Refusal(Exception):
    """Why written-out attention stays as it is."""


@dataclass(frozen=True)
class Mask:
    """What the operator gets, and which rows are to become nan after it (a boolean ``[..., rows, 1]``)."""

    node: fx.Node | None = None
    causal: bool = False
    hidden_rows: fx.Node | None = None


class MaskBuilder:
    """Makes masks for all layers of a graph, each different one once, as early as its operands allow."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Value | None] = {}
        self._made: dict[Any, fx.Node] = {}

    def build(self, scores: Scores, safe: bool) -> Mask:
        """The mask of some scores.

        Args:
            scores: the scores with their biases and covers.
            safe: whether the graph puts zeros where a row sees nothing.

        Raises:
            Refusal: the operator would give something else.
        """
        dtype = dtype_of(scores.product)
        biases = [(bias, factor) for bias, factor in scores.biases if not shows_everything(self.value(bias))]
        covers = [cover for cover in scores.covers if self._shown(cover) != Test()]
        for _, _, fill in covers:
            if not negligible(fill, dtype):
                raise Refusal(f"positions are hidden with {fill:g}, which is not low enough to leave them no weight")
        causal = [factor > 0 and is_causal(self.value(bias), dtype) for bias, factor in biases]
        causal += [self._shown(cover) == CAUSAL for cover in covers]
        if all(causal):
            return Mask(causal=bool(causal))
        proven = shows_each_row_something(self._all_shown(covers, biases), scores.shape)
        visible = self._visible(covers)
        infinite = [fill == -math.inf for _, _, fill in covers]
        if not biases and visible is not None and (proven or all(infinite)):
            if safe or proven:
                return Mask(visible)
            nothing = self._make(NOT[0], self._make(aten.any.dim, visible, -1, True))
            return Mask(visible, hidden_rows=nothing)
        added = self._added(biases, dtype)
        if visible is not None:
            if not all(infinite) and (any(infinite) or dtype == torch.float16) and not proven:
                raise Refusal("a row that sees nothing would become another one")
            if added is None:
                added = self._make(aten.full.default, [], 0.0, dtype=dtype, near=visible)
            lowest = -math.inf if all(infinite) else torch.finfo(dtype_of(added)).min
            added = self._make(aten.where.ScalarOther, visible, added, lowest)
        assert added is not None
        if safe or proven or always_finite(added):
            return Mask(added)
        largest = self._make(aten.amax.default, added, [-1], True)
        return Mask(added, hidden_rows=self._make(aten.eq.Scalar, largest, -math.inf))

    def value(self, node: fx.Node) -> Value | None:
        """What is known about a node by its indices."""
        return value_at(node, self.known)

    def _shown(self, cover: tuple[fx.Node, bool, float]) -> Test | None:
        """Where a cover keeps the scores."""
        value = self.value(cover[0])
        if not isinstance(value, Test):
            return None
        return value if cover[1] else value.inverse()

    def _all_shown(self, covers: Sequence[Any], biases: Sequence[tuple[fx.Node, float]]) -> Test | None:
        """Where no cover and no bias hides, if that is known."""
        tests = [self._shown(cover) for cover in covers]
        for bias, factor in biases:
            value = self.value(bias)
            if isinstance(value, Choice) and factor > 0 and math.isfinite(value.yes):
                tests.append(value.test)
            elif not always_finite(bias):
                return None
        shown: Test | None = Test()
        for test in tests:
            shown = None if shown is None or test is None else shown.both(test)
        return shown

    def _visible(self, covers: Sequence[tuple[fx.Node, bool, float]]) -> fx.Node | None:
        """The boolean mask that is true where every cover keeps the scores."""
        visible = None
        for condition, kept_if, _ in covers:
            if dtype_of(condition) != torch.bool:
                raise Refusal(f"{condition.name} hides positions but is not boolean")
            shown = condition
            if not kept_if:
                inner: Any = condition.args[0] if is_op(condition, *NOT) else None
                known = inner is not None and dtype_of(inner) == torch.bool
                shown = inner if known else self._make(NOT[0], condition)
            visible = shown if visible is None else self._make(aten.logical_and.default, visible, shown)
        return visible

    def _added(self, biases: Sequence[tuple[fx.Node, float]], dtype: torch.dtype) -> fx.Node | None:
        """The sum of all that is added to the scores, in their dtype or in fp32."""
        total = None
        for bias, factor in biases:
            kept = (dtype,) if dtype == torch.float64 else (dtype, torch.float32)
            if dtype_of(bias) not in kept:
                bias = self._make(aten._to_copy.default, bias, dtype=dtype)
            if factor != 1.0:
                bias = self._make(aten.mul.Tensor, bias, factor)
            total = bias if total is None else self._make(aten.add.Tensor, total, bias)
        return total

    def _make(self, target: Any, *args: Any, near: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A node as early as its operands allow; the same one for the same operands."""
        key = (target, str(args), str(sorted(kwargs.items())))
        if key not in self._made or self._made[key]._erased:
            operands = [arg for arg in (*args, near) if isinstance(arg, fx.Node)]
            before = position_after(operands)
            self._made[key] = insert(before.graph, before, target, args, kwargs, origins=operands[:1])
        return self._made[key]


def lifted(node: fx.Node, rank: int, before: fx.Node) -> fx.Node:
    """A mask over one batch axis as one over two, where the operands have fewer axes than the operator takes."""
    if rank == 3 and len(tensor_shape(node)) == 3:
        return insert(before.graph, before, aten.unsqueeze.default, (node, 1), origins=(node,))
    return node

"""Canonical form of Einstein sums: the rule that ``canonicalize`` applies to them.

Before:  einsum("bqhd,bkhd->bhqk", q, k)
After:   matmul(permute(q, [0, 2, 1, 3]), permute(k, [0, 2, 3, 1]))

Operands are taken two at a time from the left. The labels of a pair are of four kinds: in both and in the result
(batch), in both and summed (contracted), and those of the left or the right operand alone. The left operand is ordered
batch, left, contracted; the right one batch, contracted, right; each kind is merged to one axis where it has several.
"""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass
from typing import Any

from torch import fx

from .graph.edit import insert, same_size, tensor_shape
from .graph.query import arguments, aten, size_at

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Term:
    """A value with a label per axis."""

    value: fx.Node
    labels: str


def _einsum(node: fx.Node) -> tuple[fx.Node, str] | None:
    given = arguments(node)
    values = list(given["tensors"])
    parsed = _parse(given["equation"], [len(tensor_shape(value)) for value in values])
    if parsed is None:
        return None
    terms, result = parsed
    operands = [Term(value, labels) for value, labels in zip(values, terms, strict=True)]
    if not _consistent(operands):
        return None
    rewriter = _Rewriter(node, operands)
    first = operands[0]
    for index, second in enumerate(operands[1:], 1):
        later = "".join(term.labels for term in operands[index + 1 :]) + result
        first = rewriter.product(first, second, later)
    return rewriter.ordered(rewriter.summed(first, result), result).value, "as products of matrices"


def _parse(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """The labels of every operand and of the result; None for diagonals and for what cannot be read."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    free = iter(sorted(set(string.ascii_letters) - set(left)))
    dots = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term]
    shared = "".join(next(free) for _ in range(max(dots, default=0)))
    expanded = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        expanded.append(term.replace("...", shared[len(shared) - count :] if count else ""))
    if not arrow:
        once = (label for label in left if label.isalpha() and left.count(label) == 1)
        result = "..." + "".join(sorted(once))
    result = result.replace("...", shared)
    if any(len(set(term)) != len(term) or len(term) != rank for term, rank in zip(expanded, ranks, strict=True)):
        return None
    return expanded, result


def _consistent(operands: list[Term]) -> bool:
    """Whether every label has one size; an axis of size one may stretch, which products of matrices do not."""
    sizes: Sizes = {}
    for term in operands:
        for label, size in zip(term.labels, tensor_shape(term.value), strict=True):
            if not same_size(sizes.setdefault(label, size), size):
                return False
    return True


class _Rewriter:
    def __init__(self, node: fx.Node, operands: list[Term]) -> None:
        self.node = node
        self.sizes = {
            label: (term.value, axis) for term in operands for axis, label in reversed([*enumerate(term.labels)])
        }

    def emit(self, target: Any, *args: Any) -> fx.Node:
        return insert(self.node.graph, self.node, target, args, origins=(self.node,))

    def size(self, labels: str) -> Any:
        """The product of the sizes of some labels, as an argument."""
        total: Any = 1
        for label in labels:
            size = size_at(self.node, *self.sizes[label])
            if isinstance(total, int) and isinstance(size, int):
                total *= size
            else:
                total = size if total == 1 else self.emit(operator.mul, total, size)
        return total

    def ordered(self, term: Term, labels: str) -> Term:
        """The value with its axes in another order."""
        if term.labels == labels:
            return term
        return Term(self.emit(aten.permute.default, term.value, [term.labels.index(one) for one in labels]), labels)

    def summed(self, term: Term, wanted: str) -> Term:
        """The value without the axes that nothing wants."""
        gone = [axis for axis, label in enumerate(term.labels) if label not in wanted]
        if not gone:
            return term
        value = self.emit(aten.sum.dim_IntList, term.value, gone)
        return Term(value, "".join(label for label in term.labels if label in wanted))

    def merged(self, term: Term, *groups: str) -> fx.Node:
        """The value with one axis per group of labels."""
        value = self.ordered(term, "".join(groups)).value
        if all(len(group) == 1 for group in groups):
            return value
        return self.emit(aten.reshape.default, value, [self.size(group) for group in groups])

    def product(self, left: Term, right: Term, wanted: str) -> Term:
        left, right = self.summed(left, right.labels + wanted), self.summed(right, left.labels + wanted)
        both = [label for label in left.labels if label in right.labels]
        batch = "".join(label for label in both if label in wanted)
        contracted = "".join(label for label in both if label not in wanted)
        rows = "".join(label for label in left.labels if label not in right.labels)
        columns = "".join(label for label in right.labels if label not in left.labels)
        if not contracted:
            return self.pointwise(left, right, batch, rows, columns)
        if not batch and rows and len(contracted) == len(columns) == 1:
            a, b = self.ordered(left, rows + contracted).value, self.ordered(right, contracted + columns).value
            return Term(self.emit(aten.matmul.default, a, b), rows + columns)
        a = self.merged(left, *batch, rows, contracted)
        b = self.merged(right, *batch, contracted, columns)
        value = self.emit(aten.matmul.default, a, b)
        if len(rows) != 1 or len(columns) != 1:
            value = self.emit(aten.reshape.default, value, [self.size(label) for label in batch + rows + columns])
        return Term(value, batch + rows + columns)

    def pointwise(self, left: Term, right: Term, batch: str, rows: str, columns: str) -> Term:
        a, b = self.ordered(left, batch + rows).value, self.ordered(right, batch + columns).value
        for axis in range(len(columns)):
            a = self.emit(aten.unsqueeze.default, a, len(batch + rows) + axis)
        for axis in range(len(rows)):
            b = self.emit(aten.unsqueeze.default, b, len(batch) + axis)
        return Term(self.emit(aten.mul.Tensor, a, b), batch + rows + columns)


EINSUM: dict[object, list[Any]] = {aten.einsum.default: [_einsum]}

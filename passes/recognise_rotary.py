"""Recognise rotary position embedding that was written out.

Before:  x * cos + cat([-x[..., d/2:], x[..., :d/2]]) * sin                    (rotate half)
         x * cos + flatten(stack([-x[..., 1::2], x[..., ::2]], -1)) * sin      (rotate pairs)
         cat([a * cos - b * sin, b * cos + a * sin])                           a, b = halves of x
         flatten(stack([a * cos - b * sin, b * cos + a * sin], -1))            a, b = even and odd columns of x
After:   rotary_embedding(x, cos, sin, interleaved)

When only the first columns of a head rotate, ``x`` is a slice and the rest stays as it was. ``cos`` and ``sin`` come as
they are: with one column per column of ``x``, or one per pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from .base import Pass, Report
from .graph.columns import Columns, columns, joined
from .graph.edit import insert, same_shape, tensor_shape
from .graph.match import (
    ADD,
    MUL,
    SUB,
    VIEWS,
    argument,
    aten,
    dtype_of,
    is_op,
    is_tensor,
    same_value,
    scaled,
    substitute,
    without_copies,
)
from .graph.ops import ROTARY_EMBEDDING, result_dtype
from .graph.program import Program
from .graph.query import calls


@dataclass(frozen=True)
class Rotation:
    """What a node rotates: columns of a value by tables of cosines and sines; ``rest`` follows unrotated."""

    x: Columns
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    rest: tuple[fx.Node, ...] = ()


class RecogniseRotary(Pass):
    """Replace written-out rotary embeddings by ``tilewright::rotary_embedding``."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every sum (of x and its rotated copy) and at everything that puts two halves together."""
        for node in calls(program.graph, {*ADD, aten.cat.default, *VIEWS}):
            if node._erased:
                continue
            reason = None
            for rotation in _sums(node) if is_op(node, ADD) else _halves(node):
                reason = _misfit(node, rotation)
                if reason is None:
                    _rewrite(node, rotation, report)
                    break
            if reason:
                report.refuse(node, reason)


def _rewrite(node: fx.Node, rotation: Rotation, report: Report) -> None:
    graph, (x, chosen) = node.graph, rotation.x
    last = len(tensor_shape(x)) - 1
    if chosen != range(tensor_shape(x)[-1]):
        x = insert(graph, node, aten.slice.Tensor, (x, last, chosen.start, chosen.stop), origins=(node,))
    args = (x, rotation.cos, rotation.sin, *((True,) if rotation.interleaved else ()))
    new = insert(graph, node, ROTARY_EMBEDDING, args, origins=(node,))
    if rotation.rest:
        new = insert(graph, node, aten.cat.default, ([new, *rotation.rest], last), origins=(node,))
    kind = "interleaved pairs" if rotation.interleaved else "halves"
    report.change(node, f"rotary embedding of {len(chosen)} columns of {rotation.x[0].name}, {kind}")
    substitute(node, new)


def _sums(node: fx.Node) -> Iterator[Rotation]:
    """``x * cos + rotated(x) * sin``."""
    if argument(node, 2, "alpha", 1) != 1:
        return
    for straight, turned in _both(node):
        straight, turned = without_copies(straight), without_copies(turned)
        if not is_op(straight, MUL) or not is_op(turned, MUL):
            continue
        for rotated, sin in _both(turned):
            found = _rotated(rotated)
            if found is None:
                continue
            for x, cos in _both(straight):
                if _same(columns(x), found[0]) and is_tensor(cos) and is_tensor(sin):
                    yield Rotation(found[0], cos, sin, found[1])


def _rotated(node: Any) -> tuple[Columns, bool] | None:
    """The x whose halves, or columns of pairs, a node swaps while it negates the second."""
    parts = joined(node)
    if parts is None or len(parts[0]) != 2:
        return None
    (negated, a), interleaved = parts
    b, sign = scaled(negated)
    pair = _pair(columns(a), columns(b), interleaved) if sign == -1.0 else None
    return None if pair is None else (pair, interleaved)


def _halves(node: fx.Node) -> Iterator[Rotation]:
    """``a * cos - b * sin`` and ``b * cos + a * sin`` put together."""
    parts = joined(node)
    if parts is None or len(parts[0]) < 2 or (parts[1] and len(parts[0]) > 2):
        return
    first, second = map(without_copies, parts[0][:2])
    if not is_op(first, SUB) or not is_op(second, ADD):
        return
    if argument(first, 2, "alpha", 1) != 1 or argument(second, 2, "alpha", 1) != 1:
        return
    left, right = map(without_copies, first.args[:2])
    if not is_op(left, MUL) or not is_op(right, MUL):
        return
    for a, cos in _both(left):
        for b, sin in _both(right):
            x = _pair(columns(a), columns(b), parts[1])
            for one, other in _both(second) if x else ():
                tables = _table(cos, _cofactor(one, b), parts[1]), _table(sin, _cofactor(other, a), parts[1])
                if x and tables[0] and tables[1]:
                    yield Rotation(x, tables[0], tables[1], parts[1], tuple(parts[0][2:]))


def _both(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The two operands of a commutative operator in both orders."""
    left, right = node.args[:2]
    return (left, right), (right, left)


def _pair(a: Columns | None, b: Columns | None, interleaved: bool) -> Columns | None:
    """The columns that two selections make up together: a then b, or a and b in turn."""
    if a is None or b is None or a[0] is not b[0] or len(a[1]) != len(b[1]) or not len(a[1]):
        return None
    first, second, count = a[1], b[1], 2 * len(a[1])
    if interleaved:
        together = range(first.start, first.start + count)
        fits = first == together[::2] and second == together[1::2]
    else:
        together = range(first.start, first.start + count)
        fits = first == together[: count // 2] and second == together[count // 2 :]
    return (a[0], together) if fits else None


def _same(a: Columns | None, b: Columns) -> bool:
    return a is not None and a[1] == b[1] and same_value(a[0], b[0])


def _cofactor(product: Any, factor: Any) -> Any:
    """What a product multiplies a factor by."""
    product = without_copies(product)
    if is_op(product, MUL):
        for one, other in _both(product):
            if same_value(one, factor):
                return other
    return None


def _table(for_a: Any, for_b: Any, interleaved: bool) -> fx.Node | None:
    """The table of cosines or sines that two halves are multiplied by."""
    if not is_tensor(for_a) or not is_tensor(for_b):
        return None
    if same_value(for_a, for_b):
        return for_a
    whole = _pair(columns(for_a), columns(for_b), interleaved)
    return whole[0] if whole and whole[1] == range(tensor_shape(whole[0])[-1]) else None


def _misfit(node: fx.Node, rotation: Rotation) -> str | None:
    """Why the operator would give something else."""
    (x, chosen), tables = rotation.x, (rotation.cos, rotation.sin)
    width = len(chosen)
    for table in tables:
        last = tensor_shape(table)[-1:]
        if last not in ((width,), (width // 2,)) or last != tensor_shape(tables[0])[-1:]:
            return f"{table.name} has neither one column for each of the {width} that rotate nor one for each pair"
    rest = [tensor_shape(part)[-1] for part in rotation.rest]
    if not same_shape(tensor_shape(node), (*tensor_shape(x)[:-1], width + sum(rest))):
        return f"the cosine or the sine broadcasts {x.name}"
    if dtype_of(node) != result_dtype(*(value.meta["val"] for value in (x, *tables))):
        return "the result has another dtype than the product"
    return None

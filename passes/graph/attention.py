"""Reading attention that was written out: operands, scale and masks of softmax(q @ k^T) @ v.

Nothing here changes a graph until :meth:`Operand.build`, so that a match can still be refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .edit import insert, same_shape, tensor_shape
from .match import (
    ADD,
    DIV,
    MUL,
    SUB,
    VIEWS,
    argument,
    aten,
    is_op,
    is_tensor,
    scalar,
    scaled,
    users_of,
    without_copies,
)
from .query import size_at
from .softmax import MASKED_FILL, WHERE, passed_through, scalar_or_full

LONGEST_HEAD = 256  # elements that the attention kernels hold (codegen/c/attention_blocks.py)


def unfit_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why no attention kernel takes such operands; None if one does."""
    for length in (query.shape[-1], value.shape[-1]):
        if not isinstance(length, int):
            return f"the length {length} of its heads varies"
        if not 1 <= length <= LONGEST_HEAD:
            return f"its heads have {length} elements, the kernels take 1 to {LONGEST_HEAD}"
    if any(operand.dtype == torch.float64 for operand in (query, key, value)):
        return "it is float64, the kernels compute in float32"
    return None


@dataclass(frozen=True)
class Operand:
    """A node whose axes, after ``order``, are batch axes, then rows, then columns.

    With ``unfold`` the node's first axis holds two batch axes of the given sizes, and ``order`` counts them as two.
    """

    node: fx.Node
    order: tuple[int, ...]
    unfold: tuple[fx.Node, tuple[Any, ...]] | None = None  # (a node with these batch sizes in front, the sizes)

    @staticmethod
    def of(node: fx.Node) -> Operand:
        """A node as it is."""
        return Operand(node, tuple(range(len(tensor_shape(node)))))

    @property
    def shape(self) -> tuple[Any, ...]:
        """The sizes in order."""
        sizes = tensor_shape(self.node)
        if self.unfold:
            sizes = (*self.unfold[1], *sizes[1:])
        return tuple(sizes[axis] for axis in self.order)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.order)

    def permuted(self, order: tuple[int, ...]) -> Operand:
        """With its axes in another order."""
        return replace(self, order=tuple(self.order[axis] for axis in order))

    def transposed(self) -> Operand:
        """With rows and columns swapped."""
        return self.permuted((*range(self.rank - 2), self.rank - 1, self.rank - 2))

    def simplified(
        self, batch: tuple[fx.Node, tuple[Any, ...]] | None = None, *, factors: bool = True
    ) -> tuple[Operand, float]:
        """Without the copies, transpositions and (unless told otherwise) constant factors before it.

        Args:
            batch: the two batch axes (see ``unfold``) that a first axis stands for; views of them are taken apart.
            factors: whether factors may be taken off.

        Returns:
            (the operand, the factor taken off).
        """
        operand, factor = self, 1.0
        while True:
            node, more = scaled(operand.node) if factors else (without_copies(operand.node), 1.0)
            operand, factor = replace(operand, node=node), factor * more
            swap = permutation(node)
            if swap is not None and operand.unfold is None:
                inner: Any = node.args[0]
                operand = Operand(inner, tuple(swap[axis] for axis in operand.order))
            elif batch and operand.rank == 3 and operand.order[0] == 0:
                operand = Operand(node, (0, 1, *(axis + 1 for axis in operand.order[1:])), batch)
            elif operand.unfold and (source := folded(node, operand.unfold[1])) is not None:
                operand = Operand(source, operand.order)
            elif operand.unfold and swap is not None and swap[0] == 0:
                inner = node.args[0]
                order = tuple(axis if axis < 2 else swap[axis - 1] + 1 for axis in operand.order)
                operand = Operand(inner, order, operand.unfold)
            elif operand.unfold is None and operand.rank == 4 and (inner := unfolded(node)) is not None:
                operand = Operand(inner, operand.order, (node, tensor_shape(node)[:2]))
            else:
                return operand, factor

    def unrepeated(self) -> tuple[Operand, int]:
        """Without the repetition of heads (axis 1 of four), and how often each was repeated."""
        if self.rank != 4:
            return self, 1
        inner = repeated(self.node, self.order[1], self.unfold[1] if self.unfold else None)
        if inner is None:
            return self, 1
        return Operand(inner[0], self.order).simplified(factors=False)[0], inner[1]

    def build(self, before: fx.Node) -> fx.Node:
        """The operand as a node of four axes or more."""
        graph, node = before.graph, self.node
        if self.unfold:
            sizes = [size_at(before, self.unfold[0], axis) for axis in (0, 1)]
            sizes += [size_at(before, node, axis) for axis in (1, 2)]
            node = insert(graph, before, aten.reshape.default, (node, sizes), origins=(self.node,))
        if self.order != tuple(range(self.rank)):
            node = insert(graph, before, aten.permute.default, (node, list(self.order)), origins=(self.node,))
        for _ in range(4 - self.rank):
            node = insert(graph, before, aten.unsqueeze.default, (node, len(tensor_shape(node)) - 2), origins=(node,))
        return node


@dataclass
class Scores:
    """softmax's argument, taken apart: ``q @ k^T * scale``, plus biases, with some positions set to a number.

    Attributes:
        product: the node of q @ k^T.
        q: queries ``[..., rows, depth]``.
        k: keys ``[..., columns, depth]``.
        scale: product of all constant factors.
        shaped: a node of the shape in which masks apply: with four axes if any has four.
        biases: what is added, with a factor.
        covers: (condition, its value where scores are kept, what the others are set to).
        interior: every node between the product and the softmax.
    """

    product: fx.Node
    q: Operand
    k: Operand
    scale: float
    shaped: fx.Node
    biases: list[tuple[fx.Node, float]] = field(default_factory=list)
    covers: list[tuple[fx.Node, bool, float]] = field(default_factory=list)
    interior: list[fx.Node] = field(default_factory=list)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Batch axes, rows, columns."""
        return tensor_shape(self.shaped)


def permutation(node: Any) -> tuple[int, ...] | None:
    """The order of axes that a node brings its operand's into."""
    dims = len(tensor_shape(node)) if is_tensor(node) else 0
    if is_op(node, aten.permute.default):
        return tuple(int(axis) % dims for axis in node.args[1])  # type: ignore[union-attr, arg-type]
    if is_op(node, aten.transpose.int) or (is_op(node, aten.t.default) and dims == 2):
        swapped: Any = node.args[1:3] if len(node.args) == 3 else (0, 1)
        a, b = swapped[0] % dims, swapped[1] % dims
        order = list(range(dims))
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return None


def folded(node: Any, batch: tuple[Any, ...]) -> fx.Node | None:
    """The value with two batch axes of which a node is the view with one."""
    if not is_op(node, VIEWS):
        return None
    source = without_copies(node.args[0])
    shape = tensor_shape(source) if is_tensor(source) else ()
    return source if len(shape) == 4 and same_shape(shape, (*batch, *tensor_shape(node)[1:])) else None


def unfolded(node: Any) -> fx.Node | None:
    """The value with one batch axis of which a node is the view with two."""
    if not is_op(node, VIEWS):
        return None
    source: Any = without_copies(node.args[0])
    shape = tensor_shape(source)
    return source if len(shape) == 3 and same_shape(shape[1:], tensor_shape(node)[2:]) else None


def repeated(node: Any, axis: int, batch: tuple[Any, ...] | None = None) -> tuple[fx.Node, int] | None:
    """The value of which a node repeats each entry along an axis, and how often.

    Args:
        node: the repeated value.
        axis: which axis of it.
        batch: the two batch axes that the node's first axis stands for, if it does.
    """
    node = without_copies(node)
    if batch is not None and not is_op(node, VIEWS):
        return None
    if is_op(node, aten.repeat_interleave.self_int):
        times, along = node.args[1], argument(node, 2, "dim")
        source: Any = node.args[0]
        if type(times) is int and along is not None and along % len(tensor_shape(node)) == axis:
            return source, times
        return None
    if is_op(node, aten.expand.default):
        return _expanded(node, axis, 0)
    if not is_op(node, VIEWS):
        return None
    wide = without_copies(node.args[0])
    shape = tensor_shape(node) if batch is None else (*batch, *tensor_shape(node)[1:])
    if not is_op(wide, aten.expand.default) or len(tensor_shape(wide)) != len(shape) + 1:
        return None
    found = _expanded(wide, axis + 1, 1)
    if found is None:
        return None
    base = tensor_shape(found[0])
    fits = same_shape((*base[:axis], base[axis] * found[1], *base[axis + 1 :]), shape)
    return found if fits else None


def _expanded(node: fx.Node, axis: int, extra: int) -> tuple[fx.Node, int] | None:
    """What an expand repeats along one axis; with ``extra``, that axis was inserted for it."""
    times, source = tensor_shape(node)[axis], without_copies(node.args[0])
    shape = tensor_shape(node)
    if type(times) is not int or not is_tensor(source):
        return None
    if not same_shape(tensor_shape(source), (*shape[:axis], 1, *shape[axis + 1 :])):
        return None
    if not extra:
        return (source, times) if times > 1 else None
    if not is_op(source, aten.unsqueeze.default, VIEWS):
        return None
    inner: Any = source.args[0]
    return (inner, times) if same_shape(tensor_shape(inner), (*shape[:axis], *shape[axis + 1 :])) else None


def product_of(node: Any) -> tuple[Operand, Operand, tuple[int, ...]] | None:
    """A batched matrix product: left ``[..., m, k]``, right ``[..., k, n]``, the order of the result's axes."""
    if is_op(node, aten.matmul.default, aten.bmm.default, aten.mm.default):
        a, b = node.args
    elif is_op(node, aten.baddbmm.default):
        a, b = node.args[1:3]
    elif is_op(node, aten.einsum.default):
        return _einsum(node)
    else:
        return None
    left, right = Operand.of(a), Operand.of(b)  # type: ignore[arg-type]
    return (left, right, tuple(range(left.rank))) if left.rank == right.rank >= 2 else None


def _einsum(node: fx.Node) -> tuple[Operand, Operand, tuple[int, ...]] | None:
    """Two operands with the same batch labels, one label summed over."""
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, output = equation.partition("->")
    labels = inputs.split(",")
    if not arrow or len(labels) != 2 or "." in equation or len(tensors) != 2:  # type: ignore[arg-type]
        return None
    left, right = labels
    if any(len(set(one)) != len(one) for one in (left, right, output)):
        return None
    batch = [label for label in output if label in left and label in right]
    summed = [label for label in left if label in right and label not in output]
    rows = [label for label in left if label not in right]
    columns = [label for label in right if label not in left]
    if not len(summed) == len(rows) == len(columns) == 1 or set(output) != {*batch, *rows, *columns}:
        return None
    natural = (*batch, *rows, *columns)
    a, b = (Operand.of(tensor) for tensor in tensors)  # type: ignore[union-attr, arg-type]
    return (
        a.permuted(tuple(left.index(label) for label in (*batch, *rows, *summed))),
        b.permuted(tuple(right.index(label) for label in (*batch, *summed, *columns))),
        tuple(natural.index(label) for label in output),
    )


def scores_of(node: Any) -> Scores | str | None:
    """What leads to a softmax, taken apart; a reason where masks apply to differently grouped axes; None for others."""
    found = _walk(node, set(), 24)
    if found is None:
        return None
    nodes = (*found.interior, found.product)
    found.shaped = next((one for one in nodes if len(tensor_shape(one)) == 4), found.product)
    rank = len(tensor_shape(found.shaped))
    masking = [one for one in found.interior if is_op(one, ADD, SUB, WHERE, MASKED_FILL)]
    if is_op(found.product, aten.baddbmm.default) and found.biases:
        masking.append(found.product)
    for one in masking:
        if len(tensor_shape(one)) != rank:
            return f"{one.name} applies a mask with other batch axes than {found.shaped.name} has"
    return found


def _walk(node: Any, failed: set[Any], depth: int) -> Scores | None:
    """From a softmax's argument back to the product; ``failed`` remembers what leads to none."""
    if not is_tensor(node) or depth == 0 or node in failed:
        return None
    found = _product_scores(node)
    if found is None:
        found = _step_back(node, failed, depth - 1)
        if found is None:
            failed.add(node)
            return None
        found.interior.append(node)
    return found


def _product_scores(node: fx.Node) -> Scores | None:
    parts = product_of(node)
    if parts is None or parts[2] != tuple(range(len(parts[2]))):
        return None
    found = Scores(node, parts[0], parts[1].transposed(), 1.0, node)
    if is_op(node, aten.baddbmm.default):
        beta, alpha = scalar(argument(node, 3, "beta", 1)), scalar(argument(node, 4, "alpha", 1))
        bias: Any = node.args[0]
        if beta is None or alpha is None:
            return None
        if beta != 0 and scalar_or_full(bias) != 0.0:
            found.biases.append((bias, beta))
        found.scale = alpha
    return found


def _step_back(node: fx.Node, failed: set[Any], depth: int) -> Scores | None:
    """The scores behind one operator, with what it does to them."""
    args: Any = node.args
    if (inner := passed_through(node)) is not None:
        return _walk(inner, failed, depth)
    if is_op(node, MUL, DIV):
        base, factor = _one_factor(node)
        found = _walk(base, failed, depth) if factor and _keeps_shape(base, node) else None
        return _multiplied(found, factor) if found is not None and factor else None
    if is_op(node, ADD, SUB) and argument(node, 2, "alpha", 1) == 1:
        for side in (0, 1) if is_op(node, ADD) else (0,):
            found = _walk(args[side], failed, depth) if _keeps_shape(args[side], node) else None
            if found is not None:
                if is_tensor(args[1 - side]):  # a number moves all scores alike, which softmax does not see
                    found.biases.append((args[1 - side], -1.0 if is_op(node, SUB) else 1.0))
                return found
        return None
    if is_op(node, WHERE):
        choices = [(args[0], True, args[1], args[2]), (args[0], False, args[2], args[1])]
    elif is_op(node, MASKED_FILL):
        choices = [(args[1], False, args[0], args[2])]
    else:
        return None
    for condition, kept_if, kept, other in choices:
        fill = scalar_or_full(other)
        found = _walk(kept, failed, depth) if fill is not None and _keeps_shape(kept, node) else None
        if found is not None and fill is not None:
            found.covers.append((condition, kept_if, fill))
            return found
    return None


def _multiplied(found: Scores, factor: float) -> Scores:
    found.scale *= factor
    found.biases = [(bias, own * factor) for bias, own in found.biases]
    found.covers = [(condition, kept_if, fill * factor) for condition, kept_if, fill in found.covers]
    return found


def _one_factor(node: fx.Node) -> tuple[Any, float | None]:
    left, right = scalar(node.args[0]), scalar(node.args[1])
    if is_op(node, DIV):
        return node.args[0], 1 / right if right else None
    return (node.args[0], right) if right is not None else (node.args[1], left)


def _keeps_shape(value: Any, node: fx.Node) -> bool:
    return is_tensor(value) and same_shape(tensor_shape(value), tensor_shape(node))


def used_elsewhere(interior: list[fx.Node], result: fx.Node) -> fx.Node | None:
    """A node of the written-out attention whose value somebody else needs."""
    inside = {*interior, result}
    return next((node for node in interior if any(user not in inside for user in users_of(node))), None)

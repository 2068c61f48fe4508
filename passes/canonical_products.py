"""Canonical form of products, convolutions and norms: the rules that ``canonicalize`` applies to them.

Before:  addmm(b, x, permute(w))    matmul(x, w)             conv2d(x, w, b, 2)                native_layer_norm(x)[0]
After:   linear(x, w, b)            linear(x, permute(w))    convolution(x, w, b, [2, 2]...)   layer_norm(x)

Before:  reshape(linear(reshape(x, [-1, k]), w, b), [..., n])
After:   linear(x, w, b)
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .canonical_views import PERMUTES, RESHAPES, insert_like, permutation, reshape_sizes
from .graph.edit import insert, replace, same_size, tensor_shape
from .graph.query import arguments, aten, is_call, is_constant

Rewrite = tuple[fx.Node, str] | None

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}


def _product(node: fx.Node) -> Rewrite:
    """``mm``, ``bmm`` and ``matmul``: a linear map where the second operand is a constant matrix."""
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if len(tensor_shape(right)) == 2 and len(tensor_shape(left)) >= 1 and is_constant(right) and not is_constant(left):
        return insert_like(
            node, aten.linear.default, (left, _transposed(node, right))
        ), "product with a constant matrix"
    if node.target is aten.matmul.default:
        return None
    return insert_like(node, aten.matmul.default, (left, right)), "as matmul"


def _transposed(before: fx.Node, matrix: fx.Node) -> fx.Node:
    """The transpose of a constant matrix; that of a transpose is what was transposed."""
    if is_call(matrix, *PERMUTES) and permutation(matrix) == [1, 0]:
        source = matrix.args[0]
        assert isinstance(source, fx.Node)
        return source
    name = f"{matrix.name}_transposed"
    return insert(before.graph, before, aten.permute.default, (matrix, [1, 0]), origins=(matrix,), name=name)


def _sum_and_product(node: fx.Node) -> Rewrite:
    """``addmm`` and ``baddbmm``: beta * c + alpha * (a @ b)."""
    given = arguments(node)
    addend, left, right = node.args[:3]
    assert isinstance(addend, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
    beta, alpha = given["beta"], given["alpha"]
    shape = tensor_shape(node)
    bias_like = len(tensor_shape(addend)) == 1 and same_size(tensor_shape(addend)[0], shape[-1])
    if (
        node.target is aten.addmm.default
        and alpha == beta == 1
        and bias_like
        and is_constant(addend)
        and is_constant(right)
    ):
        weight = _transposed(node, right)
        return insert_like(
            node, aten.linear.default, (left, weight, addend)
        ), "product with a constant matrix plus bias"
    value = insert_like(node, aten.matmul.default, (left, right))
    if alpha != 1:
        value = insert_like(node, aten.mul.Tensor, (value, alpha))
    if beta != 0:
        if beta != 1:
            addend = insert(node.graph, node, aten.mul.Tensor, (addend, beta), origins=(node,))
        value = insert_like(node, aten.add.Tensor, (value, addend))
    return value, "as matmul and add"


def _linear(node: fx.Node) -> Rewrite:
    """A linear map of flattened rows is that of the rows, flattened; one whose weight is computed is a matmul."""
    rows, weight = node.args[:2]
    bias = arguments(node)["bias"]
    assert isinstance(rows, fx.Node) and isinstance(weight, fx.Node)
    if not is_constant(weight) and len(tensor_shape(weight)) == 2:
        transposed = insert(node.graph, node, aten.permute.default, (weight, [1, 0]), origins=(node,))
        value = insert_like(node, aten.matmul.default, (rows, transposed))
        return (value if bias is None else insert_like(node, aten.add.Tensor, (value, bias))), "its weight is computed"
    if not is_call(rows, *RESHAPES) or len(tensor_shape(rows)) < 1:
        return None
    source = rows.args[0]
    assert isinstance(source, fx.Node)
    if len(tensor_shape(source)) < 2 or not same_size(tensor_shape(source)[-1], tensor_shape(rows)[-1]):
        return None
    rest: tuple[Any, ...] = (weight,) if bias is None else (weight, bias)
    moved = insert(node.graph, node, aten.linear.default, (source, *rest), origins=(node,))
    sizes = reshape_sizes(node, moved)
    if sizes is None:
        node.graph.erase_node(moved)
        return None
    return insert_like(node, aten.reshape.default, (moved, sizes)), "rows are regrouped after it"


def _per_axis(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _convolution(node: fx.Node) -> Rewrite:
    """All convolutions as ``aten.convolution`` with every argument said."""
    given = arguments(node)
    transposed = node.target in _TRANSPOSED
    rank = _TRANSPOSED[node.target] if transposed else _CONVOLUTIONS[node.target]  # type: ignore[index]
    x, weight, bias = given["input"], given["weight"], given["bias"]
    stride, dilation = _per_axis(given["stride"], rank), _per_axis(given["dilation"], rank)
    output_padding = _per_axis(given.get("output_padding", 0), rank)
    graph = node.graph
    batched = len(tensor_shape(x)) == rank + 2
    if not batched:
        x = insert(graph, node, aten.unsqueeze.default, (x, 0), origins=(node,))
    padding = given["padding"]
    if isinstance(padding, str):
        kernel = tensor_shape(weight)[2:]
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        if any(amount % 2 for amount in total):
            edges = [edge for amount in reversed(total) for edge in (0, amount % 2)]
            x = insert(graph, node, aten.constant_pad_nd.default, (x, edges, 0.0), origins=(node,))
        padding = [amount // 2 for amount in total]
    args = (x, weight, bias, stride, _per_axis(padding, rank), dilation, transposed, output_padding, given["groups"])
    value = insert(graph, node, aten.convolution.default, args, origins=(node,))
    if not batched:
        value = insert(graph, node, aten.squeeze.dim, (value, 0), origins=(node,))
    return value, "as convolution"


def _raw_convolution(node: fx.Node) -> Rewrite:
    """Variants of ``convolution`` with flags of a library, or with fewer numbers than axes."""
    given = arguments(node)
    x, weight = node.args[:2]
    rank = len(tensor_shape(weight)) - 2  # type: ignore[arg-type]
    lists = [_per_axis(given[key], rank) for key in ("stride", "padding", "dilation")]
    transposed = given.get("transposed", False)
    output_padding = _per_axis(given.get("output_padding", 0), rank)
    args = (x, weight, given.get("bias"), *lists, transposed, output_padding, given["groups"])
    if node.target is aten.convolution.default and node.args == args:
        return None
    if len(tensor_shape(x)) != rank + 2:  # type: ignore[arg-type]
        return None
    return insert_like(node, aten.convolution.default, args), "all arguments said"


def _norm_of_several(node: fx.Node) -> Rewrite:
    """Operators that also give statistics nobody reads: the form that gives the value alone."""
    getters = list(node.users)
    if not getters or any(user.target is not operator.getitem for user in getters):
        return None
    for user in getters:
        if not user.users and user.args[1] != 0:
            node.graph.erase_node(user)
    if any(user.args[1] != 0 for user in node.users):
        return None
    built = _single_form(node, arguments(node))
    if built is None:
        return None
    target, args = built
    new = insert(node.graph, node, target, args, origins=(node,))
    for user in list(node.users):
        new.meta["val"] = user.meta["val"]
        replace(user, new)
    return node, f"only its value is used: {target}"


def _single_form(node: fx.Node, given: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    x = node.args[0]
    if node.target is aten.native_layer_norm.default:
        return aten.layer_norm.default, (
            x,
            *(given[key] for key in ("normalized_shape", "weight", "bias", "eps")),
            False,
        )
    if node.target is aten.native_group_norm.default:
        return aten.group_norm.default, (x, given["group"], given["weight"], given["bias"], given["eps"], False)
    if node.target is aten.max_pool2d_with_indices.default:
        return aten.max_pool2d.default, node.args
    if given.get("training", False):
        return None
    parameters = tuple(given[key] for key in ("weight", "bias", "running_mean", "running_var"))
    momentum = given.get("momentum", given.get("exponential_average_factor", 0.0))
    eps = given.get("eps", given.get("epsilon"))
    return aten.batch_norm.default, (x, *parameters, False, momentum, eps, False)


def _softmax(node: fx.Node) -> Rewrite:
    """One form of softmax, whose dtype is its operand's."""
    forms: dict[Any, Any] = {aten._softmax.default: aten.softmax.int, aten._log_softmax.default: aten.log_softmax.int}
    x, dim = node.args[:2]
    assert isinstance(x, fx.Node)
    dtype = node.meta["val"].dtype
    target: Any = forms.get(node.target, node.target)
    if target is node.target and len(node.args) == 2 and not node.kwargs:
        return None
    if x.meta["val"].dtype != dtype:
        x = insert(node.graph, node, aten._to_copy.default, (x,), {"dtype": dtype}, origins=(node,))
    return insert_like(node, target, (x, dim)), "softmax in its operand's dtype"


PRODUCTS: dict[object, list[Any]] = {
    aten.mm.default: [_product],
    aten.bmm.default: [_product],
    aten.matmul.default: [_product],
    aten.addmm.default: [_sum_and_product],
    aten.baddbmm.default: [_sum_and_product],
    aten.linear.default: [_linear],
    **{target: [_convolution] for target in (*_CONVOLUTIONS, *_TRANSPOSED)},
    aten.convolution.default: [_raw_convolution],
    aten._convolution.default: [_raw_convolution],
    aten.mkldnn_convolution.default: [_raw_convolution],
    aten.cudnn_convolution.default: [_raw_convolution],
    aten.native_layer_norm.default: [_norm_of_several],
    aten.native_group_norm.default: [_norm_of_several],
    aten.max_pool2d_with_indices.default: [_norm_of_several],
    aten._native_batch_norm_legit_no_training.default: [_norm_of_several],
    aten._batch_norm_no_update.default: [_norm_of_several],
    aten.native_batch_norm.default: [_norm_of_several],
    aten.cudnn_batch_norm.default: [_norm_of_several],
    **{target: [_softmax] for target in (aten.softmax.int, aten.log_softmax.int)},
    **{target: [_softmax] for target in (aten._softmax.default, aten._log_softmax.default)},
}

"""Compute float32 models in half precision, where that was asked for.

Before:  y = op(x, w)                                  x, w, y: float32
After:   y = to(op(to(x, half), to(w, half)), float32)

Conversions stand at the borders: after inputs, states and constants, before outputs and new states. A converted weight
is constant, so it is stored in half precision. Integers and float64 stay as they are, and so does what half precision
would spoil, in float32 up to where it is bounded again:

- what is computed from integers and constants alone, such as angles of rotary embeddings: above 2048 (float16) or 256
  (bfloat16) not every position is a number of its own. Sines and cosines of it are bounded;
- what is computed with numbers beyond the range of the half type, such as masks of the most negative float32, until a
  softmax or a norm takes it in;
- what the model itself converts from half precision to float32;
- the residual stream of transformers: sums that a layer norm or an RMS norm reads, the sums that they are made of, and
  the result of such a norm where it is added to the next sum. Every layer reads and writes the stream, so that each
  would round it anew, and no later layer takes that error away (BERT-base's pooled output is off by 4 to 6 % of its
  largest value in bfloat16, by half of that with a float32 stream). Norms compute in float32 anyway, and products still
  read half precision. Residual sums of convolutional networks, which no such norm reads, are in half precision.

Caches of keys and values keep the type that was chosen for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .base import Pass, Report
from .graph.caches import caches
from .graph.edit import faking, insert, value_of
from .graph.program import Program
from .graph.query import SMALL, arguments, aten, is_call, tensor_of

_TO = aten._to_copy.default
# Operators whose result is bounded whatever goes in, or is scaled anew: float32 that goes in does not come out.
_BOUNDED = frozenset(
    ("sin", "cos", "tanh", "sigmoid", "erf", "atan", "softmax", "_softmax", "_safe_softmax", "layer_norm", "rms_norm",
     "group_norm", "instance_norm", "batch_norm", "hardsigmoid", "hardtanh", "clamp", "relu6", "exp2", "exp")
)  # fmt: skip
# Products, which kernels compute in the dtype of their operands; a lookup gives the dtype of its table.
_PRODUCTS = frozenset(
    ("linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "convolution", "conv1d", "conv2d",
     "scaled_dot_product_attention", "embedding")
)  # fmt: skip
_STREAM_NORMS = frozenset(("layer_norm", "rms_norm"))
# What changes neither the numbers of a stream nor which of them belong together.
_STREAM_VIEWS = frozenset(
    ("view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "slice", "select", "expand", "clone", "alias",
     "contiguous", "flatten", "unflatten")
)  # fmt: skip
# Their parameters stay float32, as statistics may lie beyond the range of a half type.
_KEPT_PARAMETERS = frozenset(("batch_norm",))


class NarrowFloats(Pass):
    """Replace float32 arithmetic (and that of the other half type) by ``dtype``.

    It belongs after everything that changes weights, which are rounded once then, and before the constant folding that
    outlines them.

    Args:
        dtype: ``torch.float16`` or ``torch.bfloat16``.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"{dtype} is no half precision")
        self.dtype = dtype

    def run(self, program: Program, report: Report) -> None:
        """Classify all values, then recompute them in graph order."""
        work = _Narrowing(program.graph, self.dtype)
        work.classify()
        computed = [node for node in work.narrow if node.op == "call_function" and not _at_border(node)]
        if not computed:
            return
        count = len([node for node in (*work.wide, *work.stream) if node.op == "call_function"])
        work.rewrite()
        kept = f"; {count} stay float32" if count else ""
        report.change(computed[0], f"{len(computed)} nodes computed in {str(self.dtype).removeprefix('torch.')}{kept}")


@dataclass
class _Narrowing:
    graph: fx.Graph
    dtype: torch.dtype
    narrow: dict[fx.Node, None] = field(default_factory=dict)  # to be computed in half precision
    wide: dict[fx.Node, bool] = field(default_factory=dict)  # stays float32; whether also together with activations
    stream: dict[fx.Node, None] = field(default_factory=dict)  # stays float32 as long as it is added to and normalised
    bounded: dict[fx.Node, None] = field(default_factory=dict)  # computed in float32, then converted
    inputs: dict[fx.Node, None] = field(default_factory=dict)  # stay as they are, converted where they are used
    constants: dict[fx.Node, None] = field(default_factory=dict)  # weights and what is made of them alone, likewise

    # -- what each value is --------------------------------------------------------------------------------------------

    def classify(self) -> None:
        """Fill the tables, in graph order."""
        self._fixed: set[fx.Node] = set()  # of any dtype: depends on neither inputs nor states, nor their sizes
        self._residual = _residual_stream(self.graph)
        self._caches = caches(self.graph)
        for node in self.graph.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and self._fixed.issuperset(node.all_input_nodes)):
                self._fixed.add(node)
            if not self._is_float(node):
                continue
            if node.op in ("placeholder", "get_attr"):
                tensor = tensor_of(node)
                if tensor is not None and self._exceeds(tensor):
                    self.wide[node] = True
                else:
                    (self.inputs if tensor is None else self.constants)[node] = None
            elif node.op == "call_function":
                self._classify_call(node)

    def _classify_call(self, node: fx.Node) -> None:
        name = _name(node)
        operands = node.all_input_nodes
        floats = [operand for operand in operands if self._is_float(operand)]
        kept = [operand for operand in floats if operand in self.wide]
        strong = any(self.wide[operand] for operand in kept) or self._has_large_number(node)
        strong = strong or self._is_asked_for(node)
        pure = all(operand in self.wide or operand in self.constants for operand in floats)
        made = pure and not kept and node in self._fixed and name != "arange"
        if made and not strong:
            self.constants[node] = None
        elif node in self._residual and not strong:
            self.stream[node] = None
        elif name in _PRODUCTS and not (pure and kept and self._is_outer_product(node)):
            self.narrow[node] = None
        elif name in _BOUNDED and (kept or (name in _STREAM_NORMS and node.args[0] in self.stream)):
            self.bounded[node] = None
        elif strong:
            self.wide[node] = True
        elif pure:
            self.wide[node] = False
        else:
            self.narrow[node] = None

    def _is_float(self, node: fx.Node) -> bool:
        """Whether a value (or a part of it) is of a dtype to be replaced."""
        if node in self._caches:
            return False
        value = node.meta.get("val")
        parts = value if isinstance(value, tuple | list) else (value,)
        kinds = {torch.float32, torch.float16, torch.bfloat16} - {self.dtype}
        return any(isinstance(part, torch.Tensor) and part.dtype in kinds for part in parts)

    def _exceeds(self, tensor: torch.Tensor) -> bool:
        """Whether a constant has finite numbers beyond the range; no copy of it is made."""
        limit = torch.finfo(self.dtype).max
        if tensor.numel() == 0 or tensor.dtype == torch.float16:
            return False
        low, high = torch.aminmax(tensor)
        ends = [float(low), float(high)]
        if not all(map(math.isfinite, ends)):
            finite = tensor[torch.isfinite(tensor)] if size_of(tensor) <= SMALL else tensor[:0]
            ends = [float(end) for end in torch.aminmax(finite)] if finite.numel() else []
        return any(abs(end) > limit for end in ends)

    def _has_large_number(self, node: fx.Node) -> bool:
        """Whether the operator takes a finite number that the half type does not have."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        limit = torch.finfo(self.dtype).max
        for parameter in node.target._schema.arguments:
            value = arguments(node)[parameter.name]
            counts = isinstance(value, float) or (isinstance(value, int) and "int" not in str(parameter.type).lower())
            if counts and math.isfinite(value) and abs(value) > limit:
                return True
        return False

    def _is_asked_for(self, node: fx.Node) -> bool:
        """Whether the model itself leaves half precision here."""
        if not is_call(node, _TO) or node.kwargs.get("dtype") != torch.float32 or _at_border(node):
            return False
        source = node.args[0].meta["val"]  # type: ignore[union-attr]
        return source.dtype in (torch.float16, torch.bfloat16)

    @staticmethod
    def _is_outer_product(node: fx.Node) -> bool:
        """Whether nothing is summed over: angles are written as such a product of positions and frequencies."""
        first = node.args[0]
        return _name(node) in ("mm", "bmm", "matmul") and first.meta["val"].shape[-1] == 1  # type: ignore[union-attr]

    # -- rewriting -----------------------------------------------------------------------------------------------------

    def rewrite(self) -> None:
        """Give every value its dtype, with conversions where kinds meet."""
        tables = (self.narrow, self.wide, self.stream, self.bounded, self.inputs, self.constants)
        self._known: set[fx.Node] = set().union(*tables)
        before = {node: node.meta["val"].dtype for node in self.graph.nodes if _is_tensor(node)}
        self._converted: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._results: dict[fx.Node, fx.Node] = {}  # bounded → its narrow result
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self.constants:
                self._rewrite_call(node)
            elif node.op == "output":
                self._restore(node, before)

    def _rewrite_call(self, node: fx.Node) -> None:
        if node in self.narrow:
            mask = node.kwargs.get("attn_mask") or (node.args[3] if len(node.args) > 3 else None)
            free = {mask} if _name(node) == "scaled_dot_product_attention" and mask in self.wide else set()
            self._take(node, lambda operand: operand if operand in free else self._as(operand, self.dtype))
            self._retype(node)
        elif node in self.wide or node in self.stream:
            self._take(node, lambda operand: self._as(operand, torch.float32))
            self._evaluate(node)
        elif node in self.bounded:
            self._take(node, lambda operand: self._as(operand, torch.float32))
            self._evaluate(node)
            if _is_tensor(node):
                self._results[node] = insert(
                    node.graph, node.next, _TO, (node,), {"dtype": self.dtype}, origins=(node,)
                )
        elif _is_tensor(node) and any(operand in self._known for operand in node.all_input_nodes):
            # Gives no float itself: comparisons and conversions look at the finest of their operands.
            wide = any(operand in self.wide for operand in node.all_input_nodes)
            self._take(node, lambda operand: self._as(operand, torch.float32 if wide else self.dtype))
            self._evaluate(node)

    def _take(self, node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> None:
        kept = self.constants if _name(node) in _KEPT_PARAMETERS else {}

        def one(operand: fx.Node) -> fx.Node:
            return change(operand) if operand in self._known and operand not in kept else operand

        node.args, node.kwargs = fx.map_arg(node.args, one), fx.map_arg(node.kwargs, one)

    def _as(self, operand: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The operand in a dtype; tuples have theirs from where they were made."""
        if operand in self._results and dtype == self.dtype:
            return self._results[operand]
        if not _is_tensor(operand) or operand.meta["val"].dtype == dtype:
            return operand
        key = (operand, dtype)
        if key not in self._converted:
            place = operand.next if operand.op == "call_function" else _first_call(operand)
            self._converted[key] = insert(self.graph, place, _TO, (operand,), {"dtype": dtype}, origins=(operand,))
        return self._converted[key]

    def _retype(self, node: fx.Node) -> None:
        """Recompute a narrow value, with float32 named in arguments replaced."""
        kinds = (torch.float32, torch.float16, torch.bfloat16)

        def one(value: Any) -> Any:
            return self.dtype if isinstance(value, torch.dtype) and value in kinds else value

        node.args = fx.node.map_aggregate(node.args, one)  # type: ignore[assignment]
        node.kwargs = fx.node.map_aggregate(node.kwargs, one)  # type: ignore[assignment]
        self._evaluate(node)

    def _evaluate(self, node: fx.Node) -> None:
        with faking(self.graph):
            node.meta["val"] = node.target(*value_of(node.args), **value_of(node.kwargs))  # type: ignore[operator]

    def _restore(self, output: fx.Node, before: dict[fx.Node, torch.dtype]) -> None:
        """Give results the dtypes that they had."""

        def restored(leaf: fx.Node) -> fx.Node:
            return self._as(leaf, before[leaf]) if leaf in before else leaf

        output.args = fx.map_arg(output.args, restored)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _name(node: fx.Node) -> str:
    """An operator's name without namespace and overload: ``"softmax"``."""
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _residual_stream(graph: fx.Graph) -> set[fx.Node]:
    """The sums that norms read, the sums that these are made of, and the views between them."""
    found: set[fx.Node] = set()
    pending: list[Any] = [node.args[0] for node in graph.nodes if _name(node) in _STREAM_NORMS]
    while pending:
        value, path = pending.pop(), []
        while isinstance(value, fx.Node) and _name(value) in _STREAM_VIEWS:
            path.append(value)
            value = value.args[0]
        if not (isinstance(value, fx.Node) and value.op == "call_function"):
            continue
        if _name(value) == "add" and len(value.all_input_nodes) == 2 and value not in found:
            found.add(value)
            pending.extend(value.all_input_nodes)
        if value in found or _name(value) in _STREAM_NORMS:
            found.update(path)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _at_border(node: fx.Node) -> bool:
    """Whether a node is the conversion of a result, which this pass itself leaves behind."""
    return node.target is _TO and all(user.op == "output" for user in node.users)


def _first_call(node: fx.Node) -> fx.Node:
    """Where the conversion of an input or a weight goes: behind it, and behind all inputs."""
    while node.op in ("placeholder", "get_attr") and node.next.op == "placeholder":
        node = node.next
    return node.next

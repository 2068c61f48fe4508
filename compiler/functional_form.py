"""Bring an exported program into functional form by taking apart only the operators that need it.

Before:  y = aten.flatten.using_ints(x, 1); z = aten.linear(y, w)
After:   y = aten.view(x, [n, 64]);         z = aten.linear(y, w)

An operator that composes others and may return its operand's memory is replaced by what PyTorch makes of it, run on the
operands' fake values, and one that writes into a tensor of which nothing else has the memory by its plain form. All
other nodes stay as the exporter left them, so the program is not traced a second time, which takes longer than the
export. A program that writes into views or states, or that holds graphs within graphs, is not for this: what is written
where follows from tracing all of it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv

from ..passes.graph.edit import value_of

aten = torch.ops.aten


class NeedsTracing(Exception):
    """The program, or what an operator is made of, is not for this way."""


def rewritten(exported: ExportedProgram, kept: Callable[[torch._ops.OpOverload], bool]) -> ExportedProgram:
    """The program with its aliasing composite operators taken apart; the given one is left as it is.

    Args:
        exported: from ``torch.export``.
        kept: whether an operator stays one although it is composed of others.

    Raises:
        NeedsTracing: it has to be traced again to know its functional form.
    """
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in exported.graph_signature.output_specs):
        raise NeedsTracing("it changes a state or an input")
    if any(spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN) for spec in exported.graph_signature.input_specs):
        raise NeedsTracing("it has inputs that are no tensors")
    graph = _Rewrite(exported.graph, kept).graph
    signature = copy.deepcopy(exported.graph_signature)
    results = graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    for spec, result in zip(signature.output_specs, results, strict=True):
        if isinstance(result, fx.Node) and hasattr(spec.arg, "name"):
            spec.arg.name = result.name
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict=exported.state_dict,
        range_constraints=dict(exported.range_constraints),
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


class _Rewrite:
    """One copy of a graph, node by node. ``new`` is what stands for a node: a node, or one per result of several."""

    def __init__(self, old: fx.Graph, kept: Callable[[torch._ops.OpOverload], bool]) -> None:
        self.graph = fx.Graph()
        self.kept = kept
        self.new: dict[fx.Node, Any] = {}
        self.sizes: dict[sympy.Expr, fx.Node] = {}
        self.last_input: fx.Node | None = None
        for node in old.nodes:
            self.new[node] = self._rewrite(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()

    def _rewrite(self, node: fx.Node) -> Any:
        if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NeedsTracing(f"{node.name} holds a graph")
        if node.target is operator.getitem and isinstance(self.new.get(node.args[0]), list):  # type: ignore[arg-type]
            return self.new[node.args[0]][node.args[1]]  # type: ignore[index]
        for operand in node.all_input_nodes:
            if isinstance(self.new[operand], list):
                raise NeedsTracing(f"{node.name} takes all results of {operand.name}")
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                return self._out_of_place(node)
            if _composite(node.target) and not self.kept(node.target):
                return self._taken_apart(node)
        if isinstance(value := node.meta.get("val"), torch.SymInt) and value.node.expr in self.sizes:
            return self.sizes[value.node.expr]
        if node.target is aten.lift_fresh_copy.default:
            operands = fx.map_arg(node.args, self.new.__getitem__)
            new = self.graph.create_node("call_function", aten.clone.default, operands, name="clone")
            new.meta = dict(node.meta)
            return new
        new = self.graph.node_copy(node, self.new.__getitem__)
        if node.op == "placeholder":
            new.name = node.name  # the signature's, also where it is no name for a variable, such as input
            self.last_input = new
        self._know_size(new)
        return new

    def _taken_apart(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: self.new[used].meta["val"])
        operands = [self.new[used] for used in node.all_input_nodes]
        modes = {item.fake_mode for used in operands if isinstance(item := used.meta["val"], FakeTensor)}
        if len(modes) != 1:
            raise NeedsTracing(f"{node.name} has no operand")
        assert isinstance(node.target, torch._ops.OpOverload)
        recorder = _Recorder(self, node, operands)
        with modes.pop(), enable_python_dispatcher(), torch.no_grad(), recorder:
            result = node.target.decompose(*args, **kwargs)
        if isinstance(result, tuple | list):
            return [recorder.node_of(item) for item in result]
        return recorder.node_of(result)

    def _out_of_place(self, node: fx.Node) -> fx.Node:
        """What an operator leaves in its first operand as a value of its own, where no other tensor has that memory."""
        target, written = node.target, node.args[0]
        assert isinstance(target, torch._ops.OpOverload) and isinstance(written, fx.Node)
        names = _names(written)
        if not _writes_first(node) or not _is_new(names[0]) or not all(map(_is_only_read, names)):
            raise NeedsTracing(f"{node.name} writes into a tensor")
        if target is aten.detach_.default:
            return self.new[written]
        name = target._opname.removesuffix("_")
        packet = getattr(getattr(torch.ops, target.namespace), name, None)
        plain = getattr(packet, target._overloadname, None)
        if plain is None or plain._schema.is_mutable or (_composite(plain) and not self.kept(plain)):
            raise NeedsTracing(f"{node.name} writes into a tensor")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.new.__getitem__)
        value = node.meta["val"]
        with value.fake_mode, enable_python_dispatcher(), torch.no_grad():
            made = plain(*value_of(args), **value_of(kwargs))
        if (made.dtype, tuple(made.shape)) != (value.dtype, tuple(value.shape)):
            raise NeedsTracing(f"{node.name} converts what it writes")
        new = self.graph.create_node("call_function", plain, args, kwargs, name=name)
        new.meta = {**node.meta, "val": made}
        self.new.update(dict.fromkeys((one for one in names if one in self.new), new))
        return new

    def _know_size(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.sizes.setdefault(value.node.expr, node)

    def size(self, value: Any) -> Any:
        """A node for a size that is symbolic, made of the inputs' sizes where the graph has none; numbers as they are.

        Raises:
            NeedsTracing: not a sum, product or quotient of sizes of inputs.
        """
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise NeedsTracing("a number that follows from sizes")
        return self._size(value.node.expr) if isinstance(value, torch.SymInt) else value

    def _size(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr in self.sizes:
            return self.sizes[expr]
        if isinstance(expr, sympy.Add | sympy.Mul):
            function, parts = (operator.add if isinstance(expr, sympy.Add) else operator.mul), expr.args
        elif isinstance(expr, FloorDiv):
            function, parts = operator.floordiv, expr.args
        else:
            return self._size_of_input(expr)
        total = self._size(parts[0])
        for part in parts[1:]:
            total = self._sized(function, total, self._size(part))
        if not isinstance(total, fx.Node) or total.meta["val"].node.expr != expr:
            raise NeedsTracing(f"the size {expr}")
        self.sizes[expr] = total
        return total

    def _size_of_input(self, expr: sympy.Expr) -> fx.Node:
        for node in self.graph.find_nodes(op="placeholder"):
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    with self.graph.inserting_after(self.last_input):
                        new = self.graph.call_function(aten.sym_size.int, (node, axis))
                    self.last_input = new
                    new.meta["val"] = size
                    self._know_size(new)
                    return new
        raise NeedsTracing(f"the size {expr}")

    def _sized(self, function: Callable[..., Any], left: Any, right: Any) -> Any:
        values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in (left, right)]
        if not any(isinstance(item, fx.Node) for item in (left, right)):
            return function(left, right)
        new = self.graph.call_function(function, (left, right))
        new.meta["val"] = function(*values)
        self._know_size(new)
        return new


class _Recorder(TorchDispatchMode):
    """Writes what runs within it into the graph, in place of one node, from whose operands it starts."""

    def __init__(self, rewrite: _Rewrite, origin: fx.Node, operands: Sequence[fx.Node]) -> None:
        super().__init__()
        self.rewrite = rewrite
        self.origin = origin
        # Values are kept, so that no other gets the number of one.
        self.known: dict[int, tuple[Any, fx.Node]] = {}
        for node in operands:
            value = node.meta["val"]
            for item in value if isinstance(value, tuple | list) else [value]:
                if isinstance(item, torch.Tensor):
                    self.known[id(item)] = item, node

    def node_of(self, value: Any) -> fx.Node:
        """The node of a tensor that an operator within gave.

        Raises:
            NeedsTracing: there is none.
        """
        if id(value) not in self.known:
            raise NeedsTracing(f"{self.origin.name} gives a {type(value).__name__} of its own")
        return self.known[id(value)][1]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.maybe_aliasing_or_mutating in function.tags or function is aten.native_batch_norm.default:
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if function._schema.is_mutable:
            raise NeedsTracing(f"{self.origin.name} is made of {function}")
        result = function(*args, **kwargs)
        if not isinstance(result, torch.Tensor | tuple | list):
            return result  # about an operand: its device, a size
        graph = self.rewrite.graph
        places, named = torch.utils._pytree.tree_map(self._operand, (tuple(args), kwargs))
        node = graph.create_node("call_function", function, places, named, name=function._overloadpacket.__name__)
        node.meta = {**self.origin.meta, "val": result}
        if isinstance(result, torch.Tensor):
            self.known[id(result)] = result, node
            return result
        for index, item in enumerate(result):
            part = graph.call_function(operator.getitem, (node, index))
            part.meta = {**self.origin.meta, "val": item}
            self.known[id(item)] = item, part
        return result

    def _operand(self, value: Any) -> Any:
        return self.node_of(value) if isinstance(value, torch.Tensor) else self.rewrite.size(value)


def _composite(target: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd") or (
        torch._C.DispatchKey.CompositeImplicitAutograd in target.py_kernels
    )


def _writes_first(node: fx.Node) -> bool:
    """Whether an operator writes into its first operand, into nothing else, and returns it."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._opname.endswith("_"):
        return False
    writes = [item.name for item in node.target._schema.arguments if item.alias_info and item.alias_info.is_write]
    return writes == [node.target._schema.arguments[0].name] and isinstance(node.args[0], fx.Node)


def _is_new(node: fx.Node) -> bool:
    """Whether a node's tensor has memory that it shares with no operand."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not _may_alias(node.target)
        and len(node.target._schema.returns) == 1
    )


def _names(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for one tensor by writing into it, in order: what made it is the first."""
    while _writes_first(node):
        node = node.args[0]  # type: ignore[assignment]
    names = [node]
    for name in names:
        names += [user for user in name.users if _writes_first(user) and user.args[0] is name]
    return names


def _is_only_read(node: fx.Node) -> bool:
    """Whether no user of a tensor gives it another name, besides the operators that write into it."""
    return all(
        user.op == "output"
        or _writes_first(user)
        or (isinstance(user.target, torch._ops.OpOverload) and not _may_alias(user.target))
        for user in node.users
    )


def _may_alias(target: torch._ops.OpOverload) -> bool:
    """Whether a result may have an operand's memory."""
    schema = target._schema
    return any(item.alias_info is not None for item in (*schema.arguments, *schema.returns)) or (
        torch.Tag.maybe_aliasing_or_mutating in target.tags
    )

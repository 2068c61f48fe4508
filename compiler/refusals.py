"""What cannot be compiled, found in an exported program before any pass runs, and how to say where it is.

Refused are training mode, inputs that the model writes into, control flow and sizes that depend on data.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..runtime.errors import SourceError, UnsupportedOperator

_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_ASSERTIONS = ("aten::_assert_scalar", "aten::_assert_tensor_metadata", "aten::_assert_async")


def where(node: fx.Node) -> str:
    """A node with its module path and the innermost line of code outside PyTorch that made it."""
    text = f"{node.name} ({node.target})"
    stack = node.meta.get("nn_module_stack") or {}
    path = [entry[0] for entry in stack.values() if entry[0]]
    if path:
        text += f" in {path[-1]}"
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if is_users(frame[0])] or frames
    if own:
        text += f", {short_path(own[-1][0])}:{own[-1][1]}"
    return text


def is_users(filename: str) -> bool:
    """Whether a source file belongs neither to PyTorch nor to this compiler."""
    return not filename.startswith(_FOREIGN) and not filename.startswith("<")


def short_path(filename: str) -> str:
    """A source file's path, relative to the folder of packages it is installed in."""
    return re.split(r"site-packages[/\\]", filename)[-1]


def refuse_training(graph: fx.Graph) -> None:
    """Refuse a graph with dropout or batch statistics.

    Raises:
        SourceError: names the first such node.
    """
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for position, argument in enumerate(schema.arguments):
            if argument.name not in ("train", "training", "dropout_p"):
                continue
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if argument.name == "training" and "batch_norm" in schema.name and node.args[3:4] == (None,):
                continue  # statistics of the instance by definition, not of a training batch
            if isinstance(value, bool | float) and value:
                raise SourceError(
                    f"the program was exported in training mode ({where(node)}); call module.eval() before exporting "
                    f"or compiling"
                )


def refuse_unsupported(exported: ExportedProgram) -> None:
    """Refuse what no pass or kernel can help with, all of it at once.

    Raises:
        SourceError: the model writes into an input.
        UnsupportedOperator: control flow, or sizes that depend on data.
    """
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise SourceError(
                f"the model writes into its input {spec.target!r}; compiled models leave inputs alone: work on a copy "
                f"(x = x.clone()) or return the new value"
            )
    problems = []
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            problems.append(f"{where(node)}: control flow cannot be compiled; use torch.where or separate entry points")
        elif node.op == "call_function" and not is_assertion(node) and _creates_unbacked(node):
            problems.append(
                f"{where(node)}: the size of its result depends on data; rewrite it with a size that follows from the "
                f"inputs' shapes, such as a mask"
            )
    if problems:
        raise UnsupportedOperator("the model cannot be compiled:\n" + "\n".join(f"  {problem}" for problem in problems))


def _creates_unbacked(node: fx.Node) -> bool:
    """Whether a node's value has a data-dependent size that none of its operands has."""
    own = _unbacked(node.meta.get("val"))
    return bool(own - set().union(*(_unbacked(operand.meta.get("val")) for operand in node.all_input_nodes)))


def _unbacked(value: Any) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            found |= set(free_unbacked_symbols(leaf))
    return found


def check_output(node: fx.Node) -> None:
    """Refuse an output that is neither a tensor nor an integer size.

    Raises:
        UnsupportedOperator: says what it is.
    """
    value = node.meta.get("val")
    if isinstance(value, torch.SymFloat | torch.SymBool):
        raise UnsupportedOperator(
            f"{where(node)}: an output is a {'fraction' if isinstance(value, torch.SymFloat) else 'truth value'} "
            f"computed from sizes; return a tensor or the integer size"
        )


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only checks something while the program runs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _ASSERTIONS


def asserted_conditions(graph: fx.Graph) -> list[sympy.Basic]:
    """The conditions of the graph's assertions over sizes.

    Raises:
        UnsupportedOperator: an assertion about a tensor's value.
    """
    conditions: list[sympy.Basic] = []
    for node in graph.nodes:
        if not is_assertion(node) or node.target._schema.name == "aten::_assert_tensor_metadata":
            continue
        condition = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else node.args[0]
        if isinstance(condition, torch.SymBool):
            conditions.append(condition.node.expr)
        elif isinstance(condition, torch.Tensor):
            raise UnsupportedOperator(
                f"{where(node)}: the program checks a tensor's value at run time; remove the check"
            )
    return conditions

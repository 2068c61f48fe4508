"""A graph as text: one line per node, the same text for the same graph, made to be read and compared.

    main(x: f32[batch, 8]), batch in 1..64
      %weight : f32[8, 8] = constant "layer.weight"
      %linear : f32[batch, 8] = aten.linear(%x, %weight)
      return %linear

Dimensions carry the names that users gave them. A region is printed with its body indented below it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from .program import Program
from .regions import body, is_region

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
# Where an operator's value lives is no part of the program before lowering: left out where it says nothing.
_SILENT = {"pin_memory": (None, False), "layout": (None, torch.strided), "device": (None, torch.device("cpu"))}

Names = Mapping[sympy.Symbol, str]


def show(program: Program | fx.GraphModule) -> str:
    """The text of a program, or of a graph module alone (whose symbols then keep their internal names)."""
    if isinstance(program, fx.GraphModule):
        return "\n".join(["graph", *_lines(program, {}, {}, "  ")]) + "\n"
    names = {symbol: entry.name for symbol, entry in program.symbols.items()}
    labels = {entry.placeholder: f'input "{entry.name}"' for entry in program.inputs}
    labels.update({entry.placeholder: f'state "{entry.name}"' for entry in program.states})
    ranges = sorted((entry.name, entry.minimum, entry.maximum) for entry in program.symbols.values())
    head = ", ".join([program.name, *(f"{name} in {low}..{high}" for name, low, high in ranges)])
    return "\n".join([head, *_lines(program.module, names, labels, "  ")]) + "\n"


def show_type(value: Any, names: Names | None = None) -> str:
    """The type of a node's value, such as ``f32[batch, 768]``; several values are joined in parentheses."""
    names = names or {}
    if isinstance(value, torch.Tensor):
        return f"{show_dtype(value.dtype)}[{', '.join(show_size(size, names) for size in value.shape)}]"
    if isinstance(value, torch.SymInt):
        return f"size {show_size(value, names)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(show_type(item, names) for item in value)})"
    return "none" if value is None else type(value).__name__


def show_dtype(dtype: torch.dtype) -> str:
    """The short name of a dtype, such as ``bf16``."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def show_size(size: Any, names: Names | None = None) -> str:
    """A dimension with its symbols by the names that users gave them."""
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(size)
    expression = size.node.expr
    renamed = {symbol: sympy.Symbol(name, integer=True) for symbol, name in (names or {}).items()}
    return str(expression.xreplace(renamed))


def show_operator(target: Any) -> str:
    """An operator's name; the overload is named where it is not the default one."""
    if isinstance(target, torch._ops.OpOverload):
        return re.sub(r"\.default$", "", str(target))
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", "").lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}".removeprefix("builtins.")


def _lines(module: fx.GraphModule, names: Names, labels: Mapping[str, str], indent: str) -> list[str]:
    lines: list[str] = []
    for node in module.graph.nodes:
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            lines.append(f"{indent}return {', '.join(_argument(item, names) for item in results)}")
            continue
        kind = f" : {show_type(node.meta['val'], names)}" if "val" in node.meta else ""
        lines.append(f"{indent}%{node.name}{kind} = {_expression(node, names, labels)}{_annotations(node)}")
        if is_region(node):
            lines[-1] += " {"
            lines.extend(_lines(body(node), names, {}, indent + "    "))
            lines.append(f"{indent}}}")
    return lines


def _expression(node: fx.Node, names: Names, labels: Mapping[str, str]) -> str:
    if node.op == "placeholder":
        return labels.get(node.name, "operand")
    if node.op == "get_attr":
        return f'constant "{node.meta.get("source", node.target)}"'
    if node.target is operator.getitem:
        return f"{_argument(node.args[0], names)}[{_argument(node.args[1], names)}]"
    arguments = [_argument(item, names) for item in node.args]
    for key, value in node.kwargs.items():
        if value not in _SILENT.get(key, ()):
            arguments.append(f"{key}={_argument(value, names)}")
    if is_region(node):
        region = node.meta["region"]
        title = " ".join(filter(None, (region.kind, region.family, str(node.target))))
    else:
        title = show_operator(node.target)
    return f"{title}({', '.join(arguments)})"


def _argument(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    if isinstance(value, slice):
        return ":".join(
            "" if part is None else _argument(part, names) for part in (value.start, value.stop, value.step)
        )
    if isinstance(value, torch.dtype):
        return show_dtype(value)
    if isinstance(value, torch.SymInt):
        return show_size(value, names)
    return repr(value) if isinstance(value, str) else str(value)


def _annotations(node: fx.Node) -> str:
    """How the results lie in memory, where not in rows."""
    layouts = node.meta.get("layouts", ())
    return f" as {', '.join(layouts)}" if any(layout != "rows" for layout in layouts) else ""

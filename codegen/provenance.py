"""Where a kernel comes from: graph nodes, the module path in the model, and the line of the model's source."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from torch import fx

from ..passes.graph.regions import body, is_region
from ..runtime.plan import Origin
from .registry import find_lowering

_OWN = Path(__file__).parents[1]
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in')


def origin_of(node: fx.Node) -> Origin:
    """Provenance from a node's meta, with paths relative to the package that they belong to.

    A region stands for several nodes: it is named after the one that does the work, its anchor, else after the first
    that knows its module.
    """
    names = tuple(node.meta.get("from", [node.name]))
    if is_region(node):
        inside = [inner for inner in body(node).graph.nodes if inner.op == "call_function"]
        known = [inner for inner in inside if inner.meta.get("nn_module_stack") or inner.meta.get("onnx_node")]
        anchors = [inner for inner in known if (found := find_lowering(inner.target)) is None or found.role == "anchor"]
        node = (anchors or known or [node])[0]
    stack = node.meta.get("stack_trace") or ""
    frames = _FRAME.findall(stack)
    source = f"{relative_path(frames[-1][0])}:{frames[-1][1]}" if frames else ""
    module = str(node.meta.get("onnx_node") or module_path(node.meta.get("nn_module_stack")))
    return Origin(names, module, source)


def module_path(stack: Any) -> str:
    """The dotted path of the innermost module that a node was traced in."""
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return str(path).removeprefix("L['self'].").removeprefix("L['self']").lstrip(".")


@functools.cache
def relative_path(file: str) -> str:
    """A source path as its module is imported: the same on every machine, from a checkout and from an installation.

    A file that belongs to no package is its name alone.
    """
    path = Path(file)
    for anchor in ("site-packages", "dist-packages"):
        if anchor in path.parts:
            return "/".join(path.parts[path.parts.index(anchor) + 1 :])
    if path.is_relative_to(_OWN):
        return f"tilewright/{path.relative_to(_OWN).as_posix()}"
    top = path.parent
    while top.parent != top and (top / "__init__.py").is_file():
        top = top.parent
    return path.relative_to(top).as_posix()

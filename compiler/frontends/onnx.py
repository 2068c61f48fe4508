"""ONNX files: a module that interprets the nodes with torch calls, which ``torch.export`` then traces.

Shape arithmetic becomes symbolic sizes by itself, and one importer path serves PyTorch and ONNX. Every node runs as a
submodule, so the traced operations carry the ONNX node's name as their module path (``nodes.<node name>``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
import torch
from google.protobuf.message import DecodeError

from ...runtime.errors import ShapeError, SourceError, TilewrightError, UnsupportedOperator
from . import onnx_ops as _operators
from .onnx_ops.graph import GraphBody, OnnxNode, domain_of
from .onnx_ops.host import LIMIT
from .onnx_ops.registry import OPERATORS, as_tensor, host_function, lookup
from .onnx_ops.tensors import WeightFiles, torch_dtype

__all__ = ["OnnxModule", "Unsupported", "load_onnx", "unsupported"]
assert _operators  # importing the package fills the operator table
_MAX_INLINING = 8  # function bodies within function bodies


@dataclass(frozen=True)
class Unsupported:
    """A node that cannot be compiled, why, and what to do."""

    node: str
    op_type: str
    domain: str
    opset: int
    reason: str
    remedy: str

    def __str__(self) -> str:
        operator = f"{self.domain}.{self.op_type}" if self.domain else self.op_type
        return f"{self.node}: {operator} (opset {self.opset}): {self.reason}; {self.remedy}"


class OnnxModule(GraphBody):
    """An ONNX graph as a module: ``forward(*inputs)`` in graph order gives a dict of output name to tensor.

    Attributes:
        input_names: names of the inputs, in order.
        input_specs: input name → (element type, one size per axis: an int, or a name where it varies).
        output_names: names of the outputs, in order.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        super().__init__(model.graph, {domain_of(entry.domain): entry.version for entry in model.opset_import})
        self.path = path
        self.input_names = self.inputs
        self.output_names = self.outputs
        by_name = {value.name: value for value in model.graph.input}
        self.input_specs = {name: _spec(path, by_name[name]) for name in self.inputs}
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the graph.

        Raises:
            SourceError: another number of inputs than the graph has.
            ShapeError: an input of another rank, or sizes of one name that differ.
            UnsupportedOperator: while exporting, sizes that depend on the data of the inputs.
            CompileError: a node fails; names it.
        """
        if len(inputs) != len(self.input_names):
            raise SourceError(
                f"{self.path} takes {len(self.input_names)} inputs {list(self.input_names)}, got {len(inputs)}"
            )
        if torch.compiler.is_exporting():
            _raise_all(self.path, list(_data_dependent(self)))
        self._check_shapes(inputs)
        results = self.run({}, inputs)
        for name, result in zip(self.output_names, results, strict=True):
            if result is None or isinstance(result, list):
                raise UnsupportedOperator(
                    f"output {name!r} of {self.path} is a sequence or empty; only tensors can be outputs"
                )
        return {name: as_tensor(result) for name, result in zip(self.output_names, results, strict=True)}

    def _check_shapes(self, inputs: Sequence[torch.Tensor]) -> None:
        """Ranks, and that sizes of one name are equal; while exporting this makes them one symbol from the start on."""
        first: dict[str, tuple[str, int, Any]] = {}
        for (name, (_, sizes)), tensor in zip(self.input_specs.items(), inputs, strict=True):
            if tensor.dim() != len(sizes):
                raise ShapeError(f"input {name!r} of {self.path} has {len(sizes)} axes, got {tensor.dim()}")
            for axis, (label, size) in enumerate(zip(sizes, tensor.shape, strict=True)):
                if isinstance(label, int):
                    continue
                other, place, known = first.setdefault(label, (name, axis, size))
                if size != known:
                    raise ShapeError(
                        f"axis {axis} of input {name!r} and axis {place} of input {other!r} of {self.path} are both "
                        f"{label!r}, but have sizes {size} and {known}"
                    )


def load_onnx(path: Path) -> OnnxModule:
    """The model in an ONNX file, ready to run or to export; external data is memory-mapped.

    Raises:
        SourceError: not an ONNX model, or one that this version cannot read.
        UnsupportedOperator: lists every node that cannot be compiled.
        ArtifactError: external data that is missing, truncated or outside the model's folder.
    """
    module = _read(Path(path))
    _raise_all(module.path, list(_missing(module)))
    module.load(WeightFiles(module.path.parent))
    return module


def unsupported(path: Path) -> list[Unsupported]:
    """Every node of an ONNX file that cannot be compiled; reads no weights.

    Raises:
        SourceError: not an ONNX model.
    """
    module = _read(Path(path))
    return [*_missing(module), *_data_dependent(module)]


def _read(path: Path) -> OnnxModule:
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except DecodeError:
        raise SourceError(f"{path}: not an ONNX model (it is no protobuf message), or truncated") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    if not model.graph.output or not model.opset_import:
        raise SourceError(f"{path}: not an ONNX model (it has no graph with outputs)")
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if not domain_of(entry.domain) and entry.version > newest:
            raise SourceError(
                f"{path}: opset {entry.version} is newer than {newest}, the newest known; export with an older one"
            )
    model = _inlined(path, model)
    _check_names(path, model.graph, set())
    try:
        return OnnxModule(model, path)
    except TilewrightError as error:
        raise type(error)(f"{path}: {error}") from None


def _inlined(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions: its own, and operators that ONNX defines by others and that we do not implement."""
    if not model.functions and not _defined_by_others(model):
        return model
    # the inliner copies the whole message, so weights are taken out for its run
    weights = {
        init.name: init.raw_data
        for init in model.graph.initializer
        if init.HasField("raw_data") and len(init.raw_data) > 4096
    }
    for init in model.graph.initializer:
        if init.name in weights:
            init.ClearField("raw_data")
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        expand = onnx.inliner.inline_selected_functions
        able = "inline_schema_functions" in inspect.signature(expand).parameters  # not in old releases of onnx
        for _ in range(_MAX_INLINING):
            names = _defined_by_others(model)
            if not names or not able:
                break
            _declare_constants(model.graph)
            model = onnx.shape_inference.infer_shapes(model)  # some definitions depend on types
            model = expand(model, names, inline_schema_functions=True)
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"{path}: the model's functions cannot be expanded: {str(error).splitlines()[0]}") from None
    for init in model.graph.initializer:
        if init.name in weights:
            init.raw_data = weights[init.name]
    return model


def _declare_constants(graph: onnx.GraphProto) -> None:
    """Types of initializers among the declared values, where the inliner looks for them."""
    known = {value.name for value in (*graph.input, *graph.value_info)}
    graph.value_info.extend(
        onnx.helper.make_tensor_value_info(init.name, init.data_type, init.dims)
        for init in graph.initializer
        if init.name not in known
    )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g)


def _defined_by_others(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Operators to be replaced by their definitions; spells out their attributes' defaults."""
    opsets = {domain_of(entry.domain): entry.version for entry in model.opset_import}
    found = set()
    for node in _all_nodes(model.graph):
        domain = domain_of(node.domain)
        version = opsets.get(domain, 1)
        if (
            node.op_type == "Constant"
            or lookup(domain, node.op_type, version)
            or not onnx.defs.has(node.op_type, version, domain)
        ):
            continue
        schema: Any = onnx.defs.get_schema(node.op_type, version, domain)
        if schema.has_function or schema.has_context_dependent_function:
            found.add((domain, node.op_type))
            given = {attribute.name for attribute in node.attribute}
            # the inliner leaves a function's reference to an attribute that a node does not spell out unresolved
            node.attribute.extend(
                attribute.default_value
                for name, attribute in schema.attributes.items()
                if name not in given and attribute.default_value.name
            )
    return sorted(found)


def _check_names(path: Path, graph: onnx.GraphProto, outer: set[str]) -> None:
    """Every name that is read has been made before."""
    known = outer | {value.name for value in graph.input} | {init.name for init in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise SourceError(
                    f"{path}: ONNX node {node.name!r} ({node.op_type}) reads {name!r}, which nothing before it makes"
                )
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _check_names(path, attribute.g, known)
        known |= set(node.output)
    for value in graph.output:
        if value.name not in known:
            raise SourceError(f"{path}: nothing makes the output {value.name!r}")


def _spec(path: Path, value: onnx.ValueInfoProto) -> tuple[torch.dtype, tuple[int | str, ...]]:
    """Element type and sizes of an input; a size without a name gets one."""
    if not value.type.HasField("tensor_type"):
        raise SourceError(f"input {value.name!r} is no tensor; only tensors are supported")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise SourceError(f"input {value.name!r} has no shape, not even a rank; export it with one")
    sizes: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        known = dim.HasField("dim_value") and dim.dim_value >= 0
        sizes.append(dim.dim_value if known else dim.dim_param or f"{value.name}_{axis}")
    return torch_dtype(tensor.elem_type), tuple(sizes)


def _every_step(body: GraphBody) -> Iterator[OnnxNode]:
    for step in body.steps:
        yield step
        for inner in step.bodies().values():
            yield from _every_step(inner)


def _missing(module: OnnxModule) -> Iterator[Unsupported]:
    """Operators without an implementation, or used in a way that has none."""
    for step in _every_step(module):
        found = step.implementation
        if found is None:
            newer = [
                known.since for known in OPERATORS.get((step.domain, step.op_type), ()) if known.since > step.opset
            ]
            reason = "this operator is not supported"
            remedy = "export without it, or ask for it with the model's exporter and version"
            if newer:
                reason = f"this operator is supported from opset {min(newer)} on"
                remedy = "export with a newer opset, or convert the file with onnx.version_converter"
            yield _finding(step, reason, remedy)
        elif found.refuse and (refused := found.refuse(step)):
            yield _finding(step, f"not supported: {refused}", "change the model or export it without this")


def _finding(step: OnnxNode, reason: str, remedy: str) -> Unsupported:
    return Unsupported(step.label, step.op_type, step.domain, step.opset, reason, remedy)


def _data_dependent(module: OnnxModule) -> Iterator[Unsupported]:
    """Nodes whose output size, axes or branch depends on the data of the model's inputs."""
    yield from _walk(module, set(module.inputs))


def _walk(body: GraphBody, data: set[str]) -> Iterator[Unsupported]:
    """``data`` names values that are known only at run time; shapes and what follows from them are not among them."""
    data |= {name for name, shape in body.constants.items() if _count(shape) > LIMIT}
    constants = set(body.constants)
    for step in body.steps:
        found, read = step.implementation, [name for name in step.inputs if name in data]
        needed = [] if found is None else [step.inputs[i] for i in found.host if i < len(step.inputs)]
        late = [
            name for name in (step.inputs if found and found.late else needed) if name in data and name not in constants
        ]
        if late:
            names = ", ".join(repr(name) for name in late)
            reason = f"needs {names} when compiling, but it depends on the data of the model's inputs"
            yield _finding(step, reason, "make it a constant, or derive it from shapes")
        if step.op_type in ("If", "Loop") and not step.domain:
            deciding = step.inputs[:1] if step.op_type == "If" else step.inputs[:2]
            if any(name in data for name in deciding):
                reason = "which way it goes depends on the data of the model's inputs"
                yield _finding(
                    step, reason, "export with the condition fixed, for example by tracing instead of scripting"
                )
                data |= set(step.outputs)
            continue  # what its subgraphs make may well be sizes
        shapes_only = not step.domain and step.op_type in ("Shape", "Size", "SequenceLength", "OptionalHasElement")
        computable = host_function(step.domain, step.op_type) is not None or step.op_type.startswith(
            ("Sequence", "Optional")
        )
        if not shapes_only and (read or not computable):
            data |= set(step.outputs)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _raise_all(path: Path, findings: list[Unsupported]) -> None:
    if findings:
        lines = "\n".join(f"  {finding}" for finding in findings)
        raise UnsupportedOperator(f"{path} uses {len(findings)} operator(s) that cannot be compiled:\n{lines}")

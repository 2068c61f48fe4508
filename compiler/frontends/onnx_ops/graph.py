"""The interpreter: ONNX nodes as modules that call torch, so that an export records which node made what."""

from __future__ import annotations

import dataclasses
import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ....runtime.errors import CompileError, SourceError, TilewrightError, UnsupportedOperator
from .host import DTYPES as HOST_DTYPES
from .host import LIMIT, DataDependent, Host, NotOnHost
from .registry import Value, as_tensor, host_function, lookup
from .tensors import WeightFiles, inline_tensor, torch_dtype

_KEY = "\0"  # before a buffer's path among the values in scope; no ONNX name starts with it
_CONSTANTS = ("value", "value_float", "value_int", "value_floats", "value_ints")


def domain_of(name: str) -> str:
    """The standard domain has two spellings."""
    return "" if name == "ai.onnx" else name


class OnnxNode(nn.Module):
    """One node. Calling it with the values in scope adds its outputs to them.

    Attributes:
        name: the node's own name, or one made from its operator and first output.
        scope: the module that the exporter says it came from, where it says so.
        implementation: the entry of the operator table, or None.
    """

    def __init__(self, proto: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
        super().__init__()
        self.op_type, self.domain = proto.op_type, domain_of(proto.domain)
        self.name = proto.name or f"{proto.op_type}_{next((name for name in proto.output if name), 'unnamed')}"
        self.scope = _scope(proto)
        self.opset = opsets.get(self.domain, 1)
        self.inputs, self.outputs = tuple(proto.input), tuple(proto.output)
        while self.outputs and not self.outputs[-1]:  # absent optional outputs
            self.outputs = self.outputs[:-1]
        self.implementation = lookup(self.domain, self.op_type, self.opset)
        self.attributes: dict[str, Any] = {}
        for attribute in proto.attribute:
            self.attributes[attribute.name] = self._decode(attribute, opsets)

    def _decode(self, attribute: onnx.AttributeProto, opsets: Mapping[str, int]) -> Any:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.GraphProto):
            body = GraphBody(value, opsets)
            self.add_module(attribute.name, body)
            return body
        if isinstance(value, onnx.TensorProto):
            return _constant_host(inline_tensor(value, torch_dtype(value.data_type))) if _small(value) else None
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, (list, tuple)) or hasattr(value, "append"):
            return [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in value]
        return value

    @property
    def label(self) -> str:
        """The node's name below its scope."""
        return f"{self.scope}/{self.name}" if self.scope else self.name

    def describe(self) -> str:
        """For messages: name and operator."""
        domain = f"{self.domain}." if self.domain else ""
        return f"ONNX node {self.label!r} ({domain}{self.op_type}, opset {self.opset})"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default where it is absent."""
        return self.attributes.get(name, default)

    def bodies(self) -> dict[str, GraphBody]:
        """The subgraphs of control flow, by attribute."""
        return {name: value for name, value in self.attributes.items() if isinstance(value, GraphBody)}

    def forward(self, values: dict[str, Value]) -> None:
        """Compute the outputs and add them to the values in scope."""
        inputs = [values[name] if name else None for name in self.inputs]
        try:
            results = self._evaluate(inputs, values)
        except TilewrightError:
            raise
        except DataDependent as reason:
            raise UnsupportedOperator(f"{self.describe()}: {reason}") from None
        except Exception as error:
            shapes = ", ".join(_show(value) for value in inputs)
            raise CompileError(f"{self.describe()} on {shapes}: {type(error).__name__}: {error}") from error
        if not isinstance(results, tuple):
            results = (results,)
        for name, result in zip(self.outputs, results, strict=False):
            if name:
                values[name] = result

    def _evaluate(self, inputs: list[Any], values: dict[str, Value]) -> Any:
        on_host = host_function(self.domain, self.op_type)
        if on_host is not None and inputs and all(v is None or _plain(v) for v in inputs):
            try:
                return on_host(self, *inputs)
            except NotOnHost:
                pass  # the tensor form below does it
        operator = self.implementation
        if operator is None:
            raise UnsupportedOperator(f"{self.describe()} is not supported")
        if operator.late and not all(isinstance(v, Host) for v in inputs):
            raise DataDependent("the size of its output depends on the data of the model's inputs")
        arguments = [self._argument(position, value) for position, value in enumerate(inputs)]
        return operator.function(self, values, *arguments) if operator.scoped else operator.function(self, *arguments)

    def _argument(self, position: int, value: Any) -> Any:
        assert self.implementation is not None
        if value is None or self.implementation.raw:
            return value
        if position not in self.implementation.host:
            return as_tensor(value)
        if isinstance(value, Host):
            return value
        try:
            return Host.read(value)
        except DataDependent as reason:
            raise DataDependent(
                f"its input {self.inputs[position]!r} must be known when compiling, but {reason}"
            ) from None


class GraphBody(nn.Module):
    """A graph or subgraph: its nodes in order, and its initializers as buffers under their own dotted names.

    Attributes:
        inputs: names of the inputs that are no initializers.
        outputs: names of the outputs.
        constants: shapes of initializers and Constant nodes by name.
    """

    def __init__(self, proto: onnx.GraphProto, opsets: Mapping[str, int]) -> None:
        super().__init__()
        self.nodes = nn.Module()
        self._steps: list[OnnxNode] = []
        # emptied by load, because each message keeps the memory of the whole file alive
        self._constants: dict[str, onnx.TensorProto] = {init.name: init for init in proto.initializer}
        for sparse in proto.sparse_initializer:
            raise SourceError(f"initializer {sparse.values.name!r} is sparse, which is not supported; export it dense")
        for node in proto.node:
            constant = _constant(node)
            if constant is not None:
                self._constants[node.output[0]] = constant
            else:
                step = OnnxNode(node, opsets)
                self._steps.append(step)
                _place_module(self.nodes, step.label, step)
        self.constants = {name: tuple(init.dims) for name, init in self._constants.items()}
        self.inputs = tuple(value.name for value in proto.input if value.name not in self._constants)
        self.outputs = tuple(value.name for value in proto.output)
        self._weights: dict[str, str] = {}  # names to buffers of the outermost graph, by path: that may be a copy
        self._buffers_held: list[str] = []  # in the outermost graph: all of them, of subgraphs too
        self._hosts: dict[str, Host] = {}
        self._release = self._last_uses()

    @property
    def steps(self) -> tuple[OnnxNode, ...]:
        """The nodes in order."""
        return tuple(self._steps)

    def load(self, files: WeightFiles, home: GraphBody | None = None, prefix: str = "") -> None:
        """Read the initializers, of subgraphs too, into buffers of the outermost graph.

        Args:
            files: where external data is.
            home: the outermost graph, if it is not this one.
            prefix: put before the names of the buffers.

        Raises:
            ArtifactError, SourceError: see :class:`WeightFiles`.
        """
        needed = {
            step.inputs[i]
            for step in self._steps
            if step.implementation
            for i in step.implementation.host
            if i < len(step.inputs)
        }
        constants, self._constants = self._constants, {}
        for name, proto in constants.items():
            tensor = files.tensor(proto)
            if tensor.dtype in HOST_DTYPES and (tensor.numel() <= LIMIT or name in needed):
                self._hosts[name] = _constant_host(tensor)
            path = _place_buffer(home or self, prefix + name, tensor)
            self._weights[name] = path
            (home or self)._buffers_held.append(path)
        for step in self._steps:
            for name, body in step.bodies().items():
                body.load(files, home or self, f"{prefix}{step.label}.{name}.")

    def run(self, outer: Mapping[str, Value], inputs: Sequence[Value]) -> list[Value]:
        """Interpret the nodes; values of enclosing graphs are visible."""
        values: dict[str, Value] = dict(outer)
        for path in self._buffers_held:
            values[_KEY + path] = self.get_buffer(path)
        for name, path in self._weights.items():
            tensor = values[_KEY + path]
            assert isinstance(tensor, torch.Tensor)
            host = self._hosts.get(name)
            values[name] = tensor if host is None else dataclasses.replace(host, stored=tensor)
        values.update(zip(self.inputs, inputs, strict=True))
        for step, unused in zip(self._steps, self._release, strict=True):
            step(values)
            for name in unused:
                values.pop(name, None)
        return [values[name] for name in self.outputs]

    def reads(self) -> set[str]:
        """Names that the nodes and outputs read, of subgraphs too."""
        return set(self.outputs).union(
            *({*step.inputs, *(n for b in step.bodies().values() for n in b.reads())} for step in self._steps)
        )

    def _last_uses(self) -> list[list[str]]:
        """Per step, the values that nothing reads afterwards."""
        later = set(self.outputs)
        release: list[list[str]] = []
        for step in reversed(self._steps):
            names = {*step.inputs, *step.outputs, *(name for body in step.bodies().values() for name in body.reads())}
            release.append([name for name in sorted(names - later) if name])
            later |= names
        return release[::-1]


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node as a tensor message, or None for other nodes."""
    if node.op_type != "Constant" or domain_of(node.domain):
        return None
    (attribute,) = [a for a in node.attribute if a.name in _CONSTANTS] or [None]
    if attribute is None:
        raise SourceError(
            f"ONNX node {node.name!r} (Constant) holds neither numbers nor a dense tensor, which is not supported"
        )
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return value
    integers = attribute.name in ("value_int", "value_ints")
    array = np.array(value, dtype=np.int64 if integers else np.float32)
    return onnx.numpy_helper.from_array(array, node.output[0])


def _small(proto: onnx.TensorProto) -> bool:
    return int(np.prod(proto.dims, dtype=np.int64)) <= LIMIT and torch_dtype(proto.data_type) in HOST_DTYPES


def _constant_host(tensor: torch.Tensor) -> Host:
    return Host.of(tensor.flatten().tolist(), tensor.dtype, tensor.shape)


def _scope(proto: onnx.NodeProto) -> str:
    """The module path that torch's exporter leaves in a node's metadata (``: Model/encoder: Encoder/node: op``)."""
    for entry in proto.metadata_props:
        if entry.key == "namespace":
            paths = [part.split(":")[0].strip() for part in entry.value.split("/")[:-1]]
            return next((path for path in reversed(paths) if path), "")
    return ""


def _place_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module so that its dotted path is the name, dots and all."""
    *parents, leaf = [part or "_" for part in name.split(".")]
    for parent in parents:
        if not isinstance(root._modules.get(parent), nn.Module) or isinstance(root._modules[parent], OnnxNode):
            while hasattr(root, parent):
                parent += "_"
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
    while hasattr(root, leaf):
        leaf += "_"
    root.add_module(leaf, module)


def _place_buffer(root: nn.Module, name: str, tensor: torch.Tensor) -> str:
    """Add a buffer under a dotted name, with other punctuation as underscores; returns the name it has.

    No part of it is a Python keyword, because exported graphs are Python code.
    """
    path: list[str] = []
    parts = [part or "_" for part in re.sub(r"[^0-9A-Za-z_.]", "_", name).split(".")]
    *parents, leaf = [f"{part}_" if keyword.iskeyword(part) else part for part in parts]
    for parent in parents:
        if parent not in root._modules or parent == "nodes":
            while hasattr(root, parent):
                parent += "_"
            root.add_module(parent, nn.Module())
        root = root._modules[parent]  # type: ignore[assignment]
        path.append(parent)
    while hasattr(root, leaf):
        leaf += "_"
    root.register_buffer(leaf, tensor)
    return ".".join((*path, leaf))


def _plain(value: Any) -> bool:
    """Whether a value is to be computed with on the host; weights stay tensors, so that they keep their names."""
    if not isinstance(value, Host):
        return False
    return value.stored is None or value.size <= 1 or not value.dtype.is_floating_point


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[str(n) for n in value.shape]}".replace("'", "")
    return f"{value.values}" if isinstance(value, Host) else "nothing" if value is None else type(value).__name__

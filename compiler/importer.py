"""From an ``ExportedProgram`` to a :class:`Program`: the one way into the compiler that all sources share.

The lifted graph is copied into the order that ``passes/graph/program.py`` describes: inputs, states, constants.
Symbols get the names users see, the exporter's assertions leave the graph and become guards, and what cannot be
compiled (training mode, mutated inputs, sizes that depend on data, control flow) is refused here, before any pass runs.
"""

from __future__ import annotations

import keyword
import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..passes.graph.edit import unique_attribute
from ..passes.graph.program import Input, Program, State
from ..runtime.errors import SourceError, UnsupportedOperator
from .decompositions import functional
from .guards import essential, parse_guard
from .refusals import (
    asserted_conditions,
    check_output,
    is_assertion,
    refuse_training,
    refuse_unsupported,
    where,
)
from .shapes import ShapeSpec
from .structure import describe
from .symbols import name_symbols

Identity = tuple[Any, ...]
# The frame of the wrapper that capturing adds: two lines at the start of a stack trace.
_OWN_FRAME = re.compile(r'\A\s*File "' + re.escape(str(Path(__file__).parent)) + r'[^"]*", line .*\n(?:    .*\n?)?')
_KEPT_META = ("val", "stack_trace", "nn_module_stack", "torch_fn", "custom", "onnx_node")


def identity(tensor: torch.Tensor, name: str) -> Identity:
    """What two names of one weight have in common: the same memory, seen the same way (``name`` if there is none)."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (name,)
    pointer = tensor.untyped_storage().data_ptr()
    return pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def weight_names(module: torch.nn.Module) -> dict[Identity, str]:
    """Every parameter and buffer of a module → its first dotted name, so that tied weights have one name."""
    names: dict[Identity, str] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(identity(tensor, name), name)
    return names


def from_exported(
    name: str,
    exported: ExportedProgram,
    *,
    input_names: Sequence[str] | None = None,
    results: Any = None,
    shapes: ShapeSpec | None = None,
    sample: Sequence[torch.Tensor] | None = None,
    weights: Mapping[Identity, str] | None = None,
    strict_ranges: bool = True,
) -> Program:
    """Import an exported program.

    Args:
        name: the entry point's name.
        exported: from ``torch.export``, before or after its decompositions.
        input_names: dotted names of the tensor inputs; by default made from the program's own structure.
        results: result tree over the flat outputs; by default made from the program's own structure.
        shapes: names and ranges of the dynamic axes, by input name.
        sample: one tensor per tensor input; by default the program's example inputs, or made up.
        weights: names to prefer for weights, by identity, so that entry points over one module agree.
        strict_ranges: whether a declared range that the program does not cover is an error (else it is cut).

    Raises:
        SourceError: exported in training mode, mutates an input, or assumes something that sizes cannot satisfy.
        UnsupportedOperator: sizes that depend on data, control flow, or inputs that are no tensors.
        UsageError: a dynamic axis without an upper bound, or declared shapes that do not fit the program.
    """
    names = list(input_names) if input_names is not None else input_names_of(exported)
    refuse_training(exported.graph)
    codes = list(getattr(exported, "_guards_code", ()))
    own_sample = sample is None
    if sample is None and exported.example_inputs is not None:
        args, kwargs = exported.example_inputs
        leaves = pytree.tree_leaves((args, kwargs))
        sample = tuple(leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor))
    if results is None:
        results = _result_tree(exported)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="erase_node")  # PyTorch's own clean-up, of copies between states
        exported = functional(exported)
    refuse_unsupported(exported)
    placeholders = _input_placeholders(exported)
    values = [node.meta["val"] for node in placeholders]
    symbols = name_symbols(
        _shape_env(values), dict(zip(names, values, strict=True)), exported.range_constraints, shapes, strict_ranges
    )
    assumed = asserted_conditions(exported.graph)
    paths = {_flat_name(node.name): node.meta["val"] for node in placeholders}
    for code in codes:
        assumed.extend(parse_guard(code, lambda path, axis: _size_of(paths, path, axis)))
    program = _Import(name, exported, names, weights or {}).build(results)
    program.symbols = symbols
    ranges = {symbol: (bounds.minimum, bounds.maximum) for symbol, bounds in symbols.items()}
    program.guards = essential(assumed, ranges)
    tensors = dict(zip(names, sample if sample is not None else map(made_up, values), strict=True))
    if shapes is not None:
        if own_sample:
            tensors = shapes.fit(tensors)
        shapes.sizes(tensors)
    program.sample = tuple(tensors.values())
    return program


def made_up(value: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A tensor of a value's dtype and example sizes: seeded normal numbers, or zeros and ones for integers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.float32).to(value.dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(value.dtype)


class _Import:
    """One copy of a graph: placeholders first, weights as attributes, one flat output."""

    def __init__(
        self, name: str, exported: ExportedProgram, names: Sequence[str], weights: Mapping[Identity, str]
    ) -> None:
        self.name = name
        self.exported = exported
        self.names = names
        self.weights = weights
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.copies: dict[fx.Node, fx.Node] = {}
        self.constants: dict[Identity, fx.Node] = {}

    def build(self, tree: Any) -> Program:
        signature = self.exported.graph_signature
        nodes = {node.name: node for node in self.exported.graph.nodes if node.op == "placeholder"}
        inputs = []
        for name, old in zip(self.names, _input_placeholders(self.exported), strict=True):
            new = self._placeholder(old, name)
            inputs.append(Input(name, new.name))
        mutated = {spec.target: spec.arg.name for spec in signature.output_specs if spec.kind in _MUTATIONS}
        state_nodes: list[tuple[str, fx.Node, torch.Tensor, str]] = []
        for spec in signature.input_specs:
            if spec.target in mutated and spec.kind is not InputKind.USER_INPUT:
                tensor = self._tensor(spec)
                source = self._source(spec, tensor)
                node = self._placeholder(nodes[spec.arg.name], source)
                state_nodes.append((source, node, tensor, mutated[spec.target]))
        for spec in signature.input_specs:
            if spec.kind in _WEIGHTS and spec.target not in mutated and nodes[spec.arg.name].users:
                self._constant(spec, nodes[spec.arg.name])
        for node in self.exported.graph.nodes:
            if node.op == "call_function" and not is_assertion(node):
                self._copy(node)
            elif node.op not in ("placeholder", "output", "call_function"):
                raise UnsupportedOperator(f"{where(node)}: cannot compile a {node.op} node")

        by_name = {old.name: new for old, new in self.copies.items()}
        outputs: list[Any] = []
        tree = self._results(tree, by_name, outputs)
        states = []
        for source, node, tensor, value in state_nodes:
            states.append(State(source, node.name, len(outputs), tensor))
            outputs.append(by_name[value])
        self.graph.output(tuple(outputs))
        _erase_unused_sizes(self.graph)
        self.graph.lint()
        self.module.recompile()
        return Program(self.name, self.module, tuple(inputs), tuple(states), tree)

    def _results(self, tree: Any, by_name: Mapping[str, fx.Node], outputs: list[Any]) -> Any:
        """The result tree over the new flat outputs: a value that is returned twice is one output."""
        old_outputs = [
            argument
            for argument, spec in zip(
                self.exported.graph.output_node().args[0], self.exported.graph_signature.output_specs, strict=True
            )
            if spec.kind is OutputKind.USER_OUTPUT
        ]

        def walk(part: Any) -> Any:
            (kind, content), *_ = part.items()
            if kind == "constant":
                return part
            if kind == "leaf":
                old = old_outputs[content]
                if not isinstance(old, fx.Node):
                    return {"constant": old}
                node = by_name[old.name]
                if node not in outputs:
                    check_output(node)
                    outputs.append(node)
                return {"leaf": outputs.index(node)}
            if kind == "dict":
                return {"dict": {key: walk(item) for key, item in content.items()}}
            return {kind: [walk(item) for item in content]}

        return walk(tree)

    def _placeholder(self, old: fx.Node, name: str) -> fx.Node:
        new = self.graph.placeholder(flat_identifier(name))
        self._finish(old, new)
        return new

    def _constant(self, spec: Any, old: fx.Node) -> None:
        tensor = self._tensor(spec)
        key = identity(tensor, spec.target)
        if key not in self.constants:
            source = self._source(spec, tensor)
            attribute = unique_attribute(self.module, flat_identifier(source))
            self.module.register_buffer(attribute, tensor)
            node = self.graph.get_attr(attribute)
            node.meta["source"] = source
            self.constants[key] = node
        self._finish(old, self.constants[key])

    def _tensor(self, spec: Any) -> torch.Tensor:
        """The real tensor of a weight, sharing its memory."""
        exported = self.exported
        tensor = exported.state_dict.get(spec.target)
        if tensor is None:
            tensor = exported.constants.get(spec.target)
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedOperator(
                f"the program's constant {spec.target!r} is no tensor but a {type(tensor).__name__}"
            )
        if tensor.device.type != "cpu":
            raise SourceError(f"the weight {spec.target!r} is on {tensor.device}: load the model's weights on the CPU")
        return tensor.detach()

    def _source(self, spec: Any, tensor: torch.Tensor) -> str:
        """The name by which entry points share a weight; a constant of the code belongs to its entry point alone."""
        known = self.weights.get(identity(tensor, spec.target))
        if known is not None:
            return known
        if spec.kind is InputKind.CONSTANT_TENSOR and re.fullmatch(
            r"lifted_tensor_\d+|_tensor_constant\d+", spec.target
        ):
            return f"{self.name}.{spec.target}"
        return spec.target

    def _copy(self, old: fx.Node) -> None:
        # Counters of the exporter's names differ between versions and leave gaps; count afresh.
        args, kwargs = fx.map_arg((old.args, old.kwargs), lambda used: self.copies[used])
        base = re.sub(r"(?<=\D)_\d+$", "", old.name)
        new = self.graph.create_node("call_function", old.target, args, kwargs, name=base)
        self._finish(old, new)

    def _finish(self, old: fx.Node, new: fx.Node) -> None:
        source = new.meta.get("source")
        new.meta = {key: old.meta[key] for key in _KEPT_META if key in old.meta}
        if source is not None:
            new.meta["source"] = source
        if "stack_trace" in new.meta:
            new.meta["stack_trace"] = _OWN_FRAME.sub("", new.meta["stack_trace"] or "").lstrip()
        value = new.meta.get("val")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            with value.fake_mode:  # type: ignore[attr-defined]
                new.meta["val"] = value.detach()
        self.copies[old] = new


_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = tuple(kind for kind in OutputKind if kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION"))


def flat_identifier(name: str) -> str:
    """A dotted name as an identifier."""
    flat = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{flat}" if keyword.iskeyword(flat) or not flat.isidentifier() else flat


def _input_placeholders(exported: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the tensor inputs, in order."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    tensors = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            tensors.append(nodes[spec.arg.name])
        elif spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument):
            raise UnsupportedOperator(
                f"the input {spec.arg.name!r} is a number that varies ({type(spec.arg).__name__}); pass it as a "
                f"tensor, or export the program with a fixed number"
            )
        elif spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise UnsupportedOperator(f"the input {spec.arg.name!r} is no tensor ({spec.kind.name.lower()})")
    return tensors


def input_names_of(exported: ExportedProgram) -> list[str]:
    """Dotted names of the tensor inputs by the program's own structure, as :func:`structure.bind` would give."""
    spec = exported.module_call_graph[0].signature.in_spec
    count = spec.num_leaves
    paths = [path for path, _ in pytree.tree_leaves_with_path(pytree.tree_unflatten(list(range(count)), spec))]
    users = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    names = []
    if len(paths) != len(users):
        return [spec.arg.name for spec in users if isinstance(spec.arg, TensorArgument)]
    for path, user in zip(paths, users, strict=True):
        if not isinstance(user.arg, TensorArgument):
            continue
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        rest = keys[2:]  # the first two say whether the argument is positional, and which
        if keys[0] == "0":  # the parameter's name is what the placeholder's name has before the path
            suffix = "_".join(rest)
            first = user.arg.name[: len(user.arg.name) - len(suffix) - 1] if suffix else user.arg.name
        else:
            first = keys[1]
        names.append(".".join([first, *rest]))
    return names


def _result_tree(exported: ExportedProgram) -> Any:
    """The result tree of the program's own output structure."""
    spec = exported.module_call_graph[0].signature.out_spec
    leaves = [_OutputLeaf(index) for index in range(spec.num_leaves)]
    value = pytree.tree_unflatten(leaves, spec)
    return describe(value, lambda part: part.index if isinstance(part, _OutputLeaf) else None)


class _OutputLeaf:
    def __init__(self, index: int) -> None:
        self.index = index


def _shape_env(values: Sequence[torch.Tensor]) -> ShapeEnv | None:
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None


def _flat_name(path: str) -> str:
    """``L['d']['a'][0]`` and ``d_a_0`` as the same text."""
    return re.sub(r"\W+", "_", path.removeprefix("L"), flags=re.ASCII).strip("_")


def _size_of(values: Mapping[str, torch.Tensor], path: str, axis: int) -> sympy.Expr:
    size = values[_flat_name(path)].shape[axis]
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _erase_unused_sizes(graph: fx.Graph) -> None:
    """Remove the arithmetic over sizes that only assertions used."""
    scalars: Iterable[Any] = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and isinstance(node.meta.get("val"), tuple(scalars)):
            size_target = getattr(node.target, "__module__", "") in (operator.__name__, "_operator", "torch")
            if size_target or str(node.target).startswith("aten.sym_"):
                graph.erase_node(node)

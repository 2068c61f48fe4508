"""Whether a graph still computes what it did: errors per output, the table of tolerances, shapes recomputed.

The error of an output is max|a - b| / max|ref|, in double precision; positions of NaN and infinities must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.errors import CompileError, NumericsError
from .graph.cache_ops import CACHE_APPEND
from .graph.edit import fake_mode, faking, same_size, value_of
from .graph.float_activations import rounds_activations
from .graph.printer import show_operator, show_type
from .graph.program import Program
from .graph.query import attribute, is_assertion
from .graph.regions import body, is_region
from .graph.together import run_together

# The one table of tolerances: the largest error of an output by its dtype. Integers and booleans must be equal.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}

# What a cache in bfloat16 adds to a model that computes in a wider type. Both sides round the same numbers; where their
# last digits differ, one may fall the other way, and a key or value moves by a unit in its last place. Sixteen layers
# of random weights come to 7e-4.
STORED = 4e-3


def run_eager(program: Program) -> tuple[Any, ...]:
    """The outputs on the program's sample inputs; the same random numbers every time, the caller's left untouched.

    Activations of quantized products are not rounded (``float_activations.py``), so that outputs are smooth in what
    passes do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if rounds_activations(program):
            return run_together(program, [program.sample], in_float=True)[0]
        return program.run(program.sample)


def error_of(reference: torch.Tensor, value: torch.Tensor) -> float:
    """max|value - reference| / max|reference|; infinite where shape, dtype, NaN, infinities or integers differ."""
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return float("inf")
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, value) else float("inf")
    if reference.numel() == 0:
        return 0.0
    a, b = reference.detach().double(), value.detach().double()  # float64 is not copied
    difference = float((a - b).abs_().max())
    if isfinite(difference):  # then all numbers are, and nothing has to be looked at apart
        return _relative(difference, float(a.abs().max()))
    finite = reference.isfinite()
    if not torch.equal(reference[~finite].nan_to_num(), value[~finite].nan_to_num()) or not torch.equal(
        reference.isnan(), value.isnan()
    ):
        return float("inf")
    if not bool(value[finite].isfinite().all()):
        return float("inf")
    a, b = reference[finite].double(), value[finite].double()
    if a.numel() == 0:
        return 0.0
    return _relative(float((a - b).abs().max()), float(a.abs().max()))


def _relative(difference: float, scale: float) -> float:
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


def compare(reference: Sequence[Any], values: Sequence[Any]) -> list[float]:
    """The error of every output; sizes and plain values must be equal."""
    if len(reference) != len(values):
        return [float("inf")]
    errors = []
    for a, b in zip(reference, values, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            errors.append(error_of(a, b))
        else:
            errors.append(0.0 if type(a) is type(b) and a == b else float("inf"))
    return errors


# Precisions that are coarser than a model's own types may be, by the type that says how exact they are: products of
# tf32 have the mantissa of float16.
COARSER: dict[str, torch.dtype] = {"tf32": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}


def tolerances_of(program: Program, precision: str = "auto") -> list[float]:
    """The largest error of each output: that of the coarsest floating type on its way, and 0 where it is no float.

    A float32 output of a model that computes in bfloat16 is as exact as bfloat16. A bfloat16 output of one that
    computes in float32 is rounded once, at the end: it may be one unit in the last place of its largest value further
    off. An integer or a boolean that follows from half-precision numbers may be any other (a unit in the last place
    decides a comparison): infinite.

    Args:
        program: before the passes.
        precision: what it was asked to compute in (``--precision``).
    """
    coarsest = _coarsest(program, precision)
    (results,) = program.graph.output_node().args
    assert isinstance(results, tuple | list), "a program returns one flat tuple"
    limits = []
    for item in results:
        value = value_of(item)
        if not isinstance(value, torch.Tensor):
            limits.append(0.0)
        elif value.dtype not in TOLERANCES:
            limits.append(inf if coarsest[item] > TOLERANCES[torch.float32] else 0.0)  # type: ignore[index]
        elif (source := _rounded_at_the_end(item)) is not None:
            limits.append(max(TOLERANCES[torch.float32], coarsest[source]) + torch.finfo(value.dtype).eps)
        else:
            limits.append(max(TOLERANCES[value.dtype], coarsest[item]))  # type: ignore[index]
    return limits


def _rounded_at_the_end(item: Any) -> fx.Node | None:
    """What an output in half precision is converted from, where that has a wider type and is computed."""
    if not isinstance(item, fx.Node) or item.target is not torch.ops.aten._to_copy.default:
        return None
    source = item.args[0]
    assert isinstance(source, fx.Node)
    wider = source.meta["val"].dtype in (torch.float32, torch.float64) and source.op != "placeholder"
    return source if wider and item.meta["val"].dtype in (torch.float16, torch.bfloat16) else None


def _coarsest(program: Program, precision: str) -> dict[fx.Node, float]:
    """The tolerance of the coarsest floating type that each value is computed with, its operands' included."""
    coarsest: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        own = own_tolerance(node, precision)
        coarsest[node] = max([own, *(coarsest[operand] for operand in node.all_input_nodes)], default=0.0)
    return coarsest


def own_tolerance(node: fx.Node, precision: str = "auto") -> float:
    """The tolerance of the coarsest floating type that a node computes with, a region's inside; its operands are exact.

    Args:
        node: of a program, before the passes or after them.
        precision: what it was asked to compute in (``--precision``).
    """
    if node.op in ("placeholder", "get_attr"):
        return 0.0
    least = TOLERANCES[COARSER[precision]] if precision in COARSER else 0.0
    computed = [node]
    if is_region(node):  # its results are those of some of these
        computed = [inner for inner in body(node).graph.nodes if inner.op == "call_function"]
    return max((max(own, least) for one in computed for own in _tolerances(one)), default=0.0)


def _tolerances(node: fx.Node) -> list[float]:
    """Those of the floating types of a value; of a cache the tolerance of what is appended, where that is rounded."""
    if node.target is CACHE_APPEND:
        wide, narrow = (tensor.dtype for tensor in (value_of(node.args[1]), value_of(node.args[0])))
        if TOLERANCES[wide] < TOLERANCES[narrow]:
            return [STORED]
    return [TOLERANCES[dtype] for dtype in _floats(node)]


def _floats(node: fx.Node) -> list[torch.dtype]:
    """The floating types of a value, which may be a tuple."""
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else (value,)
    return [part.dtype for part in parts if isinstance(part, torch.Tensor) and part.dtype in TOLERANCES]


def beyond_tolerance(reference: Sequence[Any], errors: Sequence[float], limits: Sequence[float]) -> list[int]:
    """The indices of the outputs whose error is larger than :func:`tolerances_of` allows."""
    found = [index for index, (error, limit) in enumerate(zip(errors, limits, strict=False)) if not error <= limit]
    return found or ([0] if len(errors) != len(reference) else [])


def check_outputs(
    reference: Sequence[Any], values: Sequence[Any], where: str, limits: Sequence[float] | None = None
) -> list[float]:
    """The errors, if all are within the limits; by default those of the table by the outputs' dtypes.

    Raises:
        NumericsError: names the outputs that are not, their errors and tolerances.
    """
    errors = compare(reference, values)
    if limits is None:
        limits = [TOLERANCES.get(item.dtype, 0.0) if isinstance(item, torch.Tensor) else 0.0 for item in reference]
    failures = beyond_tolerance(reference, errors, limits)
    if failures:
        parts = [f"output {index}: error {errors[index]:.3g}, tolerance {limits[index]:g}" for index in failures]
        raise NumericsError(f"{where}: {'; '.join(parts)}")
    return errors


@contextmanager
def fixed_symbols(program: Program) -> Iterator[None]:
    """Within it no symbol can be specialised or equated with another by what an operator's shape function asks.

    Raises:
        CompileError: inside, where one asks for the number that a symbol stands for in the sample.
    """
    environment = fake_mode(program.graph).shape_env
    if environment is None:
        yield
        return
    evaluate = environment.evaluate_sym_node

    def decide(node: Any, *rest: Any, **named: Any) -> Any:
        if not node.is_bool() and node.expr.free_symbols:
            raise CompileError(f"an operator's shape function takes the size {node.expr} for a number")
        return evaluate(node, *rest, **named)

    environment.evaluate_sym_node = decide  # type: ignore[assignment, method-assign]
    try:
        with environment.suppress_guards():
            yield
    finally:
        del environment.evaluate_sym_node  # the class's own again


def check_structure(program: Program, interface: tuple[Any, ...]) -> None:
    """Lint, the same inputs and outputs as ``interface`` (see :func:`interface_of`), a shape on every value.

    Raises:
        CompileError: says what is wrong with which node.
    """
    module = program.module
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise CompileError(f"the graph is malformed: {error}") from error
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta and not (is_assertion(node) or not node.users):
            raise CompileError(f"node %{node.name} ({show_operator(node.target)}) has no shape")
        if node.op == "call_module" and not is_region(node):
            raise CompileError(f"node %{node.name} calls a module but is no region")
    now = interface_of(program)
    for what, before, after in zip(("inputs", "outputs"), interface, now, strict=True):
        if len(before) != len(after):
            raise CompileError(f"the number of {what} changed from {len(before)} to {len(after)}")
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            if not same_type(old, new):
                raise CompileError(f"{what}[{index}] changed from {show_type(old)} to {show_type(new)}")
    module.recompile()


def interface_of(program: Program) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The fake values of all placeholders and of all outputs."""
    inputs = tuple(node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    results = program.graph.output_node().args[0]
    assert isinstance(results, tuple | list), "a program returns one flat tuple"
    return inputs, tuple(value_of(item) for item in results)


def same_type(a: Any, b: Any) -> bool:
    """Whether two fake values have provably the same shape and the same dtype."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(map(_equal, a.shape, b.shape))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same_type, a, b))
    if isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt):
        return _equal(a, b)
    return type(a) is type(b)


def check_shapes(program: Program) -> None:
    """Recompute the shape of every value from its operands' and compare; regions too. Seconds on deep models.

    Raises:
        CompileError: names the node, its recorded shape and the one it has.
    """
    with fixed_symbols(program):
        _check_shapes(program.module)


def _check_shapes(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output") or is_assertion(node):
            continue
        try:
            value = _recompute(node)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CompileError(f"%{node.name} = {show_operator(node.target)} does not run: {error}") from error
        if not same_type(node.meta["val"], value):
            raise CompileError(
                f"%{node.name} = {show_operator(node.target)} is recorded as {show_type(node.meta['val'])} "
                f"but is {show_type(value)}"
            )


def _recompute(node: fx.Node) -> Any:
    if node.op == "get_attr":
        return attribute(node.graph.owning_module, node.target)
    if node.op == "call_module":
        nested = body(node)
        for operand, placeholder in zip(node.args, nested.graph.find_nodes(op="placeholder"), strict=True):
            if not same_type(value_of(operand), placeholder.meta["val"]):
                raise ValueError(f"operand %{operand} does not fit the region's %{placeholder.name}")
        _check_shapes(nested)
        results = value_of(nested.graph.output_node().args[0])
        return tuple(results) if isinstance(results, list) else results
    assert callable(node.target)
    with faking(node.graph):
        return node.target(*value_of(node.args), **value_of(node.kwargs))


def _equal(a: Any, b: Any) -> bool:
    return same_size(a, b) or statically_known_true(a == b)

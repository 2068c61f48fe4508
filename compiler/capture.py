"""From a PyTorch module and example arguments to a :class:`Program`.

The module is traced by ``torch.export`` through a shallow copy whose ``forward`` takes the tensors of the arguments
one by one and returns the tensors of the result as a flat tuple. So nested arguments, plain values, dataclasses and
model outputs need no registration anywhere, several entry points share one module, and weights keep their names and
their memory.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..passes.graph.program import Program
from ..runtime.errors import SourceError, TilewrightError, UnsupportedOperator, UsageError
from .importer import flat_identifier, from_exported, weight_names
from .refusals import is_users, short_path
from .shapes import ShapeSpec, from_torch, is_dimension_language, parse_shapes
from .states import declare_states
from .structure import Call, bind, describe

__all__ = ["capture", "from_exported"]


def capture(
    name: str,
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    shapes: Any = None,
    *,
    function: str | Callable[..., Any] = "forward",
    made_up: bool = False,
    input_names: Sequence[str] | None = None,
    make: Callable[[Mapping[str, int]], Mapping[str, torch.Tensor]] | None = None,
    states: Sequence[str] = (),
) -> Program:
    """Trace a module into a program.

    Args:
        name: the entry point's name.
        module: in evaluation mode, its weights on the CPU.
        args: example positional arguments.
        kwargs: example keyword arguments.
        shapes: a :class:`ShapeSpec`, a mapping of input name to dimension language, or dimensions as ``torch.export``
            takes them; axes that are not named are fixed at the example's sizes.
        function: the method or submodule to trace, by name, or a callable that uses the module.
        made_up: whether the examples were made up, so that they may be resized to fit ``shapes``.
        input_names: names of the tensor inputs, in place of those that follow from the function's parameters.
        make: inputs to verify with for given values of the symbols, by name.
        states: names of those that are states (:class:`~tilewright.compiler.options.Entry`).

    Raises:
        SourceError: training mode, weights without data, or a forward that fails or cannot be traced.
        UnsupportedOperator: control flow or sizes that depend on data.
        UsageError: arguments or shapes that do not fit the module.
    """
    _check_ready(module)
    call, traced = _entry(module, function)
    bound = bind(call, args, kwargs)
    if input_names is not None:
        bound = replace(bound, tensors=dict(zip(input_names, bound.tensors.values(), strict=True)))
    if not bound.tensors:
        raise UsageError(
            f"the entry point {name!r} has no tensor among its sample arguments; give example inputs (args=, kwargs= "
            f"or --inputs sample.npz)"
        )
    spec = shape_spec(shapes, bound)
    tensors = spec.fit(bound.tensors) if made_up else bound.tensors
    tensors = spec.widen(tensors)
    results: list[Any] = []
    traced.forward = _flat_forward(call, bound, results)
    exported, spec = _export(traced, tuple(tensors.values()), spec, tuple(tensors))
    program = from_exported(
        name,
        exported,
        input_names=tuple(tensors),
        results=results[-1],
        shapes=spec,
        sample=tuple(tensors.values()),
        weights=weight_names(module),
        strict_ranges=False,
    )
    program.make = make
    declare_states(program, states)
    return program


def shape_spec(shapes: Any, bound: Call) -> ShapeSpec:
    """Any accepted form of dynamic shapes as a spec over the call's input names.

    Raises:
        UsageError: shapes that cannot be read or do not follow the arguments.
    """
    if shapes is None:
        return ShapeSpec()
    if isinstance(shapes, ShapeSpec):
        return shapes
    if is_dimension_language(shapes):
        return parse_shapes(shapes)
    return from_torch(bound.spread(shapes), bound.tensors)


def _check_ready(module: nn.Module) -> None:
    if module.training:
        raise SourceError(
            f"the {type(module).__name__} is in training mode, where dropout and batch norm differ from inference; "
            f"call module.eval() before compiling"
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type == "meta":
            raise SourceError(f"the weight {name!r} has no data (it is on the meta device); load the checkpoint first")
        if tensor.device.type != "cpu":
            raise SourceError(
                f"the weight {name!r} is on {tensor.device}; move the module to the CPU with module.cpu()"
            )


def _entry(module: nn.Module, function: str | Callable[..., Any]) -> tuple[Callable[..., Any], nn.Module]:
    """The function to call, bound to a shallow copy of the module (sharing weights), and that copy."""
    traced = copy.copy(module)
    # The copy's forward takes flat tensors, which the module's own hooks do not expect; they run around its real
    # forward.
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(traced, hooks, OrderedDict())
    if function == "forward":
        if not module._forward_hooks and not module._forward_pre_hooks:
            return _rebound(module.forward, module, traced), traced
        return _with_signature(copy.copy(module)._call_impl, module.forward), traced
    if isinstance(function, str):
        target: Any = module
        for part in function.split("."):
            if not hasattr(target, part):
                raise UsageError(f"the {type(module).__name__} has no function or submodule {function!r}")
            target = getattr(target, part)
        function = target
    if isinstance(function, nn.Module):
        submodule = function
        if not any(child is submodule for child in module.modules()):
            raise UsageError("an entry point's module must be the source or one of its submodules")
        return _with_signature(submodule.__call__, submodule.forward), traced
    if not callable(function):
        raise UsageError(f"an entry point needs a method, a submodule or a callable, not a {type(function).__name__}")
    return _rebound(function, module, traced), traced


def _with_signature(call: Callable[..., Any], of: Callable[..., Any]) -> Callable[..., Any]:
    def through(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    through.__signature__ = inspect.signature(of)  # type: ignore[attr-defined]
    return through


def _rebound(function: Callable[..., Any], module: nn.Module, traced: nn.Module) -> Callable[..., Any]:
    """The function, bound to the copy if it is the module's method, so that the exporter records its source lines."""
    if inspect.ismethod(function):
        owner = traced if function.__self__ is module else function.__self__
        return _called_forward(function.__func__).__get__(owner)
    return _called_forward(function)


def _called_forward(function: Any) -> Any:
    """The same function under the code name ``forward``: the exporter keeps stack frames of that name only."""
    if not inspect.isfunction(function) or function.__code__.co_name == "forward":
        return function
    code = function.__code__.replace(co_name="forward")
    same = types.FunctionType(code, function.__globals__, "forward", function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(same)


def _flat_forward(call: Callable[..., Any], bound: Call, results: list[Any]) -> Callable[..., Any]:
    """``call`` with its tensors as flat positional arguments and its tensors and sizes as a flat result."""

    def forward(*tensors: torch.Tensor) -> tuple[Any, ...]:
        args, kwargs = bound.rebuild(tensors)
        outputs: list[Any] = []

        def leaf(value: Any) -> int | None:
            if not isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
                return None
            outputs.append(value)
            return len(outputs) - 1

        results.append(describe(call(*args, **kwargs), leaf))
        return tuple(outputs)

    names: list[str] = []
    for name in map(flat_identifier, bound.tensors):
        while name in names:
            name += "_"
        names.append(name)
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _export(
    module: nn.Module, tensors: tuple[torch.Tensor, ...], spec: ShapeSpec, names: Sequence[str]
) -> tuple[ExportedProgram, ShapeSpec]:
    """``torch.export`` with its failures told in one clear error; also the spec with equal dimensions unified."""
    try:
        try:
            return _torch_export(module, tensors, spec.torch_dims(names), defer=False), spec
        except torch._dynamo.exc.UserError as error:
            if "Constraints violated" not in str(error):
                raise
            equal = _equal_symbols(str(error), spec)
            for symbol, other in equal:
                spec = spec.unified(symbol, other)
            # Sizes in the ranges may break an assumption (a view that needs a multiple of 4): let the runtime check it.
            defer = not equal and "satisfy the generated guard" in str(error)
            if not equal and not defer:
                raise
            return _torch_export(module, tensors, spec.torch_dims(names), defer=defer), spec
    except TilewrightError:
        raise
    except torch._dynamo.exc.UserError as error:
        raise _explained(error, spec) from error
    except GuardOnDataDependentSymNode as error:
        raise UnsupportedOperator(
            f"the model decides on a value inside a tensor{_user_line(error)}; compiled code cannot: use torch.where, "
            f"or make the decision outside the model"
        ) from error
    except Exception as error:
        message = str(error).split("\n\nThe error above occurred")[0].strip() or type(error).__name__
        first = message.splitlines()[0]
        raise SourceError(f"the model cannot be traced{_user_line(error)}: {type(error).__name__}: {first}") from error


def _torch_export(module: nn.Module, tensors: tuple[torch.Tensor, ...], dims: Any, *, defer: bool) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(
            module, tensors, dynamic_shapes=dims, strict=False, prefer_deferred_runtime_asserts_over_guards=defer
        )


def _explained(error: Exception, spec: ShapeSpec) -> TilewrightError:
    """The exporter's constraint violation in terms of the dimension language."""
    message = str(error)
    if "Constraints violated" not in message:
        first = message.strip().splitlines()[0]
        unsupported = "data-dependent" in message or "Dynamic control flow" in message
        return (UnsupportedOperator if unsupported else SourceError)(
            f"the model cannot be traced{_user_line(error)}: {first}"
        )
    body, _, fixes = message.split("\n\nThe error above occurred")[0].partition("Suggested fixes:")
    reasons = [_plain_reason(line.strip(" -")) for line in body.splitlines() if line.startswith("  - ")]
    advice = "; ".join(_in_our_language(fixes, spec))
    return UsageError(
        f"the model does not work for every declared size: {' '.join(dict.fromkeys(reasons))}"
        + (f" Declare {advice}." if advice else "")
    )


def _equal_symbols(message: str, spec: ShapeSpec) -> list[tuple[str, str]]:
    """Pairs of the user's symbols that torch found to be always equal."""
    pairs = re.findall(r"^\s*(\w+) = (\w+)\s*$", message.partition("Suggested fixes:")[2], flags=re.MULTILINE)
    return [(root, symbol) for symbol, root in pairs if symbol in spec.ranges and root in spec.ranges]


def _plain_reason(text: str) -> str:
    text = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", r"\1.shape[\2]", text)
    specialized = re.match(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", text)
    if specialized:
        return f"{specialized[1]!r} is fixed at {specialized[2]} by the model's own code."
    return text


def _in_our_language(fixes: str, spec: ShapeSpec) -> list[str]:
    """``batch = 4*_batch; _batch = Dim('_batch', min=1, max=16)`` as ``4*batch:1..16``."""
    ranges: dict[str, str] = {}
    others: dict[str, str] = {}
    for line in fixes.strip().splitlines():
        symbol, _, value = (part.strip() for part in line.partition("="))
        match = re.match(r"Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", value)
        if match:
            low, high = spec.ranges.get(symbol, (1, 64))
            ranges[symbol] = f"{match[1] or low}..{match[2] or high}"
        else:
            others[symbol] = value
    advice = [f"{symbol} as {symbol}:{bounds}" for symbol, bounds in ranges.items() if symbol in spec.ranges]
    for symbol, value in others.items():
        found = re.search(r"[A-Za-z_]\w*", value)
        root = found[0] if found else value
        bounds = f":{ranges[root]}" if root in ranges else ""
        advice.append(f"{symbol} as {value.replace(root, root.lstrip('_')).replace(' ', '')}{bounds}")
    return advice


def _user_line(error: BaseException) -> str:
    """`` at file:line (source)`` of the innermost frame of an error outside PyTorch and this package."""
    raised = re.findall(r'File "([^"]+)", line (\d+), in', str(error))
    frames = [(frame.filename, frame.lineno, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    frames += [(filename, int(line), "") for filename, line in raised]
    own = [frame for frame in frames if is_users(frame[0])]
    if not own:
        return ""
    filename, number, line = own[-1]
    return f" at {short_path(filename)}:{number}" + (f" ({line})" if line else "")

"""Inputs to verify with: the sample's own, and others of the smallest and of odd larger sizes."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from ..passes.graph.program import Program

MOST_ELEMENTS = 1 << 22  # in all inputs of one verification run together; larger ones take too long in eager PyTorch


def assignments(program: Program) -> list[dict[str, int]]:
    """Sizes to verify at: the sample's, the smallest, and odd larger ones, each within ranges and guards."""
    sample = sample_sizes(program)
    if not program.symbols:
        return [sample]
    kept = state_symbols(program)  # calls outside of sessions have states of the sample's sizes
    smallest, larger = dict(sample), dict(sample)
    for entry in program.symbols.values():
        if entry.name not in kept:
            smallest[entry.name] = entry.minimum
            larger[entry.name] = min(sample[entry.name] * 2 + 1, entry.maximum)
    found = [sample]
    for candidate in (smallest, larger):
        if candidate not in found and _allowed(program, candidate) and _elements(program, candidate) <= MOST_ELEMENTS:
            found.append(candidate)
    return found


def sample_sizes(program: Program) -> dict[str, int]:
    """The symbols' values in the program's sample."""
    values: dict[str, int] = {}
    samples = [(given.placeholder, tensor) for given, tensor in zip(program.inputs, program.sample, strict=True)]
    for placeholder, tensor in (*((state.placeholder, state.initial) for state in program.states), *samples):
        shape = _placeholder(program, placeholder).meta["val"].shape
        for extent, actual in zip(shape, tensor.shape, strict=True):
            if isinstance(extent, torch.SymInt):
                expr = extent.node.expr
                for symbol, entry in program.symbols.items():
                    if expr.free_symbols == {symbol} and entry.name not in values:
                        solved = [value for value in sympy.solve(expr - actual, symbol) if value.is_integer]
                        if solved:
                            values[entry.name] = int(solved[0])
    return values


def state_symbols(program: Program) -> set[str]:
    """Names of the sizes that states have."""
    shapes = [_placeholder(program, state.placeholder).meta["val"].shape for state in program.states]
    used = {symbol for shape in shapes for extent in shape if isinstance(extent, torch.SymInt)
            for symbol in extent.node.expr.free_symbols}  # fmt: skip
    return {entry.name for symbol, entry in program.symbols.items() if symbol in used}


def make_inputs(program: Program, sizes: Mapping[str, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs of the given sizes: made by the source, or of elements of the sample's, so that indices stay legal."""
    if sizes == sample_sizes(program):
        return program.sample
    if program.make is not None:
        made = program.make(sizes)
        return tuple(made[given.name] for given in program.inputs)
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _resample(tensor, shape, generator)
        for tensor, shape in zip(program.sample, _shapes(program, sizes), strict=True)
    )


def _resample(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    count = 1
    for extent in shape:
        count *= extent
    flat = tensor.reshape(-1)
    if not flat.numel():
        return torch.zeros(shape, dtype=tensor.dtype)
    chosen = torch.randint(0, flat.numel(), (count,), generator=generator)
    return flat[chosen].reshape(shape)


def _shapes(program: Program, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    values = {symbol: sizes[entry.name] for symbol, entry in program.symbols.items()}
    return [
        tuple(_number(extent, values) for extent in _placeholder(program, given.placeholder).meta["val"].shape)
        for given in program.inputs
    ]


def _number(extent: object, values: Mapping[sympy.Symbol, int]) -> int:
    return int(extent.node.expr.xreplace(values)) if isinstance(extent, torch.SymInt) else int(extent)  # type: ignore[call-overload]


def _elements(program: Program, sizes: Mapping[str, int]) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in _shapes(program, sizes))


def _allowed(program: Program, sizes: Mapping[str, int]) -> bool:
    values = {symbol: sympy.Integer(sizes[entry.name]) for symbol, entry in program.symbols.items()}
    return all(bool(guard.xreplace(values)) for guard in program.guards)


def _placeholder(program: Program, name: str) -> torch.fx.Node:
    return next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == name)

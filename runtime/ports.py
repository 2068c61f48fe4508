"""What all devices share of a plan's ports: how messages show them, and what a caller gives as ``out``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import sizes
from .errors import UsageError
from .memory import extent
from .plan import Port


def describe(port: Port) -> str:
    """A port as messages show it: ``float32[batch, 384]``."""
    return f"{port.dtype}[{', '.join(map(sizes.show, port.shape))}]"


def given_outputs(out: Any, ports: Sequence[Port]) -> list[Any]:
    """What the caller gives for each output, None where nothing.

    Raises:
        UsageError: an unknown name or the wrong number.
    """
    if isinstance(out, Mapping):
        names = [port.name for port in ports]
        if unknown := [name for name in out if name not in names]:
            raise UsageError(f"out: there is no output {unknown[0]!r}; the outputs are {', '.join(names)}")
        return [out.get(name) for name in names]
    given = list(out) if isinstance(out, list | tuple) else [out]
    if len(given) != len(ports):
        raise UsageError(f"out: the model has {len(ports)} outputs, got {len(given)} arrays")
    return given


def taken_outputs(
    out: Any,
    ports: Sequence[Port],
    shapes: Sequence[tuple[int, ...]],
    inputs: Sequence[Any],
    take: Callable[[Any, Port, tuple[int, ...]], Any],
) -> list[Any]:
    """The caller's memory in the host for the outputs, by position, None where none was given.

    Args:
        out: an array or buffer (for a single output), a sequence of them in the order of the outputs, or a dictionary
            by output name, which may leave some out.
        ports: the outputs.
        shapes: their shapes in this call.
        inputs: that no output may share memory with; C-contiguous.
        take: makes a C-contiguous array or view of what was given for an output of a shape.

    Raises:
        UsageError: an unknown name or the wrong number; memory that is an input's or another output's.
        ShapeError: as ``take`` does.
    """
    tensors: list[Any] = []
    taken = [extent(tensor) for tensor in inputs]
    for value, port, shape in zip(given_outputs(out, ports), ports, shapes, strict=True):
        if value is None:
            tensors.append(None)
            continue
        tensor = take(value, port, shape)
        begin, end = extent(tensor)
        if any(begin < other_end and other_begin < end for other_begin, other_end in taken):
            raise shared_output(port)
        taken.append((begin, end))
        tensors.append(tensor)
    return tensors


def shared_output(port: Port) -> UsageError:
    """The error for an output whose memory is that of something else."""
    return UsageError(f"out: the array for output {port.name!r} shares memory with an input or another output")

"""Operators that make tensors from shapes."""

from __future__ import annotations

from typing import Any

import torch

from .host import Host, NotOnHost
from .registry import Node, as_tensor, operator
from .tensors import torch_dtype


@operator("ConstantOfShape", since=9, host=(0,))
def constant_of_shape(node: Node, shape: Host) -> torch.Tensor:
    """A constant of the given shape, 0 unless a value is given."""
    value = node.get("value")
    if value is None:
        return torch.full(shape.values, 0.0, dtype=torch.float32)
    return torch.full(shape.values, value.item(), dtype=value.dtype)


@operator("Range", since=11, host=(0, 1, 2))
def range_(node: Node, start: Host, limit: Host, delta: Host) -> torch.Tensor:
    """Evenly spaced numbers."""
    first, step = start.item(), delta.item()
    if isinstance(first, int) and isinstance(step, int) and (first, step) == (0, 1):
        return torch.arange(limit.item(), dtype=start.dtype)
    return torch.arange(first, limit.item(), step, dtype=start.dtype)


@operator("EyeLike", since=9, raw=True)
def eye_like(node: Node, x: Any) -> torch.Tensor:
    """Ones on a diagonal, in another matrix's shape."""
    rows, columns = x.shape
    dtype = torch_dtype(node.get("dtype")) if node.get("dtype") is not None else x.dtype
    return (torch.arange(columns) - torch.arange(rows)[:, None] == node.get("k", 0)).to(dtype)


@operator("RandomUniformLike", "RandomNormalLike", "Bernoulli", "Multinomial", refuse=lambda node: "it is random")
@operator("RandomUniform", "RandomNormal", refuse=lambda node: "it is random")
def random(node: Node, *values: Any) -> Any:
    """Refused: a compiled model gives the same output for the same input."""
    raise NotOnHost


@operator("SequenceConstruct", raw=True)
def sequence_construct(node: Node, *values: Any) -> list:
    """A list of tensors."""
    return list(values)


@operator("SequenceEmpty", raw=True)
def sequence_empty(node: Node) -> list:
    """An empty list."""
    return []


@operator("SequenceInsert", raw=True)
def sequence_insert(node: Node, sequence: list, value: Any, position: Any = None) -> list:
    """A list with one more tensor."""
    index = len(sequence) if position is None else _index(position)
    return [*sequence[:index], value, *sequence[index:]]


@operator("SequenceErase", raw=True)
def sequence_erase(node: Node, sequence: list, position: Any = None) -> list:
    """A list with one tensor less."""
    index = -1 if position is None else _index(position)
    index = index + len(sequence) if index < 0 else index
    return sequence[:index] + sequence[index + 1 :]


@operator("SequenceAt", raw=True)
def sequence_at(node: Node, sequence: list, position: Any) -> Any:
    """An element of a list."""
    return sequence[_index(position)]


@operator("SequenceLength", raw=True)
def sequence_length(node: Node, sequence: list) -> Host:
    """Number of tensors in a list."""
    return Host.of([len(sequence)], torch.int64, ())


@operator("ConcatFromSequence", raw=True)
def concat_from_sequence(node: Node, sequence: list) -> torch.Tensor:
    """A list's tensors joined along an axis, or stacked on a new one."""
    tensors = [as_tensor(value) for value in sequence]
    return (torch.stack if node.get("new_axis", 0) else torch.cat)(tensors, node.get("axis"))


@operator("SplitToSequence", raw=True)
def split_to_sequence(node: Node, x: Any, sizes: Any = None) -> list:
    """A list of parts along an axis, of one size, of given sizes, or single slices."""
    x, axis = as_tensor(x), node.get("axis", 0)
    if sizes is None:
        parts = torch.split(x, 1, axis)
        return list(parts) if node.get("keepdims", 1) else [part.squeeze(axis) for part in parts]
    lengths = sizes if isinstance(sizes, Host) else Host.read(sizes)
    return list(torch.split(x, lengths.item() if lengths.rank == 0 else lengths.values, axis))


@operator("Optional", raw=True)
def optional(node: Node, value: Any = None) -> Any:
    """A value that may be absent."""
    return value


@operator("OptionalHasElement", raw=True)
def optional_has_element(node: Node, value: Any = None) -> Host:
    """Whether a value is there."""
    return Host.of([value is not None], torch.bool, ())


@operator("OptionalGetElement", raw=True)
def optional_get_element(node: Node, value: Any) -> Any:
    """The value, which must be there."""
    if value is None:
        raise ValueError("the optional value is empty")
    return value


def _index(position: Any) -> int:
    return int((position if isinstance(position, Host) else Host.read(position)).item())

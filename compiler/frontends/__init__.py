"""Frontends: each turns one kind of source into a module (or exported program) with examples and default shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Loaded:
    """A source, ready to be captured.

    Attributes:
        module: in evaluation mode, weights in place.
        args: example positional arguments.
        kwargs: example keyword arguments.
        shapes: default dynamic shapes: input name → dimension language; None if nothing is dynamic.
        made_up: whether the examples were made up by the frontend, so that they may be resized to fit other shapes.
        input_names: names of the tensor inputs, where the module's parameters do not name them.
        alike: inputs that have the same dimensions by construction: shapes given for one hold for the others.
    """

    module: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shapes: Any = None
    made_up: bool = True
    input_names: tuple[str, ...] | None = None
    alike: tuple[str, ...] = ()

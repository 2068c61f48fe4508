"""Frontends: each turns one kind of source into a module (or exported program) with examples and default shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..options import Entry


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
        entries: entry points to compile, where it is not the module's forward, or not that alone.
        info: what the manifest says about the source beyond what it says about every one.
        files: files to copy into the artifact: path there → path here.
        mapped: files that the module's weights are mapped from.
    """

    module: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shapes: Any = None
    made_up: bool = True
    input_names: tuple[str, ...] | None = None
    alike: tuple[str, ...] = ()
    entries: Mapping[str, Entry] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    mapped: tuple[Path, ...] = ()

"""What a user may ask of a compilation; plain data that the driver and the command line share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..runtime.errors import UsageError

Verify = Literal["off", "final", "passes"]
_VERIFY: tuple[str, ...] = ("off", "final", "passes")


@dataclass(frozen=True)
class Entry:
    """One entry point over the source's weights and state.

    Attributes:
        function: a method or submodule of the source by (dotted) name, such as ``"encode"``, or a callable that uses
            the source's modules; what it computes becomes the entry point.
        args: example positional arguments: tensors, possibly nested in tuples, lists and dicts, and plain values.
        kwargs: example keyword arguments.
        dynamic_shapes: input name → dimensions in the dimension language (``compiler/shapes.py``), or a structure of
            ``torch.export.Dim`` as ``torch.export.export`` takes it.
    """

    function: str | Callable[..., Any] = "forward"
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class CompileOptions:
    """How to compile; everything but the source and its sample inputs.

    Attributes:
        target: targets the artifact holds code for, most specific names as ``doctor`` lists them.
        precision: ``"auto"`` or a floating-point type's name.
        quantize: a quantization recipe's name, or None.
        verify: ``"off"``, ``"final"`` (outputs against eager PyTorch) or ``"passes"`` (every intermediate graph too).
        dump_dir: where to write each pass's graphs, diff and report, or None.
        disable_passes: exact names of passes to leave out.
        stop_after: name of the last pass to run, or None.
    """

    target: tuple[str, ...] = ("cpu",)
    precision: str = "auto"
    quantize: str | None = None
    verify: Verify = "final"
    dump_dir: Path | None = None
    disable_passes: frozenset[str] = field(default_factory=frozenset)
    stop_after: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no later stage could make sense of.

        Raises:
            UsageError: no target, or an unknown verification level.
        """
        if not self.target:
            raise UsageError("no target given: name at least one, such as 'cpu'")
        if self.verify not in _VERIFY:
            raise UsageError(f"unknown verification level {self.verify!r}: choose one of {', '.join(_VERIFY)}")

"""What a user may ask of a compilation; plain data that the driver and the command line share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..passes.graph.quantization import Recipe, read_recipe
from ..runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

Verify = Literal["off", "final", "passes"]
_VERIFY: tuple[str, ...] = ("off", "final", "passes")

PRECISIONS: dict[str, str] = {
    "auto": "the model's own types where the target computes in them, else float32, which loses nothing",
    "fp32": "float32, half-precision models too",
    "tf32": "float32, but products of 10-bit mantissas (GPUs only)",
    "fp16": "float16, accumulated in float32 (GPUs only)",
    "bf16": "bfloat16, accumulated in float32",
}
"""What ``--precision`` may be."""

TASKS: dict[str, str] = {
    "auto": "generate for the checkpoint of a decoder language model that is known, else forward",
    "generate": "the step of a decoder language model over a paged cache, from which text is generated",
    "forward": "what the model's forward computes, for a language model the logits of whole sequences",
}
"""What ``--task`` may be."""

CACHES: dict[str, str] = {
    "auto": "bf16 where the model computes in bfloat16, else fp32",
    "fp32": "float32",
    "bf16": "bfloat16, half the memory",
}
"""What ``--cache`` may be: the type of cached keys and values."""


@dataclass(frozen=True)
class Task:
    """What to make of a source that can be compiled in several ways, and the limits of generation.

    Attributes:
        name: one of :data:`TASKS`.
        cache: one of :data:`CACHES`.
        context: most positions of a sequence; None for the model's own (at most ``LONGEST_CONTEXT``).
        chunk: most tokens of one step, those of all sequences together.
        sequences: most sequences of one step.
    """

    name: str = "auto"
    cache: str = "auto"
    context: int | None = None
    chunk: int = 512
    sequences: int = 64

    LONGEST_CONTEXT: ClassVar[int] = 131072

    def __post_init__(self) -> None:
        """Refuse values that no model could be compiled for.

        Raises:
            UsageError: an unknown task or cache, or limits that are too small.
        """
        if self.name not in TASKS:
            raise UsageError(f"unknown task {self.name!r}: choose one of {', '.join(TASKS)}")
        if self.cache not in CACHES:
            raise UsageError(f"unknown type of cache {self.cache!r}: choose one of {', '.join(CACHES)}")
        if self.context is not None and self.context < 1:
            raise UsageError(f"a context of {self.context} positions holds nothing")
        for what, limit in (("tokens", self.chunk), ("sequences", self.sequences)):
            if limit < 2:
                raise UsageError(f"at most {limit} {what} in a step: give 2 or more")


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
        make: inputs to verify with for given values of the symbols, by input name; where it is missing, elements are
            drawn from the sample's, which is wrong where inputs depend on each other.
        states: inputs that are no inputs but memory which a session keeps (``compiler/states.py``). The new value of
            each is a result: the one of the same dotted name (of a dictionary), or else, of all results the last ones,
            in the order of ``states``. These results are not given out. A state starts as its example argument; one
            whose size varies starts as zeros, and its size is chosen when a session is made.
    """

    function: str | Callable[..., Any] = "forward"
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None
    make: Callable[[Mapping[str, int]], Mapping[str, torch.Tensor]] | None = None
    states: Sequence[str] = ()


@dataclass(frozen=True)
class CompileOptions:
    """How to compile; everything but the source and its sample inputs.

    Attributes:
        target: targets the artifact holds code for, most specific names as ``doctor`` lists them.
        precision: one of :data:`PRECISIONS`.
        quantize: how weights are quantized, a name or a recipe file (``passes/graph/quantization.py``), or None.
        activations: what products with quantized weights are computed with: ``"auto"``, ``"int8"`` or ``"float"``.
        verify: ``"off"``, ``"final"`` (outputs against eager PyTorch) or ``"passes"`` (every intermediate graph too).
        dump_dir: where to write each pass's graphs, diff and report, or None.
        disable_passes: exact names of passes to leave out.
        stop_after: name of the last pass to run, or None.
        ptx: store PTX beside the kernels of the newest architecture, which newer GPUs compile when they load it.
        tune: measure ways of computing CPU kernels on this machine, and keep the fastest.
        task: what to make of the source.
    """

    target: tuple[str, ...] = ("cpu",)
    precision: str = "auto"
    quantize: str | None = None
    activations: str = "auto"
    verify: Verify = "final"
    dump_dir: Path | None = None
    disable_passes: frozenset[str] = field(default_factory=frozenset)
    stop_after: str | None = None
    ptx: bool = False
    tune: bool = False
    task: Task = field(default_factory=Task)

    def __post_init__(self) -> None:
        """Refuse values that no later stage could make sense of.

        Raises:
            UsageError: no target, or an unknown verification level.
        """
        if not self.target:
            raise UsageError("no target given: name at least one, such as 'cpu'")
        if self.verify not in _VERIFY:
            raise UsageError(f"unknown verification level {self.verify!r}: choose one of {', '.join(_VERIFY)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.quantize is not None:
            read_recipe(self.quantize, self.activations)
        elif self.activations != "auto":
            raise UsageError("activations are quantized only where weights are: add --quantize, or leave them out")

    def recipe(self, device: str) -> Recipe | None:
        """Which weights are quantized for a kind of device, and how; None where none is.

        ``auto`` activations stay floating point on a GPU, whose kernels multiply such.
        """
        if self.quantize is None:
            return None
        automatic = "float" if device == "cuda" else "int8"
        return read_recipe(self.quantize, automatic if self.activations == "auto" else self.activations)

    @property
    def products(self) -> str:
        """How GPU kernels multiply float32: ``"ieee"`` or ``"tf32"``."""
        return "tf32" if self.precision == "tf32" else "ieee"

    def check(self, devices: Sequence[str]) -> None:
        """Refuse what the kinds of device cannot do.

        Raises:
            UsageError: a CPU cannot compute in the precision, or there is no GPU to store PTX for.
        """
        if self.ptx and "cuda" not in devices:
            raise UsageError("--ptx is for GPUs, and no target is one; name one, such as cuda:sm_90")
        if "cpu" in devices and self.precision in ("tf32", "fp16"):
            also = " (compile for the GPU alone, into a directory of its own)" if len(devices) > 1 else ""
            raise UsageError(
                f"precision {self.precision!r} is for GPUs, and CPU kernels compute in fp32 or bf16: choose auto, fp32 "
                f"or bf16{also}"
            )

"""The plan: what an artifact executes, as frozen dataclasses stored as JSON.

The code generator writes it and the runtime reads it; there is no third representation. On a CPU the same plan is also
compiled into one C function per entry point (``tw_run_<entry>``), so that the runtime interprets nothing per step; the
JSON then serves binding (inputs, outputs, symbols, checks), inspection, profiling and verification.

Reading validates: every reference resolves, every size is a well-formed expression, every name is an identifier.
"""

# Annotations stay objects (no `annotations` from __future__): reading them costs a process no time then.

from collections.abc import Mapping
from typing import Any, Literal

from . import plan_check, sizes, typed_json
from .errors import ArtifactError
from .records import field, fields_of, frozen
from .sizes import Size

FORMAT_VERSION = 3

DTYPES = tuple(plan_check.ITEM_BYTES)


@frozen
class Symbol:
    """A size that varies between calls: inclusive bounds, and the value of the sample that was compiled with.

    It is read from the shape of ``input`` at ``axis`` as ``(size - offset) // factor`` (the rest must be 0). One with
    a ``state`` (0 or more; ``input`` is -1 then) is the size of that state at ``axis``: it is chosen when the state's
    memory is made, and the same for all calls that share it.
    """

    name: str
    minimum: int
    maximum: int
    sample: int
    input: int
    axis: int
    factor: int = 1
    offset: int = field(default=0, metadata={typed_json.ADDED_LATER: True})
    state: int = field(default=-1, metadata={typed_json.ADDED_LATER: True})


@frozen
class Port:
    """A named tensor at the border: logical shape, C-contiguous."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@frozen
class Check:
    """A relation over symbols that must hold (non-zero), and what to say when it does not."""

    condition: Size
    message: str


@frozen
class Constant:
    """A packed weight under ``key`` in ``weights.safetensors``; shape and layout are those of the packed form.

    ``offset`` counts from the start of the file's data section; ``sources`` names the tensors it was made of.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    sources: tuple[str, ...] = ()


@frozen
class StateBuffer:
    """Memory a session keeps between calls; ``initial`` names the constant it starts as (empty: zeros).

    Sizes may vary with symbols that are read from states; such a state starts as zeros.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    bytes: Size
    initial: str = ""


@frozen
class Buffer:
    """Scratch memory in the arena: ``bytes`` may vary by call.

    ``layout`` is ``"rows"`` (C-contiguous), ``"channels16"`` ([N, ceil(C/16), H, W, 16]) or ``"channels_last"``
    ([N, H, W, C]); ``shape`` is [N, C, H, W] in all of them. The buffer is live from step ``first`` to step ``last``
    inclusive. Its offset is the maximum over ``below`` of their end, rounded up to 64 bytes: any two buffers whose
    lives overlap are ordered by ``below``, directly or through others, so that no sizes can make them overlap.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    layout: str
    bytes: Size
    first: int
    last: int
    below: tuple[int, ...] = ()


COUNTERS = 4096
"""Zeros (int32) that GPU kernels may count in while they run; each leaves them zero."""


@frozen
class Ref:
    """Operand of a kernel: the ``index``-th input, output, state, constant or buffer.

    GPU kernels have two more kinds. ``fault`` is one int32 per step, here the step ``index``'s own, that the kernel
    sets to 1 when an index that it loaded is out of range. ``counters`` (index 0) are :data:`COUNTERS` zeros.
    """

    kind: Literal["input", "output", "state", "constant", "buffer", "fault", "counters"]
    index: int


@frozen
class TileConstant:
    """A constant compiled into one binary of a GPU kernel, such as ``BLOCK_M = 128``."""

    name: str
    value: int


@frozen
class Tile:
    """One binary of a GPU kernel: how it cuts its work.

    Attributes:
        name: unique within the kernel, part of the binary's file name, such as ``"128x64x32w4s3"``.
        constants: compiled in; ``units`` of the variant may name them.
        warps: per program.
        stages: of the software pipeline.
        guard: sizes at which it may be used (non-zero).
        architectures: those that it is built for, such as ``("sm_90",)``; empty for all.
    """

    name: str
    constants: tuple[TileConstant, ...]
    warps: int
    stages: int
    guard: Size = 1
    architectures: tuple[str, ...] = ()

    def values(self) -> dict[str, int]:
        """The constants by name."""
        return {constant.name: constant.value for constant in self.constants}


@frozen
class Variant:
    """One way to run a step: taken when ``guard`` is non-zero (the last variant's guard is 1).

    ``units`` is the number of independent units of work; ``flops`` and ``bytes`` are what the operation needs at least,
    for rooflines. On a GPU a unit is a program of the grid, the kernel's arguments are its operands and then its sizes,
    and ``tiles`` are the binaries to choose from, the default one first; ``units`` then may name their constants.
    """

    kernel: str
    operands: tuple[Ref, ...]
    sizes: tuple[Size, ...]
    units: Size
    guard: Size = 1
    flops: Size = 0
    bytes: Size = 0
    tiles: tuple[Tile, ...] = field(default=(), metadata={typed_json.ADDED_LATER: True})


@frozen
class Origin:
    """Where a kernel comes from: graph nodes, module path in the model, and ``file:line`` of the model's source."""

    nodes: tuple[str, ...] = ()
    module: str = ""
    source: str = ""


@frozen
class Step:
    """One kernel launch of the plan, with its variants, and which operands of it are written (by position)."""

    name: str
    family: str
    variants: tuple[Variant, ...]
    writes: tuple[int, ...]
    origin: Origin = field(default_factory=Origin)


@frozen
class Plan:
    """One entry point.

    ``results`` is the structure of the outputs: ``{"output": i}``, ``{"size": expression}``, ``{"constant": value}``,
    ``{"tuple": [...]}``, ``{"list": [...]}`` or ``{"dict": {...}}``.
    """

    entry: str
    symbols: tuple[Symbol, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    results: Any
    checks: tuple[Check, ...]
    states: tuple[StateBuffer, ...]
    constants: tuple[Constant, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Symbol name → inclusive bounds."""
        return {symbol.name: (symbol.minimum, symbol.maximum) for symbol in self.symbols}


def place(buffers: tuple[Buffer, ...], symbols: Mapping[str, int]) -> tuple[list[int], int]:
    """Offset of every buffer in the arena and the arena's size in bytes, for one assignment of the symbols."""
    offsets = [0] * len(buffers)
    ends = [0] * len(buffers)
    for index in plan_check.topological(buffers):
        offset = max((ends[other] for other in buffers[index].below), default=0)
        offsets[index] = offset
        ends[index] = offset + (sizes.evaluate(buffers[index].bytes, symbols) + 63) // 64 * 64
    return offsets, max(ends, default=0)


def from_json(data: Any, file: str = "plan") -> Plan:
    """The plan that :func:`to_json` gave the data of, validated: types, names, references, sizes, lifetimes.

    Args:
        data: what ``json.loads`` returned.
        file: the plan's path, for messages.

    Raises:
        ArtifactError: names the file and the field.
    """
    try:
        plan: Plan = typed_json.read(Plan, data)
        plan_check.check(plan)
    except typed_json.FieldError as error:
        raise ArtifactError(f"{file}: {error}") from None
    except RecursionError:
        raise ArtifactError(f"{file}: nested too deeply to be a plan") from None
    return plan


def to_json(plan: Any) -> Any:
    """A plan (or any of its parts) as JSON data."""
    if isinstance(plan, sizes.Op):
        return sizes.to_json(plan)
    fields = fields_of(type(plan))
    if fields is not None:
        return {name: to_json(getattr(plan, name)) for name in fields}
    if isinstance(plan, list | tuple):
        return [to_json(part) for part in plan]
    if isinstance(plan, dict):
        return {key: to_json(value) for key, value in plan.items()}
    return plan

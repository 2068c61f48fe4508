"""The dimension language: which axes of the inputs vary, by which names and in which ranges.

One comma-separated entry per axis of an input::

    entry  = size | [factor "*"] symbol ["+" offset] [":" low ".." high]

``batch:1..64`` is a symbol and its inclusive range; ``batch`` alone is a symbol whose range stands elsewhere; ``128``
is a fixed size; ``16*h:2..32`` is a multiple of 16 where ``h`` runs over 2..32, so sizes 32, 48, ..., 512;
``sequences+1:1..64`` is one more than ``sequences``, so sizes 2, 3, ..., 65. Every symbol needs a finite upper bound,
because scratch memory is planned with it.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.export import Dim

from ..runtime.errors import UsageError

_ENTRY = re.compile(
    r"(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)(?:\s*\+\s*(\d+))?(?:\s*:\s*(-?\w+|)\s*\.\.\s*(-?\w+|))?$", re.ASCII
)
_TORCH_NAME = re.compile(r"_*[suz]\d+$")
_EXAMPLE = '"batch:1..64,seq:1..512"'


@dataclass(frozen=True)
class Fixed:
    """An axis whose size never changes."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Symbolic:
    """An axis of size ``factor * symbol + offset``."""

    symbol: str
    factor: int = 1
    offset: int = 0

    def size(self, value: int) -> int:
        """The axis's size where the symbol has a value."""
        return self.factor * value + self.offset

    def __str__(self) -> str:
        scaled = self.symbol if self.factor == 1 else f"{self.factor}*{self.symbol}"
        return f"{scaled}+{self.offset}" if self.offset else scaled


Axis = Fixed | Symbolic
Range = tuple[int, int]


@dataclass(frozen=True)
class ShapeSpec:
    """The axes of each input that is not wholly fixed, and the inclusive range of each symbol.

    An input that is not named keeps its sample's sizes.
    """

    inputs: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def describe(self, name: str) -> str:
        """The dimension-language text of one input."""
        return ",".join(self.describe_axis(axis) for axis in self.inputs[name])

    def describe_axis(self, axis: Axis) -> str:
        """The dimension-language text of one axis, with the symbol's range."""
        if isinstance(axis, Fixed):
            return str(axis)
        low, high = self.ranges[axis.symbol]
        return f"{axis}:{low}..{high}"

    def sizes(self, samples: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The value of every symbol in the samples.

        Raises:
            UsageError: an unknown input, a wrong rank, a size that the dimensions exclude or two sizes for one symbol.
        """
        values: dict[str, int] = {}
        origin: dict[str, str] = {}
        for name, axes in self.inputs.items():
            if name not in samples:
                raise _unknown_input(name, samples)
            shape = tuple(samples[name].shape)
            if len(shape) != len(axes):
                raise UsageError(
                    f"input {name!r} has {len(shape)} axes (sample shape {list(shape)}), but {len(axes)} dimensions "
                    f"were given: {self.describe(name)!r}; give one entry per axis"
                )
            for index, (axis, size) in enumerate(zip(axes, shape, strict=True)):
                where = f"axis {index} of input {name!r}"
                if isinstance(axis, Fixed):
                    if axis.size != size:
                        raise UsageError(f"{where} is declared as {axis.size}, but the sample's size there is {size}")
                    continue
                value, rest = divmod(size - axis.offset, axis.factor)
                low, high = self.ranges[axis.symbol]
                if rest or value < 0:
                    what = str(axis) if axis.offset else f"a multiple of {axis.factor}"
                    raise UsageError(f"{where} is declared as {what}, but the sample's size is {size}")
                if values.setdefault(axis.symbol, value) != value:
                    raise UsageError(
                        f"{axis.symbol!r} is {values[axis.symbol]} at {origin[axis.symbol]}, but {value} at {where}; "
                        f"give samples of one size, or two names if the sizes are independent"
                    )
                origin.setdefault(axis.symbol, where)
                # A sample of size 1 stands for "small" and is widened; torch would take 1 for a constant.
                if not low <= value <= high and not (value == 1 and low > 1):
                    raise UsageError(
                        f"{where} has size {size} in the sample, outside {self.describe_axis(axis)!r}; "
                        f"give a sample inside the range or widen the range"
                    )
        return values

    def widen(self, samples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The samples with every symbol at least 2 (and inside its range), by repetition along the axis.

        ``torch.export`` takes a size of 1 for a constant, so a sample of one row is repeated.

        Raises:
            UsageError: as :meth:`sizes`; or a symbol whose range allows no size above 1.
        """
        values = self.sizes(samples)
        for symbol, value in values.items():
            low, high = self.ranges[symbol]
            if value == 0:
                raise UsageError(f"a sample has size 0 along {symbol!r}; give one of size 2 or more")
            if high < 2:
                raise UsageError(
                    f"{symbol!r} ranges over {low}..{high}; write a fixed size, or let it reach at least 2"
                )
            values[symbol] = max(value, low, 2)
        return self.resize(samples, values)

    def fit(self, samples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Resize samples that were made up, not given by the user, until they satisfy the dimensions.

        Raises:
            UsageError: an unknown input or a wrong rank.
        """
        values: dict[str, int] = {}
        for name, axes in self.inputs.items():
            if name not in samples:
                raise _unknown_input(name, samples)
            if samples[name].dim() != len(axes):
                self.sizes({name: samples[name]})
            for axis, size in zip(axes, samples[name].shape, strict=True):
                if isinstance(axis, Symbolic) and axis.symbol not in values:
                    low, high = self.ranges[axis.symbol]
                    values[axis.symbol] = min(max((size - axis.offset) // axis.factor, low, 2), high)
        return self.resize(samples, values)

    def resize(self, samples: Mapping[str, torch.Tensor], values: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The samples repeated or cut along each declared axis to the sizes that the symbols' values give."""
        resized = dict(samples)
        for name, axes in self.inputs.items():
            for index, axis in enumerate(axes):
                size = axis.size if isinstance(axis, Fixed) else axis.size(values[axis.symbol])
                resized[name] = _resize(resized[name], index, size)
        return resized

    def torch_dims(self, names: Iterable[str]) -> tuple[dict[int, Any], ...]:
        """One ``{axis: Dim}`` per input name, as ``torch.export.export`` takes it; symbols are shared."""
        dims = {symbol: Dim(symbol, min=low, max=high) for symbol, (low, high) in self.ranges.items()}
        spec: list[dict[int, Any]] = []
        for name in names:
            axes: dict[int, Any] = {}
            for index, axis in enumerate(self.inputs.get(name, ())):
                if isinstance(axis, Symbolic):
                    dim = dims[axis.symbol] if axis.factor == 1 else axis.factor * dims[axis.symbol]
                    axes[index] = dim + axis.offset if axis.offset else dim
            spec.append(axes)
        return tuple(spec)

    def unified(self, symbol: str, other: str) -> ShapeSpec:
        """The spec with one symbol in place of two; its range is what both allow.

        Raises:
            UsageError: the ranges have no size in common.
        """
        (low, high), (other_low, other_high) = self.ranges[symbol], self.ranges[other]
        low, high = max(low, other_low), min(high, other_high)
        if low > high:
            raise UsageError(f"{symbol!r} and {other!r} are always equal in the model, but their ranges share no size")
        inputs: dict[str, tuple[Axis, ...]] = {
            name: tuple(
                replace(axis, symbol=symbol) if isinstance(axis, Symbolic) and axis.symbol == other else axis
                for axis in axes
            )
            for name, axes in self.inputs.items()
        }
        return ShapeSpec(
            inputs, {key: bounds for key, bounds in {**self.ranges, symbol: (low, high)}.items() if key != other}
        )

    def override(self, other: ShapeSpec) -> ShapeSpec:
        """This spec as a default under another one: the other's inputs and ranges win."""
        inputs = {**self.inputs, **other.inputs}
        ranges = {**self.ranges, **other.ranges}
        used = {axis.symbol for axes in inputs.values() for axis in axes if isinstance(axis, Symbolic)}
        return ShapeSpec(inputs, {symbol: ranges[symbol] for symbol in ranges if symbol in used})


def split_option(text: str) -> tuple[str, str]:
    """``"input_ids=batch:1..64,seq:1..512"`` as (name, dimensions).

    Raises:
        UsageError: no name or no ``=``.
    """
    name, equals, dims = text.partition("=")
    if not equals or not name.strip() or not dims.strip():
        raise UsageError(f"cannot read the shape {text!r}: write NAME=DIMS, such as input_ids={_EXAMPLE[1:-1]}")
    return name.strip(), dims.strip()


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """Every ``NAME=DIMS`` of the command line as a mapping.

    Raises:
        UsageError: a malformed option or two for one input.
    """
    shapes: dict[str, str] = {}
    for text in texts:
        name, dims = split_option(text)
        if shapes.setdefault(name, dims) != dims:
            raise UsageError(f"input {name!r} is given two shapes, {shapes[name]!r} and {dims!r}; give one")
    return shapes


def parse_shapes(shapes: Mapping[str, str], defaults: ShapeSpec | None = None) -> ShapeSpec:
    """The dimensions of several inputs, over ``defaults`` (which may also give the range of a bare symbol).

    Raises:
        UsageError: anything the language does not allow, with what to write instead.
    """
    inputs: dict[str, tuple[Axis, ...]] = {}
    ranges: dict[str, Range] = {}
    where: dict[str, str] = {}
    for name, text in shapes.items():
        axes: list[Axis] = []
        for entry in text.split(",") if text.strip() else []:
            axis, bounds = _parse_entry(entry.strip(), name, text)
            axes.append(axis)
            if isinstance(axis, Symbolic) and bounds is not None:
                if ranges.setdefault(axis.symbol, bounds) != bounds:
                    first = "{}..{}".format(*ranges[axis.symbol])
                    raise UsageError(
                        f"{axis.symbol!r} has the range {first} in {where[axis.symbol]!r}, but "
                        f"{bounds[0]}..{bounds[1]} in {name!r}; a symbol has one range: give it once, or use two names"
                    )
                where.setdefault(axis.symbol, name)
        inputs[name] = tuple(axes)
    known = {**(defaults.ranges if defaults else {}), **ranges}
    for name, parsed in inputs.items():
        for axis in parsed:
            if isinstance(axis, Symbolic) and axis.symbol not in known:
                raise UsageError(
                    f"{axis.symbol!r} of input {name!r} has no range; write {axis}:1..64 (with its largest size) once"
                )
    used = {axis.symbol for axes in inputs.values() for axis in axes if isinstance(axis, Symbolic)}
    spec = ShapeSpec(inputs, {symbol: bounds for symbol, bounds in known.items() if symbol in used})
    return _without_constants(defaults.override(spec) if defaults else spec)


def from_torch(dynamic: Mapping[str, Any], samples: Mapping[str, torch.Tensor]) -> ShapeSpec:
    """The spec that ``torch.export`` dimensions mean, given per input name.

    Args:
        dynamic: input name → None, ``{axis: dim}`` or a sequence with one dim per axis; a dim is a ``Dim``, a multiple
            of one, an int or None (both fixed).
        samples: the input tensors by name.

    Raises:
        UsageError: a dimension without a finite maximum, or one that the language has no word for.
    """
    inputs: dict[str, tuple[Axis, ...]] = {}
    ranges: dict[str, Range] = {}
    for name, dims in dynamic.items():
        if name not in samples:
            raise _unknown_input(name, samples)
        shape = samples[name].shape
        if dims is None:
            continue
        by_axis = dict(dims) if isinstance(dims, Mapping) else dict(enumerate(dims))
        if bad := [axis for axis in by_axis if not -len(shape) <= axis < len(shape)]:
            raise UsageError(f"input {name!r} has {len(shape)} axes; dynamic_shapes names axis {bad[0]}")
        by_axis = {axis % len(shape): dim for axis, dim in by_axis.items()}
        axes = [
            _torch_axis(by_axis.get(axis), int(size), f"{name}_dim{axis}", ranges) for axis, size in enumerate(shape)
        ]
        if any(isinstance(axis, Symbolic) for axis in axes):
            inputs[name] = tuple(axes)
    return _without_constants(ShapeSpec(inputs, ranges))


def is_dimension_language(shapes: Any) -> bool:
    """Whether ``shapes`` maps input names to texts of the dimension language (rather than to torch dimensions)."""
    return isinstance(shapes, Mapping) and all(isinstance(dims, str) for dims in shapes.values())


def check_symbol(name: str) -> None:
    """Refuse names that no generated code could use.

    Raises:
        UsageError: not an identifier, a keyword, or of the form that torch gives its own symbols.
    """
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise UsageError(f"{name!r} is no name for a dimension: use letters, digits and _, such as 'batch'")
    if _TORCH_NAME.fullmatch(name):
        raise UsageError(
            f"the dimension name {name!r} is reserved (torch names its own symbols so): use a word, such as 'batch'"
        )


def _parse_entry(entry: str, name: str, text: str) -> tuple[Axis, Range | None]:
    where = f"in the dimensions {text!r} of input {name!r}"
    if re.fullmatch(r"\d+", entry, re.ASCII):
        return Fixed(int(entry)), None
    match = _ENTRY.fullmatch(entry)
    if match is None:
        if ":" in entry and ".." not in entry:
            raise UsageError(f"{entry!r} {where} has no range LOW..HIGH: write {entry.split(':')[0].strip()}:1..64")
        raise UsageError(
            f"cannot read {entry!r} {where}: an entry is a size, a symbol with its range, a multiple of one or one "
            f"with a number added, such as {_EXAMPLE}, 16*h:2..32 or seq+1"
        )
    factor, symbol, offset, low_text, high_text = match.groups()
    check_symbol(symbol)
    if factor is not None and int(factor) == 0:
        raise UsageError(f"{entry!r} {where} is always 0: write the size 0 or a positive multiple")
    axis = Symbolic(symbol, int(factor or 1), int(offset or 0))
    if low_text is None:
        return axis, None
    if high_text == "" or high_text in ("inf", "oo"):
        raise UsageError(
            f"{symbol!r} {where} has no upper bound: memory is planned with it, so write {axis}:{low_text or 1}..MAX "
            f"with the largest size you will run"
        )
    for bound in (low_text, high_text):
        if not re.fullmatch(r"\d+", bound, re.ASCII):
            raise UsageError(f"{bound!r} {where} is no size: bounds are non-negative integers, as in {axis}:1..64")
    low, high = int(low_text), int(high_text)
    if low > high:
        raise UsageError(f"the range {low}..{high} of {symbol!r} {where} is reversed: write {axis}:{high}..{low}")
    return axis, (low, high)


def _torch_axis(dim: Any, size: int, default_name: str, ranges: dict[str, Range]) -> Axis:
    """One torch dimension; the symbol's range is added to ``ranges``."""
    if dim is None or isinstance(dim, int):
        return Fixed(size if dim is None else dim)
    root, factor, offset = dim, 1, 0
    if getattr(dim, "root", None) is not None:
        root = dim.root
        offset = dim.fn(0)
        factor = dim.fn(1) - offset
        if offset < 0 or factor < 1 or dim.fn(2) != 2 * factor + offset:
            raise UsageError(
                f"the dimension {dim.__name__!r} is no multiple of {root.__name__!r} with a number added to it; only "
                f"those are supported"
            )
    name = getattr(root, "__name__", None)
    if name is None:  # Dim.AUTO and Dim.DYNAMIC are hints without a name, possibly with bounds.
        if getattr(getattr(dim, "type", None), "name", "") == "STATIC":
            return Fixed(size)
        name = default_name
    check_symbol(name)
    low, high = getattr(root, "min", None), getattr(root, "max", None)
    if not isinstance(high, int) or high >= 2**63 - 1:
        raise UsageError(
            f"the dimension {name!r} has no upper bound: memory is planned with it, so write Dim({name!r}, min=1, "
            f"max=MAX) or the dimension language, as in {name}:1..64"
        )
    bounds = (int(low) if isinstance(low, int) else 1, high)
    if ranges.setdefault(name, bounds) != bounds:
        raise UsageError(f"two dimensions are called {name!r} but differ in range: {ranges[name]} and {bounds}")
    return Symbolic(name, factor, offset)


def _without_constants(spec: ShapeSpec) -> ShapeSpec:
    """Axes whose symbol has only one value become fixed."""
    fixed = {symbol: low for symbol, (low, high) in spec.ranges.items() if low == high}
    inputs: dict[str, tuple[Axis, ...]] = {
        name: tuple(
            Fixed(axis.size(fixed[axis.symbol])) if isinstance(axis, Symbolic) and axis.symbol in fixed else axis
            for axis in axes
        )
        for name, axes in spec.inputs.items()
    }
    return ShapeSpec(inputs, {symbol: bounds for symbol, bounds in spec.ranges.items() if symbol not in fixed})


def _resize(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    have = tensor.shape[axis]
    if have == size:
        return tensor
    if have < size and have > 0:
        repeats: Sequence[int] = [-(-size // have) if index == axis else 1 for index in range(tensor.dim())]
        tensor = tensor.repeat(*repeats)
    return tensor.narrow(axis, 0, size).contiguous()


def _unknown_input(name: str, samples: Mapping[str, Any]) -> UsageError:
    close = difflib.get_close_matches(name, samples, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return UsageError(f"no input is called {name!r}{hint} The tensor inputs are: {', '.join(samples) or 'none'}")

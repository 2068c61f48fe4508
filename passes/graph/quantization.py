"""What a user asks of quantization: how weights are stored, which weights, and what is computed with.

A name says how a weight is stored: ``int8`` (a scale per row), ``int4-g32``, ``int4-g64``, ``int4-g128`` (a scale per
group of columns); ``-z`` adds zero points, ``-plain`` rounds without a search for scales. A recipe says which weights:
a name for the whole model, or patterns.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ...runtime.errors import UsageError
from .quantized_rows import RowFormat

Kind = Literal["linear", "embedding"]
ACTIVATIONS: dict[str, str] = {
    "auto": "int8 on CPUs, float on GPUs",
    "int8": "quantized on the fly: a scale per 32 columns beside int4, per row beside int8",
    "float": "as they come",
}
"""What ``--activations`` may be."""
NONE = "none"
NAMES = "int8, int4-g32, int4-g64 or int4-g128, each with -z (zero points) and -plain (no search for scales) behind it"
_NAME = re.compile(r"int(?:(8)|(4)-g(32|64|128))(-z)?(-plain)?")
_ACTIVATION_GROUP = 32


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is quantized.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale; 0: the whole row does.
        symmetric: whether there are no zero points.
        search: whether scales are searched for.
        activations: as ``quantized_linear`` takes it: -1 floating point, 0 int8 by rows, n int8 by n columns.

    Raises:
        UsageError: the numbers do not fit each other.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    search: bool = True
    activations: int = -1

    def __post_init__(self) -> None:
        """Refuse what no operator takes."""
        if self.bits not in (4, 8) or self.group < 0:
            raise UsageError(f"weights are quantized to 4 or 8 bits in groups of 0 or more columns, not {self}")
        if self.activations < -1 or (self.activations > 0 and self.group % self.activations):
            raise UsageError(f"activations by {self.activations} columns do not divide groups of {self.group}")

    def __str__(self) -> str:
        """The name that stands for it."""
        group = f"-g{self.group}" if self.group else ""
        return f"int{self.bits}{group}{'' if self.symmetric else '-z'}{'' if self.search else '-plain'}"

    @property
    def activation_name(self) -> str:
        """What is computed with, in words."""
        if self.activations < 0:
            return "float"
        return "int8 by rows" if self.activations == 0 else f"int8 by {self.activations} columns"


def parse_name(name: str, activations: str = "auto") -> WeightSpec:
    """The way of storing that a name stands for.

    Raises:
        UsageError: there is no such name.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(f"there is no quantization {name!r}: choose {NAMES}; or name a recipe file (*.json)")
    group = int(found[3]) if found[2] else 0
    with_activations = -1 if activations == "float" else _ACTIVATION_GROUP if group else 0
    return WeightSpec(int(found[1] or found[2]), group, found[4] is None, found[5] is None, with_activations)


@dataclass(frozen=True)
class Recipe:
    """Which weights are quantized, and how.

    Attributes:
        text: the name, or the JSON object, that the user asked for.
        patterns: patterns of dotted weight names in order, the first that fits counts; None leaves a weight as it is.
        embeddings: what embeddings get where no pattern is a user's own; None: what the patterns say.
    """

    text: str
    patterns: tuple[tuple[str, WeightSpec | None], ...]
    embeddings: WeightSpec | None = None

    def of(self, name: str, kind: Kind) -> WeightSpec | None:
        """How a weight is to be stored; None where it stays as it is."""
        if kind == "embedding" and self.embeddings is not None:
            return self.embeddings
        return next((spec for pattern, spec in self.patterns if fnmatchcase(name, pattern)), None)


def read_recipe(text: str, activations: str = "auto") -> Recipe:
    """The recipe that ``--quantize`` names.

    Args:
        text: a name for all linear layers (embeddings then get int8: few of their rows are read, and all that follows
            depends on them), or the path of a JSON file (or its text): one object, pattern of weight names → name or
            ``"none"``, the first pattern that fits counts.
        activations: one of ``ACTIVATIONS``.

    Raises:
        UsageError: there is no such name, or the file cannot be read or says something else.
    """
    if activations not in ACTIVATIONS:
        raise UsageError(f"unknown activations {activations!r}: choose one of {', '.join(ACTIVATIONS)}")
    if not text.endswith(".json") and not text.startswith("{"):
        spec = parse_name(text, activations)
        return Recipe(text, (("*", spec),), parse_name("int8" if spec.search else "int8-plain", activations))
    where = "the quantization recipe" + ("" if text.startswith("{") else f" {text}")
    try:
        data = json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{where} cannot be read: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()) or not data:
        example = '{"*.mlp.*": "int4-g32", "*": "int8"}'
        raise UsageError(f"{where} must be one object of patterns and names, such as {example}")
    try:
        pairs = [(pattern, None if name == NONE else parse_name(name, activations)) for pattern, name in data.items()]
    except UsageError as error:
        raise UsageError(f"{where}: {error}; {NONE!r} leaves a weight as it is") from error
    return Recipe(json.dumps(data), tuple(pairs))


@dataclass(frozen=True)
class Layer:
    """A weight that was asked to be quantized.

    Attributes:
        name: the weight's dotted name.
        kind: whose weight it is.
        asked: the name of what was asked for.
        shape: of the weight: rows (results), columns.
        refusal: why it was not done; empty where it was.
    """

    name: str
    kind: Kind
    asked: WeightSpec
    shape: tuple[int, int]
    refusal: str = ""

    @property
    def form(self) -> RowFormat:
        """The format of its rows."""
        return RowFormat(self.shape[1], self.asked.bits, self.asked.group, self.asked.symmetric)


@dataclass
class Ledger:
    """What the passes did of a recipe, layer by layer, in graph order."""

    layers: list[Layer] = field(default_factory=list)

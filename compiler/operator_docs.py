"""The text of ``docs/operators.md``, from the tables that the compiler itself works from.

``python -m tilewright.compiler.operator_docs > docs/operators.md`` writes it; a test compares the two.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..codegen.registry import all_lowerings
from ..codegen.roles import fusion_roles
from ..passes.canonicalize import RULES
from .frontends import onnx_ops
from .frontends.onnx_ops.registry import OPERATORS

_ROLES = {
    "pointwise": (
        "Element for element",
        "Broadcasting, fused into whatever reads or makes their operands. Tensors made of a number or of a position, "
        "and writes into a fixed part of a tensor, count here.",
    ),
    "view": ("Views", "Each element of the result is one element of an operand or a constant: they cost nothing."),
    "gather": (
        "Gathers",
        "Indices are data, checked at run time, or follow from a resampling grid. Negative ones count from the end "
        "with `index` and `take_along_dim`; `embedding`, `gather` and `index_select` refuse them, as PyTorch does.",
    ),
    "reduction": ("Reductions", "They consume whole axes; softmax and the norms keep a row between their stages."),
    "window": ("Windows", "Pooling: overlapping neighbourhoods."),
    "matmul": (
        "Matrix products",
        "A register-blocked kernel in float32, in bfloat16 (summed in float32), and of int8 (`_int_mm`, summed in "
        "int32); "
        "float64 and other integers are computed as plain reductions.",
    ),
    "convolution": (
        "Convolutions",
        "In one and two dimensions, with strides, dilation, groups and transposed ones, in float32. The weight must be "
        "a constant.",
    ),
    "attention": (
        "Attention",
        "One kernel that never stores the scores; masks, causal order and grouped queries included. The head's width "
        "must be fixed.",
    ),
    "cache_append": (
        "Appending to a cache",
        "Rows of keys or values go to their places in a paged cache, in the memory of the state that it is.",
    ),
    "paged_attention": (
        "Attention over a paged cache",
        "Tokens of several sequences, each over its own blocks of the caches, float32 or bfloat16.",
    ),
    "quantized": (
        "Quantized weights",
        "Linear layers and tables of 4 or 8 bits, with or without zero points. On CPUs groups are whole numbers of 32 "
        "columns, or rows.",
    ),
}
_FAMILIES = ("matmul", "convolution", "attention", "cache_append", "paged_attention", "quantized")

NO_KERNEL = {
    "AffineGrid": "affine_grid_generator",
    "BitCast": "view.dtype",
    "Celu": "celu",
    "Col2Im": "index_add",
    "CumProd": "cumprod",
    "Det": "linalg_det",
    "GridSample": "grid_sampler",
    "MaxUnpool": "scatter.src",
    "RoiAlign": "broadcast_tensors",
    "Scatter": "scatter.src",
    "ScatterElements": "scatter.src",
    "ScatterND": "index_put",
    "TensorScatter": "scatter.src",
    "TopK": "sort.stable",
}
"""ONNX operators that the frontend reads, but whose ATen operator no kernel can be made of yet."""

_FLOAT64 = ("ConvInteger", "QLinearConv")

_INTRODUCTION = """\
# Operators

This page is made from the compiler's own tables by `python -m tilewright.compiler.operator_docs`; a test keeps it true.
`tilewright compile SOURCE --check` tells for one model, without building it, which of its operators are not supported.

What depends on constants only is computed by PyTorch when the model is compiled, and needs no kernel. (Large values
made of small ones, such as masks, are not; they are computed where they are used.)

## ATen operators

The operators of a model as `torch.export` gives them. In parentheses are the overloads, where there are others than
`default`. The role is what fusion knows of an operator ([passes](passes.md#fuse_operators) says what it makes of that).

Element types: float32 and float64, the integers, booleans; float16 and bfloat16 models are computed in float32. Sizes
may vary where they follow from the sizes of inputs. Not supported are sizes that depend on data (`nonzero`, indexing
with a mask), random numbers, sorting, and most writes to places that are data (`scatter`, `index_put`).
"""


def text() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for role, names in documented_roles().items():
        title, words = _ROLES[role]
        kind = "kernel family" if role in _FAMILIES else "role"
        parts.append(f"### {title} ({kind} `{role}`)\n\n{_fill(words)}\n\n{_fill(_listing(names))}\n")
    parts.append(
        "### Written differently first\n\n"
        + _fill("These have no kernel of their own: the pass `canonicalize` writes them with the operators above.")
        + f"\n\n{_fill(_listing(rewritten()))}\n"
    )
    parts.append(_onnx())
    return "\n".join(parts)


def documented_roles() -> dict[str, set[str]]:
    """Role (for anchors their kernel family) → operators that kernels are made of, by qualified name."""
    roles = fusion_roles()
    found: dict[str, set[str]] = {role: set() for role in _ROLES}
    for target, anchor in roles.anchors.items():
        found[anchor.family].add(str(target))
    for target, lowering in all_lowerings().items():
        if target not in roles.anchors:
            found[lowering.role].add(str(target))
    return found


def rewritten() -> set[str]:
    """Operators that kernels are not made of, but that the canonical form does without."""
    roles = fusion_roles()
    tensors = [target for target in RULES if isinstance(target, torch._ops.OpOverload) and "sym_" not in str(target)]
    names = {str(target) for target in tensors if not roles.known(target)}
    return {name for name in names if not ("conv" in name and "3d" in name)}  # no kernel takes three dimensions


def names_in(listing: str) -> set[str]:
    """The qualified names that a listing of this page stands for."""
    found = set()
    for name, overloads in re.findall(r"`([\w.:]+)`(?: \(([^)]*)\))?", " ".join(listing.split())):
        namespace, _, plain = name.rpartition(".")
        for overload in (overloads or "default").split(", "):
            found.add(f"{namespace or 'aten'}.{plain}.{overload}")
    return found


def exists(name: str) -> bool:
    """Whether this PyTorch has an operator, given as ``namespace.name.overload``."""
    namespace, packet, overload = name.split(".")
    return hasattr(getattr(getattr(torch.ops, namespace), packet, None), overload)


def _listing(names: Iterable[str]) -> str:
    packets: dict[str, list[str]] = {}
    for name in names:
        namespace, packet, overload = name.split(".")
        packets.setdefault(packet if namespace == "aten" else f"{namespace}.{packet}", []).append(overload)
    words = []
    for packet, overloads in sorted(packets.items(), key=lambda item: (item[0].lstrip("_"), item[0])):
        # the default first, as the others are variations of it
        listed = ", ".join(sorted(overloads, key=lambda overload: (overload != "default", overload)))
        words.append(f"`{packet}`" if listed == "default" else f"`{packet}` ({listed})")
    return ", ".join(words) + "."


def _onnx() -> str:
    families: dict[str, list[str]] = {}
    random = []
    for (domain, name), versions in OPERATORS.items():
        family = versions[0].function.__module__.rpartition(".")[2]
        qualified = f"{domain}.{name}" if domain else name
        if versions[0].function.__name__ == "random":
            random.append(qualified)
        elif name not in NO_KERNEL and name not in _FLOAT64:
            families.setdefault(family, []).append(qualified)
    lines = [
        "## ONNX operators\n",
        _fill(
            "The frontend interprets each node with calls of PyTorch, in the semantics of the model's operator set; "
            "what these calls become must be among the operators above. Names with a dot are of another domain than "
            "ONNX's own. An attribute, an older operator set or an input that is not supported is refused by name."
        )
        + "\n",
    ]
    for family in onnx_ops.__all__:
        if family in families:
            listed = ", ".join(f"`{name}`" for name in sorted(families[family]))
            lines.append(f"- **{family}**: {listed}")
    lines = [*lines[:2], *(_fill(line, indent="  ") for line in lines[2:])]
    control = (
        "Conditions and trip counts (`If`, `Loop`, `Scan`), and the operands of `Range`, `NonZero` and `Compress`, "
        "must be constants or follow from shapes. Sequences and optionals may be used inside a model, not as its "
        "inputs or outputs."
    )
    lines.append(f"\n{_fill(control)}\n")
    lines.append(_fill("Read, but without a kernel yet, so supported only where all operands are constants:") + "\n")
    lines.append(_fill(_without_kernel(NO_KERNEL)) + "\n")
    lines.append(_fill(f"Refused because they are random: {', '.join(f'`{name}`' for name in sorted(random))}.") + "\n")
    return "\n".join(lines)


def _without_kernel(table: Mapping[str, Any]) -> str:
    entries = [f"`{name}` (needs `{operator}`)" for name, operator in table.items()]
    entries += [f"`{name}` (needs `convolution` in float64)" for name in _FLOAT64]
    return ", ".join(sorted(entries)) + "."


def _fill(words: str, indent: str = "") -> str:
    return textwrap.fill(words, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(text(), end="")

"""What an artifact computes in on each kind of device: decided from what was asked for, the model and the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..codegen.targets import Target
from ..passes.graph.program import Program

OWN = "own"
"""The model's own types, half precision too: what ``auto`` comes to where a device computes in them."""

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def precision_on(device: str, requested: str, programs: Sequence[Program], targets: Sequence[Target] = ()) -> str:
    """The precision that passes and verification work with: what was asked for, with ``"auto"`` decided.

    GPUs compute in every type. CPUs compute in bfloat16 where all those of the artifact have instructions for it; on
    others float32 is faster and loses nothing, and none has float16 products.

    Args:
        device: the kind of device, ``"cpu"`` or ``"cuda"``.
        requested: one of ``compiler.options.PRECISIONS``.
        programs: all entry points as captured.
        targets: the processors to compile for.
    """
    if requested != "auto":
        return requested
    if device != "cpu":
        return OWN
    types = _types(programs)
    native = bool(targets) and all(target.has("bf16") for target in targets)
    return OWN if native and torch.bfloat16 in types and torch.float16 not in types else "fp32"


def cache_type(
    cache: str, requested: str, dtype: torch.dtype, devices: Sequence[str], targets: Sequence[Target] = ()
) -> torch.dtype:
    """The type of cached keys and values.

    Args:
        cache: one of ``compiler.options.CACHES``.
        requested: the precision, one of ``compiler.options.PRECISIONS``.
        dtype: of the model's weights.
        devices: the kinds of device to compile for, ``"cpu"`` and ``"cuda"``.
        targets: the processors among them.
    """
    if cache != "auto":
        return torch.bfloat16 if cache == "bf16" else torch.float32
    own = dtype is torch.bfloat16 and ("cpu" not in devices or all(target.has("bf16") for target in targets))
    return torch.bfloat16 if requested == "bf16" or (requested == "auto" and own) else torch.float32


def applied(programs: Mapping[str, Sequence[Program]], chosen: Mapping[str, str]) -> str:
    """What the artifact computes in, in the words of ``--precision``; by kind of device where they differ.

    Args:
        programs: after the passes, by kind of device.
        chosen: what :func:`precision_on` gave, by kind of device.
    """
    found = {device: _applied(each, chosen[device]) for device, each in programs.items()}
    names = set(found.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{name} on {device}" for device, name in found.items())


def _applied(programs: Sequence[Program], chosen: str) -> str:
    types = _types(programs)
    half = next((dtype for dtype, name in _NAMES.items() if name == chosen), None)
    if chosen != OWN and (chosen in ("fp32", "tf32") or half in types):
        return chosen
    return " and ".join(name for dtype, name in _NAMES.items() if dtype in types) or "integers"


def _types(programs: Sequence[Program]) -> set[torch.dtype]:
    """The dtypes of all values."""
    values = [node.meta.get("val") for program in programs for node in program.graph.nodes]
    parts = [part for value in values for part in (value if isinstance(value, tuple | list) else (value,))]
    return {part.dtype for part in parts if isinstance(part, torch.Tensor)}

"""What this processor can do, and which of an artifact's targets fits it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .errors import ArtifactError
from .manifest import Target


@cache
def features() -> frozenset[str]:
    """Processor flags as Linux names them (``"avx2"``, ``"avx512_vnni"``), those that the system has enabled only."""
    return parse_cpuinfo(Path("/proc/cpuinfo").read_text())


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The flags that all processors in a ``/proc/cpuinfo`` have (hybrid processors may differ by core)."""
    common: set[str] | None = None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            common = flags if common is None else common & flags
    return frozenset(common or ())


def choose(targets: Sequence[Target], present: frozenset[str], file: str) -> Target:
    """The first target whose required features are all present.

    Args:
        targets: in order of preference.
        present: features of the processor.
        file: the manifest's path, for messages.

    Raises:
        ArtifactError: none fits; lists what each needs and what is missing.
    """
    usable = [target for target in targets if target.name.partition(":")[0] == "cpu"]
    for target in usable:
        if present.issuperset(target.features):
            return target
    if not usable:
        raise ArtifactError(f"{file}: holds no kernels for a CPU; compile the model with --target cpu")
    relevant = sorted(present & _NOTABLE) or ["none of the vector extensions"]
    needs = "; ".join(
        f"{target.name} needs {' '.join(sorted(target.features))} (missing: "
        f"{' '.join(sorted(set(target.features) - present))})"
        for target in usable
    )
    raise ArtifactError(
        f"{file}: no target fits this processor: {needs}. It has {' '.join(relevant)}. "
        f"Compile the model for this machine with --target cpu"
    )


_NOTABLE = frozenset(
    (
        "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
        "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "sve", "bf16",
        "i8mm",
    )
)  # fmt: skip

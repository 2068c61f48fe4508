"""What an artifact holds for GPUs: its kernels' binaries per architecture, and the tiles that were rejected."""

from __future__ import annotations

from typing import Any

from ...runtime import binaries
from ...runtime.artifact import Artifact
from ...runtime.binaries import Binaries

SOURCES = "kernels/triton"


def tables_of(artifact: Artifact) -> list[Binaries]:
    """The table of binaries of every GPU target.

    Raises:
        ArtifactError: one is damaged.
    """
    tables = []
    for target in artifact.manifest.targets:
        if target.name.startswith("cuda:"):
            path = artifact.library(target)
            tables.append(binaries.parse(path.read_bytes(), str(path)))
    return tables


def tiles_of(artifact: Artifact) -> list[dict[str, Any]]:
    """Every tile of every kernel and architecture, in that order; those that were rejected have a reason."""
    found = []
    for table in tables_of(artifact):
        rejected: dict[str, list[dict[str, Any]]] = {}
        for tile in table.rejected:
            described = {"kernel": tile.kernel, "tile": tile.tile, "architecture": table.architecture}
            rejected.setdefault(tile.kernel, []).append(described | {"rejected": tile.reason})
        for kernel in table.kernels:
            for binary in kernel.binaries:
                found.append(
                    {
                        "kernel": kernel.name, "tile": binary.tile, "architecture": table.architecture,
                        "warps": binary.warps, "registers": binary.registers,
                        "shared": binary.shared + binary.static_shared,
                        "spills": binary.spill_stores + binary.spill_loads, "ptx": bool(binary.ptx), "rejected": "",
                    }
                )  # fmt: skip
            found += rejected.pop(kernel.name, [])
    return sorted(found, key=lambda item: item["kernel"])

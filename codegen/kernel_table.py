"""The kernels of an artifact by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..runtime.plan import Tile
from .kernel import NAME, KernelCode
from .symbols import PREFIX


@dataclass(frozen=True)
class KernelSource:
    """A kernel with its name: one source file."""

    name: str
    family: str
    text: str
    tiles: tuple[Tile, ...] = ()
    signature: tuple[str, ...] = ()


@dataclass
class KernelTable:
    """All kernels of an artifact: equal sources are one kernel, whose name spells out its specialisation."""

    kernels: list[KernelSource] = field(default_factory=list)
    _known: dict[object, str] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def add(self, code: KernelCode) -> str:
        """The kernel's name, after adding it if its source is new."""
        identity = (code.source, code.tiles, code.signature)
        known = self._known.get(identity)
        if known is not None:
            return known
        shape = max((parameter.shape for parameter in code.parameters if parameter.written), key=len, default=())
        dims = "x".join(str(extent).removeprefix(PREFIX) if isinstance(extent, int | str) else "n" for extent in shape)
        base = re.sub(r"\W+", "_", f"{code.family}_{code.label[:72]}_{dims}").strip("_").replace("__", "_")
        name, count = base, 1
        while name in self._names:
            count += 1
            name = f"{base}_v{count}"
        self._names.add(name)
        self._known[identity] = name
        source = code.source.replace(NAME, name)
        self.kernels.append(KernelSource(name, code.family, source, code.tiles, code.signature))
        return name

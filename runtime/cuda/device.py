"""A GPU as a device: what is loaded once and shared by all calls of a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from .. import sizes, state_sizes, tiles, tuned
from ..artifact import Artifact, map_weights
from ..device import Device
from ..entry import Entry, Source
from ..launches import Chooser
from ..plan import Plan, Step, Tile, Variant
from .context import Context
from .entry import CudaEntry
from .memory import Memory, upload
from .modules import Code, Modules, read_code
from .results import ResultPool
from .workspace import CudaWorkspace, Loaded, Weights

CALLS = 2
"""Calls at once: one runs while the host prepares the other. Each has an arena."""


class CudaDevice(Device[CudaWorkspace]):
    """A GPU with the code and weights of one artifact."""

    def __init__(self, artifact: Artifact, ordinal: int = 0, stream: Any = None) -> None:
        """Choose the code that runs on the GPU, check all of it, and upload the weights.

        Args:
            artifact: with plans for GPUs.
            ordinal: number of the GPU.
            stream: of the caller's, to run all calls in.

        Raises:
            ArtifactError: no code for this GPU, or a file is damaged.
            UsageError: no driver, no such GPU, a forked process, or ``stream`` is no stream.
            DeviceError: not enough memory; nothing stays allocated.
        """
        with ExitStack() as undo:
            context = Context(ordinal)
            undo.callback(context.close)
            code = read_code(artifact, context.gpu)
            self.plans = artifact.devices["cuda"]
            self._tuned = tuned.choices(artifact, context.gpu)
            weights = Weights([constant for plan in self.plans.values() for constant in plan.constants])
            memory = Memory(context)
            self._block = memory.allocate(weights.bytes, "the weights")
            undo.callback(self._block.free)
            weights.address = self._block.address
            upload(context, weights.pieces(np.frombuffer(map_weights(artifact), np.uint8)))
            results = ResultPool(memory)
            undo.callback(results.close)
            modules = Modules(code, memory)
            self._loaded = Loaded(context, memory, modules, results, weights, self.plans, stream)
            self._workspaces: weakref.WeakSet[CudaWorkspace] = weakref.WeakSet()
            plain = state_sizes.resolve(self.plans)
            self._first: CudaWorkspace | None = CudaWorkspace(self._loaded, plain)  # what every call needs is there
            self._workspaces.add(self._first)
            undo.pop_all()
        self.name = context.name
        self.target = code.target.name
        self.limit = CALLS if stream is None else 1
        self.gpu = context.gpu
        self.code: Code = code
        self.artifact_path = artifact.path

    def workspace(self, sizes: Mapping[str, int]) -> CudaWorkspace:
        """A stream, states, and memory that grows with the calls."""
        made = None
        if sizes == state_sizes.resolve(self.plans):
            made, self._first = self._first, None
        if made is None:
            made = CudaWorkspace(self._loaded, sizes)
            self._workspaces.add(made)
        return made

    def entry(self, name: str, source: Source[CudaWorkspace]) -> Entry[CudaWorkspace]:
        """An entry point whose calls run on workspaces of a source."""
        return CudaEntry(self._loaded, self.plans[name], source, self.chooser(name))

    @property
    def context(self) -> Context:
        """Of the GPU."""
        return self._loaded.context

    @property
    def memory(self) -> Memory:
        """What the model holds."""
        return self._loaded.memory

    def chooser(self, name: str, measured: bool = True) -> Chooser:
        """The function that picks tiles for an entry point: what was measured, else what the cost model says."""
        steps = self.plans[name].steps
        traits = [_traits(self.plans[name], step) for step in steps]

        def choose(number: int, variant: Variant, values: Mapping[str, int]) -> Tile:
            present = self.code.present(variant.kernel)
            if self._tuned and measured:
                best = self._tuned.get(tuning_key(variant, values))
                found = next((tile for tile in tiles.allowed(variant, values, present) if tile.name == best), None)
                if found is not None:
                    return found
            return tiles.choose(variant, values, present, self.code.table.architecture, self.gpu, traits[number])

        return choose

    def synchronize(self) -> None:
        """Wait for all calls, and raise what they met."""
        for workspace in list(self._workspaces):
            workspace.synchronize()

    def close(self) -> None:
        """Free all memory, unload the code, and let go of the context when no result is left in it."""
        for workspace in list(self._workspaces):
            workspace.close()
        self._loaded.modules.close()
        self._block.free()
        self._loaded.results.close()
        self._loaded.context.close()

    def __del__(self) -> None:
        if hasattr(self, "artifact_path"):
            self.close()

    def __str__(self) -> str:
        return f"{self.target} on {self.name} ({self.gpu.name})"


def tuning_key(variant: Variant, values: Mapping[str, int]) -> tuned.Key:
    """What a variant's choice at some sizes is kept by."""
    units = sizes.evaluate(variant.units, {**values, **variant.tiles[0].values()})
    return variant.kernel, tuple(sizes.evaluate(size, values) for size in variant.sizes), units


def _traits(plan: Plan, step: Step) -> tiles.Traits:
    lists: dict[str, Any] = {
        "input": plan.inputs, "output": plan.outputs, "state": plan.states, "constant": plan.constants,
        "buffer": plan.buffers,
    }  # fmt: skip
    refs = step.variants[-1].operands
    return tiles.traits_of([lists[ref.kind][ref.index].dtype for ref in refs if ref.kind in lists], step.family)

"""Measuring which tiles are fastest on the GPU at hand; what ``tilewright tune`` does.

Every step that has a choice at some sizes is timed with each of its binaries, alone, between two events, with the
second-level cache emptied before each launch. Steps that are the same (kernel and sizes) are measured once.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import sizes, tiles, tuned
from ..artifact import Artifact, read_artifact
from ..dtypes import numpy_dtype
from ..errors import ArtifactError, UsageError
from ..gpus import Gpu
from ..launches import Launch, Launches, make_launches
from ..plan import Plan, Port, Tile, Variant
from ..state_sizes import resolve
from .calls import Addresses, PreparedCall
from .device import CudaDevice, tuning_key
from .driver import Driver
from .memory import Block
from .workspace import CudaWorkspace

REPEATS = 20
WARM_UP = 3

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What was measured of one kernel at the sizes of one call.

    Attributes:
        entry: whose step it is.
        step: its index.
        kernel: its name.
        values: of the symbols.
        seconds: median time by tile name.
        chosen: the tile that the cost model chooses.
        best: the fastest tile.
    """

    entry: str
    step: int
    kernel: str
    values: Mapping[str, int]
    seconds: Mapping[str, float]
    chosen: str
    best: str


@dataclass(frozen=True)
class Tuning:
    """The outcome: what was measured on which GPU, and the file that says so."""

    gpu: Gpu
    measured: tuple[Measured, ...]
    file: Path


def tune(
    path: str | Path,
    *,
    device: str = "cuda:0",
    values: Sequence[Mapping[str, int]] | None = None,
    entries: Sequence[str] | None = None,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> Tuning:
    """Measure the tiles of an artifact and write ``tuned.json`` into it.

    Args:
        path: of the artifact.
        device: ``"cuda"`` or ``"cuda:<number>"``.
        values: sizes to measure at, by symbol, the sample's for those left out; by default the sample's only.
        entries: entry points to measure; by default all.
        repeats: launches that are timed of each binary.
        progress: called with ``"3 of 12: matmul_... at batch=8"`` before each.

    Raises:
        UsageError: no such entry point, symbol or GPU; sizes out of range; the directory cannot be written.
        ArtifactError: no code for this GPU.
        DeviceError: a launch fails, or there is too little memory.
    """
    kind, _, ordinal = device.partition(":")
    if kind != "cuda" or not (ordinal or "0").isdecimal():
        raise UsageError(f"device {device!r} is no GPU; expected 'cuda' or 'cuda:<number>'")
    artifact = read_artifact(path)
    if "cuda" not in artifact.devices:
        raise ArtifactError(f"{artifact.path}: holds no kernels for a GPU; there is nothing to measure")
    plans = artifact.devices["cuda"]
    chosen = list(entries) if entries is not None else list(plans)
    if unknown := [name for name in chosen if name not in plans]:
        raise UsageError(f"there is no entry point {unknown[0]!r}; the artifact has {', '.join(plans)}")
    wanted = [(name, one) for name in chosen for one in assignments(plans[name], values)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tuned.TunedFileWarning)  # a file that is no good is replaced
        opened = CudaDevice(artifact, int(ordinal or 0))
    try:
        measured = _measure_all(opened, plans, wanted, max(repeats, 1), progress or (lambda text: None))
    finally:
        opened.close()
    return Tuning(opened.gpu, tuple(one for one, _ in measured), _write(artifact, opened.gpu, measured))


def assignments(plan: Plan, values: Sequence[Mapping[str, int]] | None) -> list[dict[str, int]]:
    """Complete assignments of a plan's symbols, each once.

    Raises:
        UsageError: a value out of its symbol's range.
    """
    found: list[dict[str, int]] = []
    for one in values or [{}]:
        complete = {}
        for symbol in plan.symbols:
            value = one.get(symbol.name, symbol.sample)
            if not symbol.minimum <= value <= symbol.maximum:
                raise UsageError(f"{symbol.name} goes from {symbol.minimum} to {symbol.maximum}, got {value}")
            complete[symbol.name] = value
        if all(sizes.evaluate(check.condition, complete) for check in plan.checks) and complete not in found:
            found.append(complete)
    return found


def _measure_all(
    device: CudaDevice,
    plans: Mapping[str, Plan],
    wanted: Sequence[tuple[str, dict[str, int]]],
    repeats: int,
    progress: Progress,
) -> list[tuple[Measured, tuned.Key]]:
    jobs: dict[tuned.Key, tuple[str, dict[str, int], Launches, Launch, list[Tile]]] = {}
    for name, values in wanted:
        launches = make_launches(plans[name], values, device.chooser(name, measured=False))
        for launch in launches.items:
            variant = plans[name].steps[launch.step].variants[launch.variant]
            options = tiles.allowed(variant, values, device.code.present(variant.kernel))
            key = tuning_key(variant, values)
            if len(options) > 1 and launch.grid and key not in jobs:
                jobs[key] = name, values, launches, launch, options
    results = []
    state_sizes = resolve(plans)
    for _, values in wanted:
        state_sizes = {name: max(size, values.get(name, size)) for name, size in state_sizes.items()}
    workspace = device.workspace(state_sizes)
    try:
        for number, (key, (name, values, launches, launch, options)) in enumerate(jobs.items(), 1):
            where = ", ".join(f"{symbol}={value}" for symbol, value in values.items())
            progress(f"{number} of {len(jobs)}: {launch.kernel}{f' at {where}' if where else ''}")
            variant = plans[name].steps[launch.step].variants[launch.variant]
            with device.context as driver, Bench(device, workspace, driver, plans[name], launches) as bench:
                seconds = {
                    tile.name: bench.seconds(_with_tile(launch, variant, values, tile), repeats) for tile in options
                }
            best = min(seconds, key=seconds.__getitem__)
            found = Measured(name, launch.step, launch.kernel, values, seconds, launch.tile.name, best)
            results.append((found, key))
    finally:
        workspace.close()
    return results


def _with_tile(launch: Launch, variant: Variant, values: Mapping[str, int], tile: Tile) -> Launch:
    return replace(launch, tile=tile, grid=max(sizes.evaluate(variant.units, {**values, **tile.values()}), 0))


class Bench:
    """Memory for all operands of a call, and a clock."""

    def __init__(
        self, device: CudaDevice, workspace: CudaWorkspace, driver: Driver, plan: Plan, launches: Launches
    ) -> None:
        self._device, self._workspace, self._driver = device, workspace, driver
        self._plan, self._launches = plan, launches
        self._stack = ExitStack()
        self._addresses: Addresses = {}

    def __enter__(self) -> Bench:
        with self._stack:
            for kind, ports in (("input", self._plan.inputs), ("output", self._plan.outputs)):
                for index, port in enumerate(ports):
                    self._addresses[kind, index] = self._operand(port, kind)
            self._flush = self._block(2 * self._device.gpu.cache, "emptying the cache")
            self._events: list[object] = []
            for _ in range(2):
                event = self._driver("cuEventCreate", self._driver.api.CUevent_flags.CU_EVENT_DEFAULT)
                self._stack.callback(self._driver.status, "cuEventDestroy", event)
                self._events.append(event)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.status("cuStreamSynchronize", self._workspace.stream.handle)
        self._stack.close()

    def seconds(self, launch: Launch, repeats: int) -> float:
        """Median time of a launch."""
        alone = replace(self._launches, items=(launch,))
        call = self._workspace.assemble(self._plan.entry, alone)
        return statistics.median([self._once(call) for _ in range(WARM_UP + repeats)][WARM_UP:])

    def _once(self, call: PreparedCall) -> float:
        driver, stream = self._driver, self._workspace.stream.handle
        first, last = self._events
        if self._flush.bytes:
            driver("cuMemsetD8Async", self._flush.address, 0, self._flush.bytes, stream)
        driver("cuEventRecord", first, stream)
        call.each(driver, stream, self._addresses, lambda launch: None)
        driver("cuEventRecord", last, stream)
        driver("cuEventSynchronize", last)
        return 1e-3 * float(driver("cuEventElapsedTime", first, last))

    def _operand(self, port: Port, kind: str) -> int:
        """Memory with random content (indices: zeros, which every table has)."""
        shape = tuple(sizes.evaluate(size, self._launches.values) for size in port.shape)
        dtype = numpy_dtype(port.dtype)
        data = np.zeros(shape, dtype)
        if kind == "input" and dtype.kind not in "biu":
            data[...] = np.random.default_rng(0).standard_normal(shape, np.float32)
        block = self._block(data.nbytes, "inputs and outputs")
        if data.nbytes:
            self._driver(
                "cuMemcpyHtoDAsync", block.address, data.ctypes.data, data.nbytes, self._workspace.stream.handle
            )
        return block.address

    def _block(self, count: int, what: str) -> Block:
        block = self._device.memory.allocate(count, what)
        self._stack.callback(block.free)
        return block


def _write(artifact: Artifact, gpu: Gpu, measured: Sequence[tuple[Measured, tuned.Key]]) -> Path:
    choices = []
    for one, (kernel, arguments, units) in measured:
        best, default = (round(1e9 * one.seconds[name]) for name in (one.best, one.chosen))
        choices.append(tuned.Choice(kernel, arguments, units, one.best, best, default))
    return tuned.write(artifact, gpu, tuple(choices))

"""What one call at a time needs on a GPU: a stream, arena, states, fault words, counters, scratch, prepared calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import sizes
from ..binding import Shapes
from ..entry import index_error
from ..errors import ArtifactError
from ..launches import Launches, Operand
from ..plan import COUNTERS, Constant, Plan
from ..plan_check import nbytes
from ..state_sizes import bytes_of_states
from .calls import ALIGNMENT, Kernel, PreparedCall
from .context import Context
from .memory import Block, Memory, Pinned
from .modules import Modules
from .results import ResultPool
from .streams import Stream

MOST_CALLS = 16
"""Prepared calls, and CUDA graphs with them, that a workspace keeps; those used longest ago go first."""


class Weights:
    """The constants of all plans in the device's memory: runs of the weight file, one after the other."""

    def __init__(self, constants: list[Constant]) -> None:
        """Lay them out; what is not used on this kind of device is left out."""
        self._runs: list[tuple[int, int, int]] = []  # begin and end in the file, begin in the block
        self.bytes = 0
        for begin, end in sorted({(one.offset, one.offset + one.bytes) for one in constants if one.bytes}):
            if self._runs and begin <= _align(self._runs[-1][1], 64):
                first, last, place = self._runs[-1]
                self._runs[-1] = first, max(last, end), place
            else:
                place = _align(self.bytes)
                self._runs.append((begin, end, place))
            first, last, place = self._runs[-1]
            self.bytes = place + last - first
        self.address = 0

    def pieces(self, data: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Addresses and contents, of the data section of the weight file."""
        return [(self.address + place, data[begin:end]) for begin, end, place in self._runs]

    def at(self, offset: int) -> int:
        """The address of what is at an offset in the data section; 0 for a constant without bytes."""
        for begin, end, place in self._runs:
            if begin <= offset < end:
                return self.address + place + offset - begin
        return 0


@dataclass
class Loaded:
    """What all calls of a model on a GPU share."""

    context: Context
    memory: Memory
    modules: Modules
    results: ResultPool
    weights: Weights
    plans: Mapping[str, Plan]
    stream: Any  # the caller's, or None


class CudaWorkspace:
    """Working memory of one caller at a time; all of it is used in the order of its stream."""

    def __init__(self, loaded: Loaded, state_sizes: Mapping[str, int]) -> None:
        """Allocate states and words; arena and scratch grow with the calls.

        Args:
            loaded: what it is for.
            state_sizes: of the states.
        """
        self._loaded = loaded
        self._calls: OrderedDict[tuple[str, Shapes], PreparedCall] = OrderedDict()
        self._blocks: dict[str, Block] = {}
        self._words: Pinned | None = None
        self._closed = False
        self._states: dict[str, tuple[int, int]] = {}  # offset and bytes in their block
        self._faults: dict[str, int] = {}  # of entry points that can have faults: their first word
        count = words = 0
        for name, size in bytes_of_states(loaded.plans, state_sizes).items():
            self._states[name] = count, size
            count = _align(count + size)
        for name, plan in loaded.plans.items():
            if _uses(plan, "fault"):
                self._faults[name] = words
                words += len(plan.steps)
        self._counters = _align(4 * words)
        counters = 4 * COUNTERS if any(_uses(plan, "counters") for plan in loaded.plans.values()) else 0
        try:
            self.stream = Stream(loaded.context, loaded.stream)
            self._blocks["states"] = loaded.memory.allocate(count, "the states")
            self._blocks["words"] = loaded.memory.allocate(self._counters + counters, "fault words and counters")
            if words:
                self._words = Pinned(loaded.context, 4 * words)
                self._words.array[:] = 0
            with loaded.context as driver:
                if self._blocks["words"].bytes:
                    zeros = self._blocks["words"]
                    driver("cuMemsetD8Async", zeros.address, 0, zeros.bytes, self.stream.handle)
                for name in loaded.plans:
                    self.reset(name)
        except BaseException:
            self.close()
            raise

    # -- memory --------------------------------------------------------------------------------------------------------

    def block(self, name: str, count: int, what: str) -> Block:
        """A block of at least so many bytes, whose content may be lost; a larger one replaces a smaller one."""
        block = self._blocks.get(name)
        if block is None or block.bytes < count:
            if block is not None and block.bytes:
                with self._loaded.context as driver:
                    driver("cuStreamSynchronize", self.stream.handle)  # the old one may be in use
                del self._blocks[name]
                block.free()
            if name in ("arena", "scratch"):
                self._forget()  # its address is in there
            block = self._blocks[name] = self._loaded.memory.allocate(count, what)
        return block

    def reset(self, entry: str) -> None:
        """Set the states of an entry point to their initial values, in the order of the stream."""
        plan = self._loaded.plans[entry]
        if not plan.states:
            return
        constants = {constant.name: constant for constant in plan.constants}
        with self._loaded.context as driver:
            for state in plan.states:
                offset, count = self._states[state.name]
                if not count:
                    continue
                address = self._blocks["states"].address + offset
                if state.initial:
                    source = self._loaded.weights.at(constants[state.initial].offset)
                    driver("cuMemcpyDtoDAsync", address, source, count, self.stream.handle)
                else:
                    driver("cuMemsetD8Async", address, 0, count, self.stream.handle)

    def address(self, plan: Plan, operand: Operand) -> int:
        """Where an operand lies; 0 for inputs and outputs, which are the caller's."""
        if operand.kind == "buffer":
            return self._blocks["arena"].address + operand.offset
        if operand.kind == "constant":
            return self._loaded.weights.at(operand.offset)
        if operand.kind == "state":
            return self._blocks["states"].address + self._states[plan.states[operand.index].name][0]
        if operand.kind == "fault":
            return self._blocks["words"].address + 4 * self._faults[plan.entry] + operand.offset
        if operand.kind == "counters":
            return self._blocks["words"].address + self._counters
        return 0

    # -- calls ---------------------------------------------------------------------------------------------------------

    def prepare(self, entry: str, shapes: Shapes, launches: Launches) -> PreparedCall:
        """The call of an entry point with these shapes, ready to run; remembered.

        Raises:
            DeviceError: there is not enough memory.
            ArtifactError: a kernel cannot be loaded.
        """
        key = entry, shapes
        call = self._calls.get(key)
        if call is None:
            call = self.assemble(entry, launches)
            self._calls[key] = call
            while len(self._calls) > MOST_CALLS:
                _, oldest = self._calls.popitem(last=False)
                self._end([oldest])
        self._calls.move_to_end(key)
        return call

    def assemble(self, entry: str, launches: Launches) -> PreparedCall:
        """Load functions, make the memory large enough, and pack the arguments."""
        plan, modules = self._loaded.plans[entry], self._loaded.modules
        items = [item for item in launches.items if item.grid]
        functions = [modules.function(item.kernel, item.tile.name) for item in items]
        needs = {"global": 0, "profile": 0}
        for item, function in zip(items, functions, strict=True):
            binary = function.binary
            programs = item.grid * binary.cluster
            for kind in needs:
                each, alignment = getattr(binary, f"{kind}_scratch"), getattr(binary, f"{kind}_scratch_alignment")
                if alignment > ALIGNMENT and each:
                    raise ArtifactError(f"kernel {item.kernel}: wants scratch memory aligned to {alignment} bytes")
                needs[kind] = max(needs[kind], programs * each)
        self.block("arena", launches.arena_bytes, "the arena")
        split = _align(needs["global"])
        scratch = self.block("scratch", split + needs["profile"], "the kernels' own scratch memory").address
        pointers = (scratch if needs["global"] else 0, scratch + split if needs["profile"] else 0)
        kernels = [
            Kernel(item, function, [self.address(plan, operand) for operand in item.operands], pointers)
            for item, function in zip(items, functions, strict=True)
        ]
        inputs = [
            nbytes(port.dtype, (sizes.evaluate(size, launches.values) for size in port.shape)) for port in plan.inputs
        ]
        return PreparedCall(plan, launches, kernels, inputs)

    # -- faults --------------------------------------------------------------------------------------------------------

    def read_faults(self, entry: str) -> None:
        """Fetch the fault words of an entry point, in the order of the stream."""
        if entry not in self._faults or self._words is None:
            return
        first, count = 4 * self._faults[entry], 4 * len(self._loaded.plans[entry].steps)
        with self._loaded.context as driver:
            source = self._blocks["words"].address + first
            driver("cuMemcpyDtoHAsync", self._words.address + first, source, count, self.stream.handle)

    def check_faults(self) -> None:
        """Raise what the fetched words say, and clear them.

        Raises:
            InputError: names the step that met an index out of range.
        """
        if self._words is None or not self._words.array.any():
            return
        words = self._words.array.view(np.int32)
        position = int(np.flatnonzero(words)[0])
        entry = max((name for name, first in self._faults.items() if first <= position), key=self._faults.__getitem__)
        with self._loaded.context as driver:
            driver("cuStreamSynchronize", self.stream.handle)  # no copy of old words may come later
            driver("cuMemsetD8Async", self._blocks["words"].address, 0, 4 * len(words), self.stream.handle)
        words[:] = 0
        raise index_error(self._loaded.plans[entry], position - self._faults[entry])

    def synchronize(self) -> None:
        """Wait for the stream and raise what its calls met."""
        with self._loaded.context as driver:
            driver("cuStreamSynchronize", self.stream.handle)
        self.check_faults()

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the stream and free everything; twice does nothing."""
        if self._closed:
            return
        self._closed = True
        self._forget()
        for block in self._blocks.values():
            block.free()
        if self._words is not None:
            self._words.free()
        if hasattr(self, "stream"):
            self.stream.close()

    def _forget(self) -> None:
        calls = list(self._calls.values())
        self._calls.clear()
        self._end(calls)

    def _end(self, calls: list[PreparedCall]) -> None:
        """Destroy graphs, when the stream is done with them."""
        context = self._loaded.context
        stream = getattr(self, "stream", None)
        if stream is None or not calls:
            return

        def end() -> None:
            if not stream.closed:
                context.driver.status("cuStreamSynchronize", stream.handle)
            for call in calls:
                call.close(context.driver)

        context.quietly(end)

    def __del__(self) -> None:
        self.close()


def _uses(plan: Plan, kind: str) -> bool:
    return any(ref.kind == kind for step in plan.steps for variant in step.variants for ref in variant.operands)


def _align(count: int, alignment: int = ALIGNMENT) -> int:
    return -(-count // alignment) * alignment

"""Measuring kernels while compiling; what ``compile --tune`` does.

A family offers other ways of computing the same (``Made.others``). Each is compiled for the first CPU target that runs
here, timed at the sample's sizes as calls run it (``tw_tune.c``), and the fastest is kept. What was measured is stored
in the user's cache under everything that it depends on: the sources with their headers, the compiler, the target, the
processor, the number of threads and the sizes. So compiling again gives the same kernels without measuring.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime import sizes
from ...runtime.errors import UsageError
from ...runtime.plan_check import ITEM_BYTES
from ..cache import Cache, key_of
from ..kernel import NAME, KernelCode
from ..regions import Made
from ..symbols import PREFIX
from ..targets import Target
from .toolchain import COMPILE_FLAGS, INCLUDE_DIRECTORY, Compiler, Source, compile_objects, link_shared

ROUNDS = 12
"""Times that each candidate is run, in turns with the others; the shortest counts, as a busy machine only adds."""
SECONDS = 2.0
"""About how long the candidates of one kernel are measured at most, after three rounds."""
MARGIN = 1.02
"""How much faster than the model's choice another has to be: less is noise."""
OTHER_MEMORY = 64 << 20
"""Bytes that are read before each run, so that constants come from memory as they do in a large model."""

Values = Mapping[str, int]


@dataclass(frozen=True)
class Tuned:
    """What was measured of one kernel.

    Attributes:
        code: the kernel that was kept.
        values: of the symbols that it depends on, by their names in kernels.
        seconds: by blocking, the model's choice first.
        chosen: the blocking that the model chooses.
        best: the one that was kept.
    """

    code: KernelCode
    values: Values
    seconds: Mapping[str, float]
    chosen: str
    best: str


@dataclass(frozen=True)
class Tunings:
    """What was measured of an artifact's kernels, by their names; for which target, where and with how many threads."""

    target: str
    processor: str
    threads: int
    kernels: Mapping[str, Tuned]

    def describe(self) -> dict[str, Any]:
        """For the manifest; sizes by the names that users gave. Times in nanoseconds."""
        measured = [
            {
                "kernel": name,
                "values": {symbol.removeprefix(PREFIX): value for symbol, value in item.values.items()},
                "nanoseconds": {way: round(seconds * 1e9) for way, seconds in item.seconds.items()},
                "chosen": item.chosen,
                "best": item.best,
            }
            for name, item in self.kernels.items()
        ]
        where = {"target": self.target, "processor": self.processor, "threads": self.threads}
        return where | {"measured": measured}


@dataclass(frozen=True)
class Candidates:
    """Kernels that do the same with the same operands, and whether each operand is a constant."""

    codes: tuple[KernelCode, ...]
    constant: tuple[bool, ...]
    values: Values


Measure = Callable[[Candidates], Sequence[float]]
Progress = Callable[[str], None]


class Tuner:
    """Chooses among the kernels that families offer, for one target.

    Args:
        target: what is measured.
        compiler: who compiles the candidates.
        cache: where objects and measurements are looked up and stored.
        progress: called with words about the kernel that is measured.
        measure: seconds of each candidate; by default :class:`Bench`.
    """

    def __init__(
        self,
        target: Target,
        compiler: Compiler,
        cache: Cache | None,
        progress: Progress | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.target = target
        self.processor = processor_name()
        self.threads = len(os.sched_getaffinity(0))
        self.tuned: list[Tuned] = []
        self._compiler = compiler
        self._cache = cache
        self._progress = progress or (lambda text: None)
        self._measure = measure or Bench(target, compiler, cache, self.threads)
        self._known: dict[str, Tuned] = {}

    @property
    def base(self) -> str:
        """The base instruction set that is measured."""
        return self.target.base.name

    def choose(self, made: Made, values: Values) -> Made:
        """The kernel with the fastest of its codes.

        Args:
            made: with what else there is.
            values: sizes to measure at, for all symbols.
        """
        if not made.others:
            return made
        codes = (made.code, *made.others)
        constant = tuple(storage.kind == "constant" for storage in made.storages)
        candidates = Candidates(
            codes, constant, {name: values[name] for name in sorted(values) if name in _used(codes)}
        )
        key = self._key(candidates)
        if key not in self._known:
            self._known[key] = self._tune(key, candidates)
            self.tuned.append(self._known[key])
        best = self._known[key].best
        return replace(made, code=next(code for code in codes if code.choice == best), others=())

    def finish(self, name_of: Callable[[KernelCode], str]) -> Tunings:
        """All that was measured, given the kernels' names."""
        return Tunings(
            self.target.name, self.processor, self.threads, {name_of(item.code): item for item in self.tuned}
        )

    def _tune(self, key: str, candidates: Candidates) -> Tuned:
        codes = candidates.codes
        names = [code.choice for code in codes]
        seconds = self._stored(key, names)
        if seconds is None:
            self._progress(f"{codes[0].family} {codes[0].label}: {len(codes)} ways")
            seconds = dict(zip(names, self._measure(candidates), strict=True))
            self._store(key, seconds)
        best = fastest(seconds)
        return Tuned(codes[names.index(best)], candidates.values, seconds, names[0], best)

    def _key(self, candidates: Candidates) -> str:
        """Identity of a measurement: everything that its outcome depends on, but the time of day."""
        headers = [part for path in sorted(INCLUDE_DIRECTORY.glob("*.[ch]")) for part in (path.name, path.read_bytes())]
        compiler = (self._compiler.version, *COMPILE_FLAGS, *self.target.flags(self._compiler.kind))
        where = (self.target.name, self.processor, str(self.threads))
        what = json.dumps([candidates.values, candidates.constant])
        return key_of(("tuned", *where, *compiler, what, *(code.source for code in candidates.codes), *headers))

    def _stored(self, key: str, names: Sequence[str]) -> dict[str, float] | None:
        try:
            content = self._cache.get(key) if self._cache else None
        except OSError as error:
            warnings.warn(f"the kernel cache cannot be read ({error}); measuring instead", stacklevel=2)
            return None
        if content is None:
            return None
        found: dict[str, float] = json.loads(content)
        return {name: found[name] for name in names}

    def _store(self, key: str, seconds: Mapping[str, float]) -> None:
        try:
            if self._cache is not None:
                self._cache.put(key, json.dumps(seconds).encode())
        except OSError as error:
            warnings.warn(f"the kernel cache cannot be written ({error}); measured again next time", stacklevel=2)


def fastest(seconds: Mapping[str, float]) -> str:
    """The name with the least time; the first one, which the model chose, unless another gains :data:`MARGIN`."""
    first = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[first] > seconds[best] * MARGIN else first


def tuned_target(targets: Sequence[Target], present: frozenset[str]) -> Target:
    """The target whose kernels are measured: the one that this machine would run.

    Args:
        targets: CPU targets in the artifact's order.
        present: features of this processor.

    Raises:
        UsageError: this machine runs none of them; says what it lacks.
    """
    for target in targets:
        if present.issuperset(target.features):
            return target
    if not targets:
        raise UsageError(
            "--tune measures CPU kernels, and no target is a CPU; GPU kernels are measured after compiling, by "
            "'tilewright tune DIR'"
        )
    lacks = "; ".join(f"{one.name} needs {' '.join(sorted(set(one.features) - present))}" for one in targets)
    raise UsageError(
        f"--tune measures kernels on this machine, which runs none of the targets ({lacks}): compile on a machine that "
        "does, or leave --tune out, and a model of the machine chooses"
    )


def processor_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself."""
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), "unknown")


class Bench:
    """Runs candidates on this machine."""

    def __init__(self, target: Target, compiler: Compiler, cache: Cache | None, threads: int) -> None:
        self._target, self._compiler, self._cache, self._threads = target, compiler, cache, threads
        self._other: np.ndarray | None = None

    def __call__(self, candidates: Candidates) -> list[float]:
        """Seconds of each candidate.

        Raises:
            CompileError: one does not compile.
        """
        if self._other is None:
            self._other = np.zeros(OTHER_MEMORY, np.uint8)
            self._other[:: 1 << 12] = 1  # pages of its own
        codes, values = candidates.codes, candidates.values
        library = self._library(codes)
        arrays = [
            _array(int(sizes.evaluate(parameter.elements(), values)), parameter.dtype)
            for parameter in codes[0].parameters
        ]
        warm = [0 if constant else array.nbytes for array, constant in zip(arrays, candidates.constant, strict=True)]
        buffers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        run = library.tw_tune
        run.restype = ctypes.c_int64
        library.tw_pool_create.restype = ctypes.c_void_p
        pool = ctypes.c_void_p(library.tw_pool_create(self._threads))
        try:
            jobs = []
            for number, code in enumerate(codes):
                work = sizes.evaluate(sizes.add(code.flops, code.bytes), values)
                dims = (ctypes.c_int64 * max(len(code.symbols), 1))(*(values[name] for name in code.symbols))
                jobs.append(
                    (
                        pool, ctypes.c_int32(self._threads), getattr(library, _function(number)), buffers,
                        ctypes.c_int32(len(arrays)), (ctypes.c_int64 * len(arrays))(*warm), dims,
                        ctypes.c_int64(sizes.evaluate(code.units, values)), ctypes.c_int64(work),
                        ctypes.c_void_p(self._other.ctypes.data), ctypes.c_int64(OTHER_MEMORY),
                    )
                )  # fmt: skip
            best = [run(*job) for job in jobs]
            deadline = time.monotonic() + SECONDS
            for turn in range(1, ROUNDS):
                if turn >= 3 and time.monotonic() > deadline:
                    break
                best = [min(before, run(*job)) for before, job in zip(best, jobs, strict=True)]
        finally:
            library.tw_pool_destroy(pool)
        return [nanoseconds * 1e-9 for nanoseconds in best]

    def _library(self, codes: Sequence[KernelCode]) -> ctypes.CDLL:
        exported = "#pragma GCC visibility push(default)\n"
        sources = [
            Source(_function(number), exported + code.source.replace(NAME, _function(number)))
            for number, code in enumerate(codes)
        ]
        for name in ("tw_tune", "tw_runtime"):
            sources.append(Source(name, (INCLUDE_DIRECTORY / f"{name}.c").read_text()))
        objects = compile_objects(self._compiler, sources, self._target, cache=self._cache)
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(link_shared(self._compiler, objects, self._target))
            file.flush()
            return ctypes.CDLL(file.name)


def _function(number: int) -> str:
    return f"tw_candidate_{number}"


def _used(codes: Sequence[KernelCode]) -> set[str]:
    """The symbols that candidates depend on."""
    found = [size for code in codes for size in (code.units, code.flops, code.bytes, *code.symbols)]
    found += [extent for parameter in codes[0].parameters for extent in parameter.shape]
    return {name for size in found for name in sizes.symbols_of(size)}


def _array(elements: int, dtype: str) -> np.ndarray:
    """A buffer on a cache line's border: floating-point numbers around 0, and zeros of other types, which index."""
    size = ITEM_BYTES[dtype]
    raw = np.zeros(elements * size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + elements * size]
    some = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    if dtype in ("float32", "float64", "float16"):
        array.view(dtype)[:] = np.resize(some, elements)
    elif dtype == "bfloat16":
        array.view(np.uint16)[:] = np.resize((some.view(np.uint32) >> 16).astype(np.uint16), elements)
    return array

"""Compiling Triton kernels ahead of time: every tile of every kernel for every architecture, from the cache or anew.

A tile is *rejected* for an architecture where it needs more shared memory than a program may have, or where registers
spill: another tile of the kernel then serves. What was rejected, and why, is kept. A kernel of which no tile is left
cannot be compiled for that architecture, which is an error.

The same kernel gives the same bytes on every machine with the same Triton.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import CompileError
from ...runtime.gpus import Architecture
from ...runtime.plan import Tile
from ..cache import Cache, key_of
from ..kernel_table import KernelSource
from .pool import SCRIPT, Pool, find_triton
from .ptx import check_abi, parse_log

HEADERS = Path(__file__).parents[1] / "templates" / "triton"
FORMAT = "1"
"""Of the cache's entries; raised when :class:`Compiled` changes."""


@dataclass(frozen=True)
class Compiled:
    """One binary: a kernel with the constants of one tile, for one architecture.

    Attributes:
        function: its name in the cubin.
        warps: per program; more than the tile's where Triton gives roles to warps.
        cluster: programs that run together.
        shared: bytes of dynamic shared memory to launch with; ``static_shared`` comes on top.
        registers: per thread.
        spill_stores: bytes per thread, likewise ``spill_loads`` and ``stack``.
        global_scratch: bytes per program that the first of the two last arguments points to, aligned to
            ``global_scratch_alignment``; ``profile_scratch`` likewise for the second one.
        cubin: the binary.
        ptx: what it was assembled from.
    """

    function: str
    warps: int
    cluster: int
    shared: int
    static_shared: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    global_scratch: int
    global_scratch_alignment: int
    profile_scratch: int
    profile_scratch_alignment: int
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)

    def problem(self, architecture: Architecture) -> str:
        """Why the binary is no good for the architecture; empty when it is."""
        shared = self.shared + self.static_shared
        if shared > architecture.shared_limit:
            return f"needs {shared} bytes of shared memory, {architecture.name} has {architecture.shared_limit}"
        if self.spill_stores or self.spill_loads:
            return (
                f"spills registers ({self.spill_stores} bytes stored, {self.spill_loads} loaded per thread, "
                f"{self.registers} registers)"
            )
        return ""


@dataclass(frozen=True)
class Job:
    """One binary to make."""

    kernel: KernelSource
    tile: Tile
    architecture: Architecture

    @property
    def title(self) -> str:
        """For messages."""
        tile = f" [{self.tile.name}]" if self.tile.name else ""
        return f"{self.kernel.name}{tile} for {self.architecture.name}"

    def request(self) -> dict[str, Any]:
        """What a worker is told; everything that the binary depends on besides headers and versions."""
        return {
            "name": self.kernel.name,
            "text": self.kernel.text,
            "signature": list(self.kernel.signature),
            "constants": self.tile.values(),
            "warps": self.tile.warps,
            "stages": self.tile.stages,
            "capability": self.architecture.capability,
        }


@dataclass(frozen=True)
class Rejected:
    """A tile that was compiled and cannot be used on an architecture, and why."""

    kernel: str
    tile: str
    architecture: str
    reason: str


@dataclass(frozen=True)
class ArchitectureBinaries:
    """The usable binaries for one architecture.

    Attributes:
        tiles: kernel name → tile name → binary, in the order of the kernel's tiles: the first is the default one.
        rejected: the tiles that are not among them though they were meant for the architecture.
    """

    architecture: Architecture
    tiles: Mapping[str, Mapping[str, Compiled]]
    rejected: tuple[Rejected, ...]


def headers() -> dict[str, str]:
    """Module name → text of what kernel sources may import besides Triton."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(HEADERS.glob("*.py"))}


def jobs_of(kernel: KernelSource, architecture: Architecture) -> list[Job]:
    """The binaries of a kernel for an architecture, the default one first."""
    return [
        Job(kernel, tile, architecture)
        for tile in kernel.tiles
        if not tile.architectures or architecture.name in tile.architectures
    ]


def compile_for(
    kernels: Sequence[KernelSource],
    architectures: Sequence[Architecture],
    *,
    cache: Cache | None = None,
    progress: Callable[[str], None] | None = None,
    pool: Pool | None = None,
) -> list[ArchitectureBinaries]:
    """Compile all kernels for all architectures and keep the tiles that are good.

    Args:
        kernels: sources with their tiles and signatures.
        architectures: to compile for.
        cache: of binaries.
        progress: called with ``"3 of 12: name [tile] for sm_90"`` for every binary, from several threads.
        pool: of workers to use; by default one for this call.

    Raises:
        CompileError: a kernel does not compile, its parameters are not those stated, or no tile of it can be used on
            an architecture.
    """
    jobs = [job for architecture in architectures for kernel in kernels for job in jobs_of(kernel, architecture)]
    compiled = compile_jobs(jobs, cache=cache, progress=progress, pool=pool)
    by_architecture: dict[str, dict[str, dict[str, Compiled]]] = {}
    for job, binary in zip(jobs, compiled, strict=True):
        of_kernels = by_architecture.setdefault(job.architecture.name, {})
        of_kernels.setdefault(job.kernel.name, {})[job.tile.name] = binary
    return [
        _select(architecture, kernels, by_architecture.get(architecture.name, {})) for architecture in architectures
    ]


def compile_jobs(
    jobs: Sequence[Job],
    *,
    cache: Cache | None = None,
    progress: Callable[[str], None] | None = None,
    pool: Pool | None = None,
) -> list[Compiled]:
    """Make binaries, in the order of the jobs; no process is started for those that the cache has.

    Raises:
        CompileError: a kernel does not compile, or its parameters are not those stated.
    """
    _, version = find_triton()
    texts = pool.headers if pool is not None else headers()
    common = ["triton", FORMAT, _code_digest(), version, json.dumps(texts, sort_keys=True)]
    keys = [key_of([*common, json.dumps(job.request())]) for job in jobs]
    results: list[Compiled | None] = [_read(cache, key) for key in keys]
    number = itertools.count(1)

    def report(job: Job) -> None:
        if progress is not None:
            progress(f"{next(number)} of {len(jobs)}: {job.title}")

    for job, result in zip(jobs, results, strict=True):
        if result is not None:
            report(job)

    place_of: dict[str, int] = {}  # of the first job that needs it: equal jobs are compiled once
    for place, key in enumerate(keys):
        if results[place] is None:
            place_of.setdefault(key, place)
    places = list(place_of.values())

    def finished(position: int, answer: dict[str, Any]) -> None:
        place = places[position]
        results[place] = compiled = _understand(jobs[place], answer)
        if cache is not None:
            cache.put(keys[place], _pack(compiled))
        report(jobs[place])

    if places:
        requests = [jobs[place].request() for place in places]
        if pool is not None:
            pool.run(requests, finished)
        else:
            with Pool(texts) as own:
                own.run(requests, finished)
    found = {key: result for key, result in zip(keys, results, strict=True) if result is not None}
    return [found[key] for key in keys]


def _select(
    architecture: Architecture, kernels: Iterable[KernelSource], compiled: Mapping[str, Mapping[str, Compiled]]
) -> ArchitectureBinaries:
    tiles: dict[str, dict[str, Compiled]] = {}
    rejected: list[Rejected] = []
    for kernel in kernels:
        good: dict[str, Compiled] = {}
        reasons: list[str] = []
        for tile, binary in compiled.get(kernel.name, {}).items():
            if reason := binary.problem(architecture):
                reasons.append(f"  {tile}: {reason}")
                rejected.append(Rejected(kernel.name, tile, architecture.name, reason))
            else:
                good[tile] = binary
        if not good:
            why = "\n".join(reasons) or "  none of its tiles is meant for it"
            raise CompileError(f"kernel {kernel.name}: no tile can be used on {architecture.name}\n{why}")
        tiles[kernel.name] = good
    return ArchitectureBinaries(architecture, tiles, tuple(rejected))


def _understand(job: Job, answer: Mapping[str, Any]) -> Compiled:
    """The binary in a worker's answer, its parameters checked."""
    if "error" in answer:
        said = f"\n{answer['messages']}" if answer.get("messages") else ""
        where = "ptxas refuses it" if answer["stage"] == "ptxas" else "cannot be compiled"
        raise CompileError(f"kernel {job.title}: {where}\n{answer['error']}{said}")
    facts = answer["metadata"]
    function = check_abi(job.title, answer["ptx"], job.kernel.signature, facts["num_warps"])
    try:
        used = parse_log(answer["log"])
    except ValueError as error:
        raise CompileError(f"kernel {job.title}: {error}") from None
    return Compiled(
        function=function,
        warps=facts["num_warps"],
        cluster=facts["num_ctas"],
        shared=facts["shared"],
        static_shared=used.static_shared,
        registers=used.registers,
        spill_stores=used.spill_stores,
        spill_loads=used.spill_loads,
        stack=used.stack,
        global_scratch=facts["global_scratch_size"],
        global_scratch_alignment=facts["global_scratch_align"],
        profile_scratch=facts["profile_scratch_size"],
        profile_scratch_alignment=facts["profile_scratch_align"],
        cubin=base64.b64decode(answer["cubin"]),
        ptx=answer["ptx"],
    )


def _pack(compiled: Compiled) -> bytes:
    """An entry of the cache: one line of JSON, then the binary."""
    facts = {item.name: getattr(compiled, item.name) for item in dataclasses.fields(Compiled) if item.name != "cubin"}
    return json.dumps(facts).encode() + b"\n" + compiled.cubin


def _read(cache: Cache | None, key: str) -> Compiled | None:
    content = cache.get(key) if cache is not None else None
    if content is None:
        return None
    facts, _, cubin = content.partition(b"\n")
    return Compiled(**json.loads(facts), cubin=cubin)


def _code_digest() -> str:
    """Of the code that decides how a kernel is compiled."""
    return hashlib.sha256(SCRIPT.read_bytes()).hexdigest()

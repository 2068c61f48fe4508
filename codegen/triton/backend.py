"""The Triton backend: the binaries that an artifact holds for GPUs, their table, and the sources they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from ...runtime import binaries as tables
from ...runtime.binaries import Binaries, Binary, KernelBinaries, RejectedTile
from ...runtime.errors import CompileError, UsageError
from ...runtime.gpus import ARCHITECTURES
from ...runtime.plan import Buffer, Constant, Plan, Port, Ref, StateBuffer
from ..artifact import TargetBinaries
from ..cache import Cache
from ..kernel_table import KernelSource
from ..targets import GpuTarget
from .compiler import ArchitectureBinaries, Compiled, compile_for, headers
from .dialect import POINTERS
from .pool import Pool, find_triton

_FACTS = tuple(item.name for item in dataclasses.fields(Binary) if item.name not in ("tile", "cubin", "ptx"))


def build(
    kernels: Sequence[KernelSource],
    targets: Sequence[GpuTarget],
    cache: Cache | None,
    progress: Callable[[str], None] | None = None,
    ptx: bool = False,
    *,
    plans: Iterable[Plan] = (),
    pool: Pool | None = None,
) -> list[TargetBinaries]:
    """Compile all kernels for every target: cubins, and their table with the tiles that were rejected.

    Args:
        kernels: sources with tiles and signatures.
        targets: in order of preference.
        cache: of binaries.
        progress: called with ``"3 of 12: name [tile] for sm_90"`` for every binary.
        ptx: also store PTX, with the newest of the targets whose PTX newer GPUs accept.
        plans: what will call the kernels; their operands and sizes must be those of the signatures.
        pool: of worker processes; by default one for this call.

    Raises:
        CompileError: a kernel does not compile, fits no target, or is called with other arguments than it takes.
        UsageError: PTX is asked for and no target has any that newer GPUs accept.
    """
    carrier = _carrier(targets) if ptx else None
    check_calls(plans, kernels)
    architectures = [target.architecture for target in targets]
    built = compile_for(kernels, architectures, cache=cache, progress=progress, pool=pool)
    return [
        TargetBinaries(target.name, (), _files(kernels, of_target, target == carrier), tables.FILE_NAME)
        for target, of_target in zip(targets, built, strict=True)
    ]


def sources(kernels: Iterable[KernelSource]) -> dict[str, bytes]:
    """The files of ``kernels/triton/``: a module per kernel, and those that they import."""
    texts = {kernel.name: kernel.text for kernel in kernels} | headers()
    return {f"{name}.py": text.encode() for name, text in texts.items()}


def check_calls(plans: Iterable[Plan], kernels: Iterable[KernelSource]) -> None:
    """Compare what plans call kernels with to the kernels' signatures: operands by dtype, then sizes.

    Raises:
        CompileError: names the step and the kernel.
    """
    signatures = {kernel.name: kernel.signature for kernel in kernels}
    for plan in plans:
        for step in plan.steps:
            for variant in step.variants:
                signature = signatures.get(variant.kernel)
                if signature is None:
                    raise CompileError(f"step {step.name}: there is no kernel {variant.kernel}")
                pointers = tuple(POINTERS[_dtype(plan, ref)] for ref in variant.operands)
                count = len(pointers)
                fits = signature[:count] == pointers and set(signature[count:]) <= set(tables.INTEGERS)
                if not fits or len(signature) != count + len(variant.sizes):
                    raise CompileError(
                        f"step {step.name} calls kernel {variant.kernel} with ({', '.join(pointers)}) and "
                        f"{len(variant.sizes)} sizes, but it takes ({', '.join(signature)}) (an error of the compiler)"
                    )


def _dtype(plan: Plan, ref: Ref) -> str:
    if ref.kind in ("fault", "counters"):
        return "int32"
    values: dict[str, Sequence[Port | StateBuffer | Constant | Buffer]] = {
        "input": plan.inputs, "output": plan.outputs, "state": plan.states, "constant": plan.constants,
        "buffer": plan.buffers,
    }  # fmt: skip
    return values[ref.kind][ref.index].dtype


def _carrier(targets: Sequence[GpuTarget]) -> GpuTarget:
    """The target that PTX is stored with. That of later architectures names instructions which no other GPU has."""
    portable = [target for target in targets if not target.architecture.exact]
    if not portable:
        names = " or ".join(f"cuda:{one.name}" for one in ARCHITECTURES.values() if not one.exact)
        raise UsageError(
            f"--ptx: what is compiled for {', '.join(target.name for target in targets)} runs on no newer GPU, as PTX "
            f"either; name {names} as one more target, whose PTX all newer GPUs accept"
        )
    return max(portable, key=lambda target: target.architecture.capability)


def _files(kernels: Sequence[KernelSource], built: ArchitectureBinaries, ptx: bool) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    listed = []
    for kernel in kernels:
        found = []
        for tile, compiled in built.tiles[kernel.name].items():
            name = f"{kernel.name}.{tile}" if tile else kernel.name
            files[f"{name}.cubin"] = compiled.cubin
            if ptx:
                files[f"{name}.ptx"] = compiled.ptx.encode()
            found.append(_entry(tile, f"{name}.cubin", f"{name}.ptx" if ptx else "", compiled))
        listed.append(KernelBinaries(kernel.name, kernel.signature, tuple(found)))
    rejected = tuple(RejectedTile(one.kernel, one.tile, one.reason) for one in built.rejected)
    _, version = find_triton()
    table = Binaries(built.architecture.name, f"Triton {version}", tuple(listed), rejected)
    content = tables.dump(table)
    tables.parse(content, tables.FILE_NAME)
    files[tables.FILE_NAME] = content
    return files


def _entry(tile: str, cubin: str, ptx: str, compiled: Compiled) -> Binary:
    return Binary(tile, cubin, ptx, **{name: getattr(compiled, name) for name in _FACTS})

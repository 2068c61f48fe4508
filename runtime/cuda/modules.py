"""The code of an artifact on a GPU: which architecture's binaries, and their functions, loaded when first used."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from .. import binaries, gpus
from ..artifact import Artifact
from ..binaries import Binaries, Binary
from ..errors import ArtifactError
from ..gpus import Gpu
from ..manifest import FILE_NAME, Target
from ..plan import Plan
from .context import Context
from .driver import DriverError
from .memory import Memory

KIB = 1024
STATIC_LIMIT = 48 * KIB
"""Bytes of shared memory that a program may have without asking."""

_UNLOADABLE = (
    "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_INVALID_PTX", "CUDA_ERROR_INVALID_SOURCE",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "CUDA_ERROR_JIT_COMPILER_NOT_FOUND", "CUDA_ERROR_NOT_FOUND",
)  # fmt: skip


@dataclass(frozen=True)
class Code:
    """The binaries for one GPU, read and checked, but not loaded.

    Attributes:
        target: of the artifact.
        table: of its binaries.
        images: tile by kernel and tile name → file's name and content: cubin, or PTX where only that runs.
        ptx: whether it is PTX.
    """

    target: Target
    table: Binaries
    images: Mapping[tuple[str, str], tuple[str, bytes]]
    ptx: bool

    def present(self, kernel: str) -> dict[str, Binary]:
        """The binaries of a kernel that can be loaded, by tile."""
        return {
            name: binary for name, binary in self.table.by_name[kernel].tiles.items() if (kernel, name) in self.images
        }


def choose_target(artifact: Artifact, gpu: Gpu) -> tuple[Target, Binaries, bool]:
    """The target whose code runs on a GPU, the table of its binaries, and whether its PTX is what runs.

    Raises:
        ArtifactError: none does; lists those that the artifact has.
    """
    targets = {
        target.name.partition(":")[2]: target
        for target in artifact.manifest.targets
        if target.name.partition(":")[0] == "cuda"
    }
    tables = {name: _table(artifact, target) for name, target in targets.items()}
    with_ptx = [name for name, table in tables.items() if all(_has_ptx(kernel) for kernel in table.kernels)]
    found = gpus.fitting(targets, gpu.major, gpu.minor, with_ptx)
    if found is None:
        names = ", ".join(f"cuda:{name}" for name in targets) or "none"
        raise ArtifactError(
            f"{artifact.path / FILE_NAME}: no kernels for {gpu}: the artifact has {names}. "
            f"Compile the model with --target {_suggestion(gpu)}"
        )
    name, ptx = found
    return targets[name], tables[name], ptx


def read_code(artifact: Artifact, gpu: Gpu) -> Code:
    """All code for a GPU, every file checked against the manifest, and the plans against the code.

    Raises:
        ArtifactError: no architecture fits, a file is damaged, or a plan and the binaries disagree.
    """
    target, table, ptx = choose_target(artifact, gpu)
    folder = PurePosixPath(target.library).parent
    images = {}
    for kernel in table.kernels:
        for binary in kernel.binaries:
            name = binary.ptx if ptx else binary.cubin
            limit = gpu.shared_limit
            if name and binary.shared + binary.static_shared <= limit:
                path = (folder / name).as_posix()
                images[kernel.name, binary.tile] = path, artifact.content(path)
    code = Code(target, table, images, ptx)
    for entry, plan in artifact.devices["cuda"].items():
        _check_plan(f"{artifact.path}: entry {entry!r}", plan, code)
    return code


def _table(artifact: Artifact, target: Target) -> Binaries:
    table = binaries.parse(artifact.content(target.library), str(artifact.path / target.library))
    if f"cuda:{table.architecture}" != target.name:
        raise ArtifactError(f"{artifact.path / target.library}: is the table of {table.architecture}")
    return table


def _has_ptx(kernel: binaries.KernelBinaries) -> bool:
    return any(binary.ptx for binary in kernel.binaries)


def _suggestion(gpu: Gpu) -> str:
    fits = [one for one in gpus.ARCHITECTURES.values() if one.runs_binary(gpu.major, gpu.minor)]
    return f"cuda:{fits[-1].name}" if fits else "one of those and --ptx, which newer GPUs run"


def _check_plan(where: str, plan: Plan, code: Code) -> None:
    for index, step in enumerate(plan.steps):
        for variant in step.variants:
            kernel = code.table.by_name.get(variant.kernel)
            if kernel is None:
                raise ArtifactError(
                    f"{where}: step {index} runs {variant.kernel}, which {code.target.name} does not have"
                )
            pointers = sum(kind.startswith("*") for kind in kernel.parameters)
            if (pointers, len(kernel.parameters)) != (
                len(variant.operands),
                len(variant.operands) + len(variant.sizes),
            ):
                raise ArtifactError(f"{where}: step {index} calls {variant.kernel} with other arguments than it takes")
            if not any(tile.name in code.present(variant.kernel) for tile in variant.tiles):
                raise ArtifactError(f"{where}: step {index}: no binary of {variant.kernel} fits the GPU")


@dataclass(frozen=True)
class Function:
    """A function on the device, with what it is launched by."""

    handle: Any
    binary: Binary
    parameters: tuple[str, ...]


class Modules:
    """Loaded code; functions are loaded when they are first asked for, and stay."""

    def __init__(self, code: Code, memory: Memory) -> None:
        self.code = code
        self._memory = memory
        self._context: Context = memory.context
        self._loaded: list[Any] = []
        self._functions: dict[tuple[str, str], Function] = {}
        self._lock = threading.Lock()

    def function(self, kernel: str, tile: str) -> Function:
        """The function of a kernel and tile.

        Raises:
            ArtifactError: the driver does not take the binary.
            DeviceError: there is no memory for it.
        """
        with self._lock:
            found = self._functions.get((kernel, tile))
            if found is None:
                found = self._functions[kernel, tile] = self._load(kernel, tile)
            return found

    def _load(self, kernel: str, tile: str) -> Function:
        listed = self.code.table.by_name[kernel]
        binary = listed.tiles[tile]
        file, content = self.code.images[kernel, tile]
        with self._context as driver:
            try:
                module = driver("cuModuleLoadData", content + b"\0" if self.code.ptx else content)
                self._loaded.append(module)
                self._context.enter()
                handle = driver("cuModuleGetFunction", module, binary.function.encode())
                if binary.shared + binary.static_shared > STATIC_LIMIT:
                    attribute = driver.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver("cuFuncSetAttribute", handle, attribute, binary.shared)
            except DriverError as error:
                if error.code in _UNLOADABLE:
                    raise ArtifactError(f"{file}: the GPU's driver does not take it: {error}") from None
                raise self._memory.exhausted(error, len(content), f"the code of {kernel}") from None
        return Function(handle, binary, listed.parameters)

    def close(self) -> None:
        """Unload everything; nothing of it may be running."""
        with self._lock:
            loaded, self._loaded = self._loaded, []
            self._functions.clear()
        for module in loaded:
            self._context.quietly(lambda module=module: self._context.driver("cuModuleUnload", module))  # type: ignore[misc]
            self._context.leave()

    def __del__(self) -> None:
        self.close()

"""Fixtures for kernels in Triton: ``interpret`` runs a source on numpy arrays, ``compile_cubin`` compiles it for a GPU.

::

    def test_it(interpret):
        y, = interpret(source, "kernel", [x, y], sizes=[n], constants={"BLOCK": 64}, grid=3)[1:]

Arguments of the kernel are the arrays, then the sizes, then the constants. Arrays are copied, C-contiguous and 16-byte
aligned, next to no other; what the kernel touches outside of them fails the test. The result has all arrays as they
are afterwards. bfloat16 arrays have the dtype ``ml_dtypes.bfloat16``; bool arrays are uint8 to the kernel.

::

    def test_it(compile_cubin):
        compile_cubin.good(source, "kernel", ["*fp32", "*fp32", "i32"], tile)      # no spills on sm_80 and sm_90
        binary = compile_cubin(source, "kernel", ["*fp32", "*fp32", "i32"], tile, "sm_90")
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tilewright.codegen.architectures import architecture
from tilewright.codegen.lower import KernelSource
from tilewright.codegen.triton.compiler import Compiled, Job, compile_jobs, headers
from tilewright.codegen.triton.pool import Pool
from tilewright.runtime.interpreter.launch import Launch, Operand
from tilewright.runtime.interpreter.memory import Shared
from tilewright.runtime.interpreter.process import Interpreter
from tilewright.runtime.plan import Tile

TEMPLATES = Path(__file__).parents[3] / "codegen" / "templates" / "triton"
GAP = 64


class Interpret:
    """Runs kernel sources in one worker, which all tests of a session share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for module in TEMPLATES.glob("*.py"):
            shutil.copy(module, folder)
        self.interpreter = Interpreter(folder)

    def __call__(
        self,
        source_text: str,
        name: str,
        arrays: Sequence[np.ndarray],
        sizes: Sequence[int] = (),
        constants: Mapping[str, int] | None = None,
        grid: int = 1,
        size_type: str = "i64",
    ) -> list[np.ndarray]:
        """Run kernel ``name`` of a source; returns the arrays as they are afterwards."""
        file = f"kernel_{hashlib.sha256(source_text.encode()).hexdigest()[:16]}.py"
        (self.folder / file).write_text(source_text)
        ends = np.cumsum([GAP, *(-(-array.nbytes // GAP) * GAP + GAP for array in arrays)])
        memory = Shared(self.interpreter, int(ends[-1]))
        places = [memory.array[end : end + array.nbytes] for end, array in zip(ends[:-1], arrays, strict=True)]
        for place, array in zip(places, arrays, strict=True):
            place[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        operands = [
            Operand(array.dtype.name, memory.id, int(end), array.nbytes)
            for end, array in zip(ends[:-1], arrays, strict=True)
        ]
        self.interpreter.run([Launch(file, name, operands, sizes, constants or {}, grid, size_type)])
        return [
            place.copy().view(array.dtype).reshape(array.shape) for place, array in zip(places, arrays, strict=True)
        ]


@pytest.fixture(scope="session")
def interpret(tmp_path_factory: pytest.TempPathFactory):
    """Runs a kernel source on numpy arrays; see the module docstring."""
    runner = Interpret(tmp_path_factory.mktemp("interpret"))
    yield runner
    runner.interpreter.close()


class CompileCubin:
    """Compiles kernel sources ahead of time; workers and results serve all tests of a session."""

    def __init__(self) -> None:
        self.pool = Pool(headers())
        self.compiled: dict[tuple[object, ...], Compiled] = {}

    def __call__(self, source_text: str, name: str, signature: Sequence[str], tile: Tile, arch: str) -> Compiled:
        """The binary of kernel ``name`` with the constants of a tile for an architecture such as ``"sm_90"``.

        Checks that the parameters are those of the signature. Whether registers spill or shared memory is exceeded
        says ``problem(architecture(arch))`` of the result.
        """
        key = (source_text, name, tuple(signature), tile, arch)
        if key not in self.compiled:
            kernel = KernelSource(name, "test", source_text, (tile,), tuple(signature))
            [self.compiled[key]] = compile_jobs([Job(kernel, tile, architecture(arch))], pool=self.pool)
        return self.compiled[key]

    def good(self, source_text: str, name: str, signature: Sequence[str], tile: Tile, *archs: str) -> None:
        """Fail where the kernel spills or exceeds shared memory, on sm_80 and sm_90 if no other is named."""
        for arch in archs or ("sm_80", "sm_90"):
            problem = self(source_text, name, signature, tile, arch).problem(architecture(arch))
            assert not problem, f"{name} [{tile.name}] on {arch}: {problem}"


@pytest.fixture(scope="session")
def compile_cubin():
    """``compile_cubin(source, name, signature, tile, arch)`` compiles a kernel; see :class:`CompileCubin`."""
    compiler = CompileCubin()
    yield compiler
    compiler.pool.close()

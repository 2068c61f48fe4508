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
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tilewright.codegen.architectures import architecture
from tilewright.codegen.kernel_table import KernelSource, KernelTable
from tilewright.codegen.lower import lower
from tilewright.codegen.regions import Family
from tilewright.codegen.roles import fusion_roles
from tilewright.codegen.storage import ConstantTable
from tilewright.codegen.triton.compiler import Compiled, Job, compile_jobs, headers
from tilewright.codegen.triton.loops import loop_family
from tilewright.codegen.triton.pool import Pool
from tilewright.compiler.capture import capture
from tilewright.passes.graph.program import Program
from tilewright.passes.graph.regions import is_region
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime import sizes
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


class Lowered:
    """A program lowered to Triton, whose steps run in the interpreter one by one.

    Attributes:
        kernels: the sources by name.
        plan: without places of constants.
        faults: how many steps of the last call met an index that is out of range.
    """

    def __init__(self, program: Program, families: Mapping[str, Family], interpret: Interpret) -> None:
        table, constants = KernelTable(), ConstantTable()
        code = lower(program, table, constants, families)
        self.plan = code.plan([], {index: index for index in range(len(constants.constants))})
        self.kernels = {kernel.name: kernel for kernel in table.kernels}
        self.constants = [item.load() for item in constants.constants]
        for index, item in enumerate(constants.constants):
            if item.dtype == "bfloat16":
                self.constants[index] = self.constants[index].view(ml_dtypes.bfloat16)
        self.interpret = interpret
        self.faults = 0

    def __call__(self, *inputs: torch.Tensor, tile: int = 0) -> list[torch.Tensor]:
        """The outputs; kernels take their tile of that number where they have as many and its guard holds."""
        plan, given = self.plan, [to_numpy(tensor) for tensor in inputs]
        symbols = {item.name: given[item.input].shape[item.axis] // item.factor for item in plan.symbols}

        def zeros(item: Any) -> np.ndarray:
            count = sizes.evaluate(sizes.product(item.shape), symbols)
            return np.zeros(count, ml_dtypes.bfloat16 if item.dtype == "bfloat16" else item.dtype)

        memory = {"input": given, "constant": self.constants, "counters": [np.zeros(4096, np.int32)]}
        memory |= {"output": list(map(zeros, plan.outputs)), "buffer": list(map(zeros, plan.buffers))}
        memory["fault"] = [np.zeros(1, np.int32) for _ in plan.steps]
        for number, step in enumerate(plan.steps):
            variant = next(item for item in step.variants if sizes.evaluate(item.guard, symbols))
            places = [(ref.kind, number if ref.kind == "fault" else ref.index) for ref in variant.operands]
            usable = [item for item in variant.tiles if sizes.evaluate(item.guard, symbols)]
            constants = (usable[tile] if tile < len(usable) else usable[0]).values()
            grid = sizes.evaluate(variant.units, symbols | constants)
            if not grid:
                continue
            kernel = self.kernels[variant.kernel]
            arrays = [memory[kind][index] for kind, index in places]
            arguments = [sizes.evaluate(size, symbols) for size in variant.sizes]
            kind = kernel.signature[-1] if arguments else "i64"
            after = self.interpret(kernel.text, kernel.name, arrays, arguments, constants, grid, kind)
            for position, (place, array) in enumerate(zip(places, after, strict=True)):
                if position not in step.writes and place[0] in ("input", "constant"):
                    assert array.tobytes() == arrays[position].tobytes(), f"{kernel.name} writes what it reads"
                memory[place[0]][place[1]] = array
        self.faults = sum(int(word[0]) for word in memory["fault"])
        shapes = [[sizes.evaluate(extent, symbols) for extent in item.shape] for item in plan.outputs]
        return [to_torch(array).reshape(shape) for array, shape in zip(memory["output"], shapes, strict=True)]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's elements, bfloat16 included."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Inverse of :func:`to_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture
def lowered(interpret: Interpret, isolate: Any):
    """``lowered(module, args, shapes)``: the module as Triton kernels, each operator on its own, or after the passes.

    ``images`` is the layout of all results that have four axes.

    ::

        model = lowered(module, (x,), ({0: Dim("n", max=64)},), passes=True)
        (y,) = model(x)
        model.kernels, model.plan.steps, model.faults
    """

    def run(
        module: torch.nn.Module,
        args: Sequence[Any],
        shapes: Any = None,
        *,
        passes: bool = False,
        families: Mapping[str, Family] | None = None,
        images: str = "rows",
    ) -> Lowered:
        program = capture("main", module.eval(), args, {}, shapes)
        if passes:
            PassManager(pipeline(fusion_roles("cuda"), "cuda")).run(program)
        else:
            isolate(program)
        for node in program.graph.nodes if images != "rows" else ():
            if is_region(node, "kernel") and isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].ndim == 4:
                node.meta["layouts"] = [images]
        return Lowered(program, families or {"loop": loop_family}, interpret)

    return run

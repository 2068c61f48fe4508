"""What all tests share: compiling a small module into an artifact and comparing it with PyTorch."""

from __future__ import annotations

import gc
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tilewright.codegen import targets
from tilewright.codegen.artifact import write_artifact
from tilewright.codegen.c import toolchain
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.codegen.cache import user_cache
from tilewright.codegen.generate import Generated, build_kernels, generate, triton_sources
from tilewright.codegen.interpret import is_size
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.capture import capture
from tilewright.passes.graph.program import Program
from tilewright.passes.graph.regions import Region, outline
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime import cpu
from tilewright.runtime.model import Model

SANITIZED = bool(os.environ.get("TILEWRIGHT_TEST_SANITIZE"))
"""Whether this is ``make sanitize``: tests that are marked for it, with kernels that check addresses and arithmetic."""

torch.set_num_threads(1)  # the workers share two cores
gc.set_threshold(50_000, 20, 20)  # graphs are many objects that live together: looking for cycles finds them alive


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs twice, and under sanitizers keep what ``@pytest.mark.sanitize`` asks for.

    The target ``cpu`` is this machine, which may be one of the others by another name: then its cases are left out.

    Sanitizers take all cases of a test, or with words those whose names hold one of them; of the targets the one with
    short vectors (the others take four times as long to compile with checks) and of the compilers gcc.
    """
    here, names = targets.parse("cpu", cpu.features()).name, {item.nodeid for item in items}
    twins = [item for item in items if "cpu" in _chosen(item).values() and _named(item, here) in names]
    config.hook.pytest_deselected(items=twins)
    items[:] = [item for item in items if item not in twins]
    if not SANITIZED:
        return

    def asked_for(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("sanitize")
        if mark is None or not all(name in ("v3", "cpu:x86-64-v3", "gcc", None) for name in variant(item)):
            return False
        return not mark.args or any(word in item.name for word in mark.args)

    def variant(item: pytest.Item) -> tuple[Any, Any]:
        return _chosen(item).get("target"), _chosen(item).get("compiler")

    config.hook.pytest_deselected(items=[item for item in items if not asked_for(item)])
    items[:] = [item for item in items if asked_for(item)]


def _chosen(item: pytest.Item) -> dict[str, Any]:
    """The values of a case's parameters that are texts."""
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return {name: value for name, value in given.items() if isinstance(value, str)}


def _named(item: pytest.Item, target: str) -> str:
    """The name of the case that has a target in place of ``cpu``."""
    name, _, case = item.nodeid.partition("[")
    words = case.removesuffix("]").split("-")
    return f"{name}[{'-'.join(target if word == 'cpu' else word for word in words)}]"


@pytest.fixture(scope="session", autouse=True)
def _sanitizers() -> None:
    """Under sanitizers whole models are compiled with checks, too; their libraries need those of the compiler then."""
    if SANITIZED:
        os.environ["TILEWRIGHT_CC"] = "gcc -fsanitize=address,undefined -fno-sanitize-recover=undefined"
        os.environ["TILEWRIGHT_CACHE"] = "off"
        toolchain.check_portable = lambda library: None


@pytest.fixture(scope="module")
def small_programs() -> Iterator[None]:
    """PyTorch looks up shapes of earlier operators, which takes longer than computing those of small programs."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.fixture(scope="session")
def isolate() -> Callable[[Program], Program]:
    """One region per operator: the program as it is, without any pass."""

    def run(program: Program) -> Program:
        roles = fusion_roles()
        for node in list(program.graph.nodes):
            if node.op != "call_function" or is_size(node) or node.target is operator.getitem:
                continue
            family = roles.anchors[node.target].family if node.target in roles.anchors else "loop"
            region = Region("kernel", family)
            if not isinstance(node.meta["val"], tuple | list):
                outline(program.module, [node], region, f"region_{node.name}")
                continue
            for item in list(node.users):  # one kernel per result: they may differ in shape
                with program.graph.inserting_before(item):
                    clone = program.graph.node_copy(node)
                item.replace_input_with(node, clone)
                outline(program.module, [clone, item], region, f"region_{item.name}")
            program.graph.erase_node(node)
        program.graph.lint()
        program.module.recompile()
        return program

    return run


def runnable(target: str) -> list[targets.Target]:
    """The targets, which are separated by commas; skips the test where the processor has none of them."""
    chosen = [targets.parse(one, cpu.features()) for one in target.split(",")]
    if not any(set(one.features) <= set(cpu.features()) for one in chosen):
        pytest.skip(f"this processor cannot run {target}")
    return chosen


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., Model]]:
    """Generate, compile and load programs that consist of regions, for targets separated by commas."""
    models: list[Model] = []

    def run(programs: Sequence[Program], target: str = "cpu", threads: int = 2) -> Model:
        chosen = runnable(target)
        generated: Generated = generate({"cpu": programs}, vector_bits=max(one.vector_bits for one in chosen))
        binaries = build_kernels(generated, chosen, find_compiler(), user_cache())
        path = write_artifact(
            tmp_path / f"model{len(models)}.tw",
            plans=generated.plans,
            constants=generated.constants,
            targets=binaries,
            info={},
        )
        models.append(tilewright.load(path, threads=threads))
        return models[-1]

    yield run
    for model in models:
        model.close()


@pytest.fixture
def compiled(build: Callable[..., Model], isolate: Callable[[Program], Program]) -> Callable[..., Model]:
    """Compile a module, with all passes or (``passes=False``) with every operator on its own."""

    def run(
        module: torch.nn.Module,
        args: Sequence[Any],
        shapes: Any = None,
        *,
        passes: bool = True,
        target: str = "cpu",
        precision: str = "auto",
    ) -> Model:
        runnable(target)  # before the work
        program = capture("main", module.eval(), args, {}, shapes)
        if passes:
            PassManager(pipeline(fusion_roles(), "cpu", precision)).run(program)
        else:
            isolate(program)
        return build([program], target)

    return run


@pytest.fixture
def gpu_artifact(tmp_path: Path, isolate: Callable[[Program], Program]) -> Callable[..., Path]:
    """Write a module as an artifact for GPUs without binaries, which only the interpreter device can run.

    As ``compiled``, with all passes or (``passes=False``) with every operator on its own.
    """
    written: list[Path] = []

    def run(
        module: torch.nn.Module,
        args: Sequence[Any],
        shapes: Any = None,
        *,
        passes: bool = True,
        precision: str = "auto",
    ) -> Path:
        program = capture("main", module.eval(), args, {}, shapes)
        if passes:
            PassManager(pipeline(fusion_roles("cuda"), "cuda", precision)).run(program)
        else:
            isolate(program)
        generated = generate({"cuda": [program]}, "tf32" if precision == "tf32" else "ieee")
        written.append(
            write_artifact(
                tmp_path / f"gpu{len(written)}.tw",
                plans={"cuda": generated.devices["cuda"].plans},
                constants=generated.constants,
                targets=(),
                sources=triton_sources(generated),
                info={},
            )
        )
        return written[-1]

    return run


def flatten(result: Any) -> list[Any]:
    """The tensors or arrays of a result, in order."""
    if isinstance(result, dict):
        return [leaf for value in result.values() for leaf in flatten(value)]
    if isinstance(result, tuple | list):
        return [leaf for value in result for leaf in flatten(value)]
    return [result]


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Compare a compiled model with PyTorch in double precision: max|a-b| / max|ref| per output."""

    def check(model: Model, module: torch.nn.Module, inputs: Sequence[torch.Tensor], tolerance: float = 2e-6) -> None:
        with torch.no_grad():
            expected = flatten(module(*inputs))
        got = flatten(model(*[tensor.numpy() for tensor in inputs]))
        assert len(expected) == len(got)
        for position, (want, have) in enumerate(zip(expected, got, strict=True)):
            reference = want.numpy()
            assert have.shape == reference.shape, (position, have.shape, reference.shape)
            assert have.dtype == reference.dtype, (position, have.dtype, reference.dtype)
            if reference.dtype.kind in "biu":
                np.testing.assert_array_equal(have, reference, err_msg=f"output {position}")
                continue
            np.testing.assert_array_equal(np.isnan(have), np.isnan(reference), err_msg=f"output {position}: NaN")
            finite = np.isfinite(reference)
            np.testing.assert_array_equal(have[~finite], reference[~finite], err_msg=f"output {position}: infinities")
            if finite.any():
                scale = max(float(np.abs(reference[finite]).max()), 1e-30)
                error = float(np.abs(have[finite].astype(np.float64) - reference[finite]).max()) / scale
                assert error <= tolerance, f"output {position}: error {error:.2e} > {tolerance:.0e}"

    return check

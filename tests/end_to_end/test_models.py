"""Every model family: all passes against none and against eager PyTorch in double precision, for both targets.

Large families are built in small from the same classes (``conftest.py``); everything else is as the registry has it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tilewright import models
from tilewright.codegen import targets
from tilewright.codegen.artifact import write_artifact
from tilewright.codegen.c.toolchain import find_compiler
from tilewright.codegen.cache import user_cache
from tilewright.codegen.generate import build_kernels, generate
from tilewright.codegen.roles import fusion_roles
from tilewright.compiler.capture import capture
from tilewright.compiler.copies import reference_of
from tilewright.models import bytelm, digits
from tilewright.passes.graph.program import Program
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime import cpu

TOLERANCE = 1e-5  # ten times tighter than what is promised
TARGETS = ("cpu:x86-64-v3", "cpu:x86-64-v4")
NAMES = (
    "mlp", "digits", "resnet18", "resnet50", "mobilenet_v3", "unet", "vit", "bert", "gpt2_tiny", "llama_tiny",
)  # fmt: skip
"""``bytelm`` is a trained ``llama_tiny``: its perplexity is compared."""


@pytest.mark.parametrize("name", NAMES)
def test_all_passes_against_none_and_eager(name, small_model, isolate, tmp_path):
    case = small_model(name)
    fused = capture("main", case.module, case.args, case.kwargs, case.shapes)
    plain = reference_of(fused)
    PassManager(pipeline(fusion_roles())).run(fused)
    machine = cpu.features()
    chosen = [target for target in (targets.parse(text, machine) for text in TARGETS) if machine >= {*target.features}]
    exact = copy.deepcopy(case.module).double()
    runs = []
    for sizes in ({}, *case.sizes):
        inputs = case.inputs(sizes)
        with torch.no_grad():
            expected = _leaves(exact(*[_double(tensor) for tensor in inputs]))
        runs.append((sizes, [tensor.numpy() for tensor in inputs], [tensor.numpy() for tensor in expected]))

    if not case.large:
        without = _outputs(isolate(plain), chosen[-1], runs, tmp_path / "plain")
        _check(without, [expected for _, _, expected in runs], "no pass against eager PyTorch", runs)
    for target in chosen:
        outputs = _outputs(fused, target, runs, tmp_path / target.name)
        _check(
            outputs, [expected for _, _, expected in runs], f"all passes against eager PyTorch on {target.name}", runs
        )
        if not case.large:
            _check(outputs, without, f"all passes against none on {target.name}", runs)


def _outputs(program: Program, target: targets.Target, runs: list[Any], path: Path) -> list[list[np.ndarray]]:
    """What the program's artifact gives for the inputs of every run."""
    generated = generate({"cpu": [program]})
    binaries = build_kernels(generated, [target], find_compiler(), user_cache())
    write_artifact(path, plans=generated.plans, constants=generated.constants, targets=binaries, info={})
    with tilewright.load(path, threads=2) as model:
        assert model.target == target.name
        return [_leaves(model(*inputs)) for _, inputs, _ in runs]


def _check(got: list[list[np.ndarray]], want: list[list[np.ndarray]], what: str, runs: list[Any]) -> None:
    for (sizes, _, _), outputs, references in zip(runs, got, want, strict=True):
        for position, (output, reference) in enumerate(zip(outputs, references, strict=True)):
            error = _error(reference, output)
            assert error <= TOLERANCE, f"{what}, output {position} at {sizes or 'the sizes of the sample'}: {error:.2e}"


def test_digits_has_exactly_the_accuracy_of_eager(compiled):
    module = models.get("digits").build()
    images, labels = digits.test_set()
    model = compiled(module, (torch.from_numpy(images[:2]),), {"image": "batch:1..512,1,8,8"})
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).argmax(1).numpy()
    got = model(images).argmax(1)
    np.testing.assert_array_equal(got, expected)
    assert (got == labels).mean() > 0.98


def test_bytelm_has_the_perplexity_of_eager_to_four_digits(compiled):
    module = models.get("bytelm").build()
    rows = bytelm.heldout(limit=12)
    args, _ = models.get("bytelm").example()
    model = compiled(module, args, models.get("bytelm").shapes)

    def eager(tokens):
        with torch.no_grad():
            return module(torch.from_numpy(tokens)).numpy()

    expected, got = bytelm.perplexity(eager, rows), bytelm.perplexity(model, rows)
    assert f"{got:.4g}" == f"{expected:.4g}"
    assert got == pytest.approx(expected, rel=1e-5)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, dict):
        return [leaf for value in result.values() for leaf in _leaves(value)]
    if isinstance(result, tuple | list):
        return [leaf for value in result for leaf in _leaves(value)]
    return [result]


def _error(reference: np.ndarray, got: np.ndarray) -> float:
    """max|a - b| / max|ref|."""
    assert reference.shape == got.shape
    return float(np.abs(got.astype(np.float64) - reference).max() / np.abs(reference).max())

"""Every model family: all passes against none and against eager PyTorch in double precision, for both targets.

Large families are built in small from the same classes; everything else is as the registry has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from tilewright.compiler.verification import reference_of
from tilewright.models import bert, bytelm, digits, mobilenet_v3, resnet, unet, vit
from tilewright.models.images import sample_images
from tilewright.models.initialize import RELU_GAIN, initialize
from tilewright.passes.graph.program import Program
from tilewright.passes.manager import PassManager
from tilewright.passes.pipeline import pipeline
from tilewright.runtime import cpu

TOLERANCE = 1e-5  # ten times tighter than what is promised
TARGETS = ("cpu:x86-64-v3", "cpu:x86-64-v4")


@dataclass(frozen=True)
class Case:
    """A model, its example, its dimensions, and the sizes to compare at besides the example's.

    Large models are not compiled without passes: every operator of theirs is in a small one too.
    """

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, str]
    sizes: tuple[Mapping[str, int], ...]
    large: bool = False


def _registered(name: str, *sizes: Mapping[str, int], large: bool = False) -> Case:
    spec = models.get(name)
    args, kwargs = spec.example()
    return Case(spec.build(), args, kwargs, spec.shapes, sizes, large)


def _image(module: torch.nn.Module, side: int, *batches: int, gain: float = 1.0) -> Case:
    module = initialize(module, 0, gain=gain)
    return Case(
        module, (sample_images(side, side),), {}, {"image": f"batch:1..16,3,{side},{side}"},
        tuple({"batch": batch} for batch in batches),
    )  # fmt: skip


def _resnet50_in_small(patch: pytest.MonkeyPatch) -> Case:
    patch.setattr(resnet, "STAGE_WIDTHS", (16, 20, 20, 32))
    patch.setitem(resnet.VARIANTS, "resnet50", (resnet.bottleneck, (2, 1, 1, 1), 4))
    return _image(resnet.ResNet("resnet50", classes=37), 48, 1, 3, gain=RELU_GAIN)


def _mobilenet_in_small(patch: pytest.MonkeyPatch) -> Case:
    rows = tuple(mobilenet_v3.LARGE[index] for index in (1, 4, 10))
    return _image(mobilenet_v3.MobileNetV3(rows, classes=37), 64, 1, 3, gain=1.3)


def _unet_in_small(patch: pytest.MonkeyPatch) -> Case:
    patch.setattr(unet, "CHANNELS", 12)
    patch.setattr(unet, "DEPTH", 2)
    return _image(unet.UNet(), 32, 1, 3, gain=RELU_GAIN)


def _vit_in_small(patch: pytest.MonkeyPatch) -> Case:
    for name, value in {"IMAGE": 48, "WIDTH": 48, "LAYERS": 2, "HEADS": 3, "HIDDEN": 100}.items():
        patch.setattr(vit, name, value)
    return _image(vit.ViT(classes=37), 48, 1, 5)


def _bert_in_small(patch: pytest.MonkeyPatch) -> Case:
    small = {"VOCABULARY": 211, "POSITIONS": 64, "WIDTH": 48, "LAYERS": 2, "HEADS": 3, "HIDDEN": 100}
    for name, value in small.items():
        patch.setattr(bert, name, value)
    args, kwargs = bert.example()
    shapes = {"input_ids": "batch:1..8,seq:1..64", "attention_mask": "batch,seq", "token_type_ids": "batch,seq"}
    return Case(bert.build(), args, kwargs, shapes, ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 61}))


CASES: dict[str, Callable[[pytest.MonkeyPatch], Case]] = {
    "mlp": lambda patch: _registered("mlp", {"batch": 1}, {"batch": 37}),
    "digits": lambda patch: _registered("digits", {"batch": 1}, {"batch": 37}),
    "resnet18": lambda patch: _registered("resnet18", {"batch": 1}, large=True),
    "resnet50": _resnet50_in_small,
    "mobilenet_v3": _mobilenet_in_small,
    "unet": _unet_in_small,
    "vit": _vit_in_small,
    "bert": _bert_in_small,
    "gpt2_tiny": lambda patch: _registered("gpt2_tiny", {"batch": 1, "seq": 1}, {"batch": 3, "seq": 67}),
    "llama_tiny": lambda patch: _registered("llama_tiny", {"batch": 1, "seq": 1}, {"batch": 3, "seq": 67}),
    "bytelm": lambda patch: _registered("bytelm", {"batch": 1, "seq": 1}, {"batch": 2, "seq": 131}),
}


@pytest.mark.parametrize("name", CASES)
def test_all_passes_against_none_and_eager(name, monkeypatch, isolate, tmp_path):
    case = CASES[name](monkeypatch)
    fused = capture("main", case.module, case.args, case.kwargs, case.shapes)
    plain = reference_of(fused)
    PassManager(pipeline(fusion_roles())).run(fused)
    machine = cpu.features()
    chosen = [target for target in (targets.parse(text, machine) for text in TARGETS) if machine >= {*target.features}]
    exact = copy.deepcopy(case.module).double()
    runs = []
    for sizes in ({}, *case.sizes):
        inputs = [_resized(tensor, sizes, case.shapes[key]) for key, tensor in _named(case).items()]
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


def _named(case: Case) -> dict[str, torch.Tensor]:
    return dict(
        zip(case.shapes, [*case.args, *(case.kwargs[name] for name in case.shapes if name in case.kwargs)], strict=True)
    )


def _resized(tensor: torch.Tensor, sizes: Mapping[str, int], dims: str) -> torch.Tensor:
    """The tensor repeated and cut along its named axes, and shuffled so that no two rows are alike."""
    for axis, dim in enumerate(dims.split(",")):
        if (size := sizes.get(dim.partition(":")[0])) is not None:
            repeats = [1] * tensor.ndim
            repeats[axis] = -(-size // tensor.shape[axis])
            tensor = tensor.repeat(repeats).narrow(axis, 0, size)
    if sizes and tensor.numel():
        order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1))
        tensor = tensor.reshape(-1)[order].reshape(tensor.shape)
    return tensor.contiguous()


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

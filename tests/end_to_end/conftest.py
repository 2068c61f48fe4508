"""Compiling a module as a user does and comparing what it returns, and the model families in small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tilewright import models
from tilewright.models import bert, mobilenet_v3, resnet, unet, vit
from tilewright.models.images import sample_images
from tilewright.models.initialize import RELU_GAIN, initialize


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def make(tmp_path):
    """Compile with verification on, and load."""
    models = []

    def run(module, args=(), shapes=None, **options):
        path = tmp_path / f"model{len(models)}.tw"
        tilewright.compile(module.eval(), args, output=path, dynamic_shapes=shapes, **options)
        models.append(tilewright.load(path, threads=2))
        return models[-1]

    yield run
    for model in models:
        model.close()


@pytest.fixture(scope="session")
def same():
    """``same(got, want, tolerance=2e-6)``: the same structure, types, dtypes and numbers."""
    return _same


def _same(got, want, tolerance=2e-6):
    """The same structure, types, dtypes and numbers."""
    if isinstance(want, torch.Tensor):
        want = want.detach()
        expected = want.float().numpy() if want.dtype == torch.bfloat16 else want.numpy()
        if want.dtype == torch.bfloat16:
            assert got.dtype.name == "bfloat16"
            got = got.astype(np.float32)
        assert isinstance(got, np.ndarray) and got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            _same(got[key], want[key], tolerance)
    elif isinstance(want, tuple | list):
        assert type(got) is type(want) and len(got) == len(want)
        for left, right in zip(got, want, strict=True):
            _same(left, right, tolerance)
    else:
        assert type(got) is type(want) and got == want


@dataclass(frozen=True)
class Case:
    """A model, its example, its dimensions, and the sizes to compare at besides the example's.

    Models that are ``large`` are not compiled without passes: every operator of theirs is in another one, or among
    those that are compiled one by one.
    """

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, str]
    sizes: tuple[Mapping[str, int], ...]
    large: bool = False

    def named(self) -> dict[str, torch.Tensor]:
        """The example's tensors by name."""
        given = [*self.args, *(self.kwargs[name] for name in self.shapes if name in self.kwargs)]
        return dict(zip(self.shapes, given, strict=True))

    def inputs(self, sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """The example's tensors at these sizes."""
        return [_resized(tensor, sizes, self.shapes[name]) for name, tensor in self.named().items()]


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
    patch.setattr(resnet, "STAGE_WIDTHS", (16, 20, 32))
    patch.setitem(resnet.VARIANTS, "resnet50", (resnet.bottleneck, (2, 1, 1), 4))
    case = _image(resnet.ResNet("resnet50", classes=37), 48, 1, 3, gain=RELU_GAIN)
    return replace(case, large=True)


def _resnet18_in_small(patch: pytest.MonkeyPatch) -> Case:
    patch.setattr(resnet, "STAGE_WIDTHS", (16, 20))
    patch.setitem(resnet.VARIANTS, "resnet18", (resnet.basic, (2, 1), 1))
    case = _image(resnet.ResNet("resnet18", classes=37), 48, 1, gain=RELU_GAIN)
    return replace(case, large=True)


def _mobilenet_in_small(patch: pytest.MonkeyPatch) -> Case:
    rows = tuple(mobilenet_v3.LARGE[index] for index in (1, 4, 10))
    return replace(_image(mobilenet_v3.MobileNetV3(rows, classes=37), 64, 1, 3, gain=1.3), large=True)


def _unet_in_small(patch: pytest.MonkeyPatch) -> Case:
    patch.setattr(unet, "CHANNELS", 12)
    patch.setattr(unet, "DEPTH", 2)
    return replace(_image(unet.UNet(), 32, 1, 3, gain=RELU_GAIN), large=True)


def _vit_in_small(patch: pytest.MonkeyPatch) -> Case:
    for name, value in {"IMAGE": 48, "WIDTH": 48, "LAYERS": 2, "HEADS": 3, "HIDDEN": 100}.items():
        patch.setattr(vit, name, value)
    return replace(_image(vit.ViT(classes=37), 48, 1, 5), large=True)


def _bert_in_small(patch: pytest.MonkeyPatch) -> Case:
    small = {"VOCABULARY": 211, "POSITIONS": 64, "WIDTH": 48, "LAYERS": 2, "HEADS": 3, "HIDDEN": 100}
    for name, value in small.items():
        patch.setattr(bert, name, value)
    args, kwargs = bert.example()
    shapes = {"input_ids": "batch:1..8,seq:1..64", "attention_mask": "batch,seq", "token_type_ids": "batch,seq"}
    return Case(bert.build(), args, kwargs, shapes, ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 61}), large=True)


CASES: dict[str, Callable[[pytest.MonkeyPatch], Case]] = {
    "mlp": lambda patch: _registered("mlp", {"batch": 1}, {"batch": 37}),
    "digits": lambda patch: _registered("digits", {"batch": 1}, {"batch": 37}),
    "resnet18": _resnet18_in_small,
    "resnet50": _resnet50_in_small,
    "mobilenet_v3": _mobilenet_in_small,
    "unet": _unet_in_small,
    "vit": _vit_in_small,
    "bert": _bert_in_small,
    "gpt2_tiny": lambda patch: _registered("gpt2_tiny", {"batch": 1, "seq": 1}, {"batch": 3, "seq": 67}, large=True),
    "llama_tiny": lambda patch: _registered("llama_tiny", {"batch": 1, "seq": 1}, {"batch": 3, "seq": 67}),
    "bytelm": lambda patch: _registered("bytelm", {"batch": 1, "seq": 1}, {"batch": 2, "seq": 131}),
}


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


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Case]:
    """``small_model("bert")``: a family of the registry, in small where it is large."""
    return lambda name: CASES[name](monkeypatch)

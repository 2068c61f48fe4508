"""The models by name: how to build them, sample inputs, which dimensions vary, and how many parameters they have.

A family's file offers ``build(variant)`` and ``example(variant)``; it is imported when one of them is called, so
listing names imports no PyTorch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class UnknownModel(KeyError):
    """No model has this name; the message lists names close to it."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message in quotes


@dataclass(frozen=True)
class ModelSpec:
    """One model of the registry.

    Attributes:
        name: its name in the registry, which is also the variant's name in its family.
        family: the file that defines it.
        shapes: input name → its dimensions, one entry per axis: an integer, ``symbol:lo..hi`` or a symbol again.
        parameters: how many parameters it has; shared ones count once.
        description: one line for listings.
    """

    name: str
    family: str
    shapes: Mapping[str, str]
    parameters: int
    description: str

    def build(self) -> nn.Module:
        """The module in eval mode, with seeded or trained weights: every call gives the same ones."""
        return self._module().build(self.name)

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Seeded sample arguments and keyword arguments; dimensions that vary have sizes larger than one."""
        return self._module().example(self.name)

    def _module(self) -> ModuleType:
        return import_module(f".{self.family}", __package__)


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_MODELS)


def get(name: str) -> ModelSpec:
    """The model of that name.

    Raises:
        UnknownModel: there is none.
    """
    if name in _MODELS:
        return _MODELS[name]
    close = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names())}"
    raise UnknownModel(f"no model is named {name!r}: {hint}")


def _spec(name: str, family: str, parameters: int, description: str, **shapes: str) -> ModelSpec:
    return ModelSpec(name, family, MappingProxyType(shapes), parameters, description)


_PHOTO = "batch:1..64,3,224,224"

_MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _spec("mlp", "mlp", 101_386, "three linear layers with ReLU", x="batch:1..64,128"),
        _spec("digits", "digits", 25_978, "trained CNN for handwritten digits", image="batch:1..512,1,8,8"),
        _spec("resnet18", "resnet", 11_689_512, "ResNet-18", image=_PHOTO),
        _spec("resnet50", "resnet", 25_557_032, "ResNet-50 v1.5", image=_PHOTO),
        _spec("mobilenet_v3_large", "mobilenet_v3", 5_483_032, "MobileNetV3-Large", image=_PHOTO),
        _spec("vit_b16", "vit", 86_567_656, "ViT-B/16", image=_PHOTO),
        _spec("unet", "unet", 7_763_041, "U-Net on images of 128 by 128", image="batch:1..16,3,128,128"),
        _spec(
            "bert_base",
            "bert",
            109_482_240,
            "BERT-base with its pooler",
            input_ids="batch:1..64,seq:1..512",
            attention_mask="batch,seq",
            token_type_ids="batch,seq",
        ),
        _spec("gpt2", "gpt2", 124_439_808, "GPT-2 124M", input_ids="batch:1..16,seq:1..1024"),
        _spec("gpt2_tiny", "gpt2", 478_720, "GPT-2 in small", input_ids="batch:1..16,seq:1..128"),
        _spec("llama_tiny", "decoder", 483_968, "Llama in small, grouped queries", input_ids="batch:1..16,seq:1..256"),
        _spec("llama_1b", "decoder", 1_100_048_384, "Llama with TinyLlama's sizes", input_ids="batch:1..8,seq:1..2048"),
        _spec("bytelm", "bytelm", 1_281_440, "trained byte-level model of Python", input_ids="batch:1..64,seq:1..256"),
    )
}

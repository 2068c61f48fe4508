"""What the CPU benchmark measures: models, systems, precisions, and what each needs. Imports none of the systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

TRANSFORMERS = ("vit_b16", "bert_base", "minilm", "gpt2")
CONVOLUTIONAL = ("resnet50", "mobilenet_v3_large", "unet")

MODELS = {
    "resnet50": "images of 224 x 224",
    "mobilenet_v3_large": "images of 224 x 224",
    "vit_b16": "images of 224 x 224",
    "bert_base": "rows of 128 tokens",
    "minilm": "rows of 64 tokens",
    "unet": "images of 128 x 128",
    "gpt2": "rows of 128 tokens",
}
"""What is measured by default, with what one of a batch is. Other names of the model registry may be asked for."""

BATCHES = {"minilm": (8,)}
"""Model → its batches, where they are not those of :data:`USUAL_BATCHES`; the first is the one for latency."""

USUAL_BATCHES = (1, 8)

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
TOLERANCES = {"fp32": 1e-4, "bf16": 4e-2}
"""Largest error against float32 eager PyTorch, as a share of an output's largest value."""


@dataclass(frozen=True)
class System:
    """One way to run a model.

    Attributes:
        name: in commands and results.
        label: in tables and the plot.
        modules: that have to be there, each from the package of the same name.
        builds: whether there is anything to build before it can be loaded.
        batched: whether it takes part at larger batches, too, where not asked for by name; not those that take the
            longest to compile, all over again for every batch.
    """

    name: str
    label: str
    modules: tuple[str, ...]
    builds: bool = True
    batched: bool = True


SYSTEMS = {
    system.name: system
    for system in (
        System("tilewright", "Tilewright", ()),
        System("eager", "PyTorch eager", ("torch",), builds=False),
        System("inductor", "torch.compile", ("torch",), batched=False),
        System("aotinductor", "AOTInductor", ("torch",), batched=False),
        System("onnxruntime", "ONNX Runtime", ("onnxruntime", "onnxscript")),
        System("openvino", "OpenVINO", ("openvino",)),
    )
}

BATCHED = tuple(name for name, system in SYSTEMS.items() if system.batched)


@dataclass(frozen=True)
class Case:
    """One model at one batch in one precision: what all systems are timed on in turns."""

    model: str
    precision: str
    batch: int

    @property
    def name(self) -> str:
        """In results."""
        return f"{self.model}/{self.precision}/{self.batch}"

    @property
    def latency(self) -> bool:
        """Whether it is the model's case for latency, compile time, start-up and memory."""
        return self.batch == BATCHES.get(self.model, USUAL_BATCHES)[0]


def cases(models: Sequence[str], precisions: Sequence[str]) -> list[Case]:
    """All cases, those for latency first."""
    every = [
        Case(model, precision, batch)
        for precision in precisions
        for model in models
        for batch in BATCHES.get(model, USUAL_BATCHES)
    ]
    return sorted(every, key=lambda case: not case.latency)


def missing(system: str, precision: str) -> str | None:
    """Why a system cannot be measured; ``None`` where it can."""
    absent = [module for module in SYSTEMS[system].modules if find_spec(module) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (pip install 'tilewright[bench]')"
    if system == "onnxruntime" and precision == "bf16":
        return "it has no bfloat16 kernels for CPUs"
    return None

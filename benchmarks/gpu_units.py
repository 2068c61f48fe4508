"""What the GPU benchmark measures: every unit with its parameters and about how long it takes. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BATCHES = (1, 8, 64)
MODELS = {"resnet50": "float16", "vit_b16": "float16", "bert_base": "bfloat16"}
"""Model → the dtype that it is measured in; ``--dtypes`` names others."""

RIVALS = ("eager", "max-autotune", "aotinductor")
TEMPLATES = (
    "pointwise", "row", "long_row", "reduction", "transpose", "pooling", "embedding", "matmul", "matmul_batched",
    "split_k", "matvec", "convolution", "depthwise", "grouped_convolution", "attention", "attention_causal",
    "attention_mask", "attention_grouped", "attention_decode",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16")

MATMULS = (  # rows, columns, inner extent
    (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (1024, 4096, 1024),
    (4096, 1024, 4096), (512, 3072, 768), (8192, 3072, 768), (1000, 1000, 1000), (64, 4096, 4096),
)  # fmt: skip
ATTENTIONS = (  # batch, heads, key heads, queries, keys, head length, causal
    (1, 12, 12, 197, 197, 64, False), (64, 12, 12, 197, 197, 64, False), (8, 12, 12, 512, 512, 64, False),
    (4, 16, 16, 2048, 2048, 64, True), (4, 16, 16, 2048, 2048, 128, True), (2, 32, 8, 4096, 4096, 128, True),
    (8, 16, 16, 1024, 1024, 128, False), (1, 32, 8, 1, 4096, 128, False), (16, 32, 8, 1, 8192, 128, False),
)  # fmt: skip
MATVECS = ((1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008), (4, 8192, 8192))  # rows, columns, inner extent


@dataclass(frozen=True)
class Unit:
    """One measurement: ``kind`` names the function of ``gpu_measure`` that takes ``parameters``."""

    name: str
    kind: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float = 5.0

    @property
    def group(self) -> str:
        """The table it belongs to."""
        return self.name.partition("/")[0]


def units(dtypes: tuple[str, ...] = ()) -> list[Unit]:
    """All units, the most telling ones first, so that a short run is of use.

    Args:
        dtypes: to measure models in, instead of :data:`MODELS`'s.
    """
    return [*_basics(), *_models(dtypes, BATCHES[:1]), *_tables(), *_templates(), *_models(dtypes, BATCHES[1:])]


def _basics() -> Iterator[Unit]:
    yield Unit("ceiling/copy", "copy", {}, 4)
    yield Unit("ceiling/matmul", "matmul_rate", {}, 4)
    for dtype in DTYPES[1:]:
        yield from (
            Unit(f"template/{name}/{dtype}", "template", {"name": name, "dtype": dtype}, 4)
            for name in ("matmul", "attention", "convolution")
        )
    yield Unit("overhead/launch", "launch", {}, 10)


def _templates() -> Iterator[Unit]:
    for name in TEMPLATES:
        for dtype in DTYPES:
            if dtype == "float32" or name not in ("matmul", "attention", "convolution"):
                yield Unit(f"template/{name}/{dtype}", "template", {"name": name, "dtype": dtype}, 4)


def _tables() -> Iterator[Unit]:
    for m, n, k in MATMULS:
        yield Unit(f"matmul/{m}x{n}x{k}/bfloat16", "matmul", {"m": m, "n": n, "k": k, "dtype": "bfloat16"}, 5)
    for m, n, k in MATVECS:
        yield Unit(f"matvec/{m}x{n}x{k}/bfloat16", "matvec", {"m": m, "n": n, "k": k, "dtype": "bfloat16"}, 5)
    for b, h, hk, sq, sk, d, causal in ATTENTIONS:
        name = f"attention/{b}x{h}" + (f"g{h // hk}" if h != hk else "") + f"x{sq}x{sk}x{d}" + ("c" if causal else "")
        shape = {"b": b, "h": h, "hk": hk, "sq": sq, "sk": sk, "d": d, "causal": causal}
        yield Unit(f"{name}/bfloat16", "attention", {**shape, "dtype": "bfloat16"}, 6)
    yield Unit("startup/resnet50", "startup", {"model": "resnet50"}, 60)


def _models(dtypes: tuple[str, ...], batches: tuple[int, ...]) -> Iterator[Unit]:
    chosen = [(model, dtype) for model, own in MODELS.items() for dtype in (dtypes or (own,))]
    for batch in batches:
        for model, dtype in chosen:
            for who in ("tilewright", *RIVALS):
                slow = {"tilewright": 25.0, "eager": 5.0, "max-autotune": 60.0, "aotinductor": 45.0}[who]
                parameters = {"model": model, "dtype": dtype, "batch": batch, "who": who}
                yield Unit(f"model/{model}/{dtype}/{batch}/{who}", "model", parameters, slow)

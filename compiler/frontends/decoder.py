"""Decoder language models that generate text: checkpoint folders of known families, and our own by name.

The weights of a checkpoint stay memory-mapped. What is compiled is one entry point, ``step``, over a paged cache of
keys and values; the manifest's ``generation`` section says all that a scheduler needs to know about it.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.decoder import Config, Decoder
from ...passes.graph.cache_ops import BLOCK
from ...runtime.errors import ArtifactError, SourceError, UsageError
from ...runtime.generation.text import FileText
from ..options import Entry, Task
from . import Loaded
from .decoder_families import FAMILIES, Family, Fields
from .decoder_samples import step_inputs
from .huggingface import read_config
from .weights import check_weight_files, map_tensors, weight_files

ENTRY = "step"
_IGNORED = "rotary_emb.inv_freq"  # older checkpoints hold these frequencies, which follow from the configuration
# All different, so that no two are taken for one; twice the tokens are enough for products of many rows.
_SAMPLE = {"tokens": 37, "sequences": 3, "width": 2, "rows": 5, "blocks": 7}
_TOKENIZER = "tokenizer.json"


def is_decoder(folder: Path) -> bool:
    """Whether a checkpoint folder is of a family that can be compiled to generate."""
    return read_config(folder)["architectures"][0] in FAMILIES


def warn_of_other_decoder(folder: Path) -> None:
    """Tell who compiles another family of language models, without saying for what, that it will not generate."""
    name = str(read_config(folder)["architectures"][0])
    if name.endswith("ForCausalLM"):
        warnings.warn(
            f"{folder / 'config.json'} names the class {name!r}, which is compiled to the logits of whole sequences, "
            f"not to generate text; that can be {', '.join(FAMILIES)}",
            stacklevel=1,
        )


def load_decoder(folder: Path) -> tuple[Decoder, Mapping[str, Any]]:
    """The decoder of a checkpoint folder, its weights memory-mapped, and its tokens that begin and end texts.

    Raises:
        SourceError: an architecture that is not supported, or a configuration that asks for what our decoder lacks.
        ArtifactError: weights that are missing, left over, or of another shape or type than the configuration says.
    """
    path = folder / "config.json"
    values = read_config(folder)
    name = str(values["architectures"][0])
    if name not in FAMILIES:
        raise SourceError(
            f"{path} names the class {name!r}, which cannot be compiled to generate text; supported are "
            f"{', '.join(FAMILIES)} (--task forward compiles what the model computes for whole sequences)"
        )
    family, config = FAMILIES[name], FAMILIES[name].config(Fields(values, path))
    with torch.device("meta"):
        module = Decoder(config)
    _fill(module, folder, family)
    generation = folder / "generation_config.json"
    given = _read_json(generation) if generation.is_file() else {}
    return module.eval(), {
        "bos": _token(given.get("bos_token_id", values.get("bos_token_id")), config, path),
        "eos": _tokens(given.get("eos_token_id", values.get("eos_token_id")), config, path),
    }


def open_checkpoint(folder: Path, task: Task, cache: Callable[[torch.dtype], torch.dtype]) -> Loaded:
    """A checkpoint folder, to be compiled to generate text; its tokenizer goes into the artifact.

    Args:
        folder: of a family in ``decoder_families.FAMILIES``.
        task: the limits of generation.
        cache: the type of the weights → that of cached keys and values.

    Raises:
        SourceError: as :func:`load_decoder`.
        ArtifactError: likewise; or a tokenizer that cannot be used.
        UsageError: a context that is longer than the model's.
    """
    module, special = load_decoder(folder)
    files = {_TOKENIZER: folder / _TOKENIZER} if _has_tokenizer(folder) else {}
    text = {"tokenizer": _TOKENIZER if files else None}
    loaded = generating(module, task, cache, {**special, **text}, files)
    return replace(loaded, mapped=tuple(weight_files(folder)))


def _has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint brings a tokenizer; one that its artifact could not use is found here, not when it is used.

    Raises:
        ArtifactError: the file is damaged, or decodes in a way that is not supported.
    """
    file = folder / _TOKENIZER
    if not file.is_file():
        warnings.warn(
            f"{folder} has no {_TOKENIZER}: the artifact will take and give token ids only. transformers writes one "
            f"from a checkpoint's other files: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            stacklevel=1,
        )
        return False
    if importlib.util.find_spec("tokenizers"):
        FileText(file.read_bytes(), str(file))
    return True


def open_module(module: nn.Module, name: str, task: Task, cache: Callable[[torch.dtype], torch.dtype]) -> Loaded:
    """A ``models.decoder.Decoder``, to be compiled to generate; one with 256 tokens generates bytes.

    Raises:
        UsageError: a module of another class, or a context that is longer than the model's.
    """
    if not isinstance(module, Decoder):
        raise UsageError(
            f"{name} is a {type(module).__name__}, which cannot be compiled to generate text; that can be a "
            f"models.decoder.Decoder and checkpoint folders of {', '.join(FAMILIES)}"
        )
    text: dict[str, Any] = {"bos": None, "eos": [], "tokenizer": "bytes" if module.config.vocabulary == 256 else None}
    return generating(module, task, cache, text, {})


def generating(
    module: Decoder, task: Task, cache: Callable[[torch.dtype], torch.dtype], text: Mapping[str, Any],
    files: Mapping[str, Path],
) -> Loaded:  # fmt: skip
    """A decoder with its step as the entry point.

    Args:
        module: in evaluation mode, weights in place.
        task: the limits of generation.
        cache: the type of the weights → that of cached keys and values.
        text: what the manifest says of the tokens: ``bos``, ``eos`` and ``tokenizer``.
        files: name in the artifact → file to copy.

    Raises:
        UsageError: a context that is longer than the model's.
    """
    config = module.config
    context = min(config.context, task.LONGEST_CONTEXT) if task.context is None else task.context
    if context > config.context:
        raise UsageError(f"a context of {context} positions is too long: the model has {config.context}")
    dtype = cache(module.embedding.weight.dtype)
    width = -(-context // BLOCK)
    blocks = task.sequences * width
    shapes = {
        "tokens": f"tokens:1..{task.chunk}",
        "positions": "tokens",
        "starts": f"sequences+1:1..{task.sequences}",
        "contexts": "sequences",
        "table": f"sequences,width:1..{width}",
        "rows": f"rows:1..{task.sequences}",
    }
    kept = f"{config.kv_heads},{config.head_size},{BLOCK}", f"{config.kv_heads},{BLOCK},{config.head_size}"
    for index in range(config.layers):
        shapes |= {f"keys.{index}": f"blocks:1..{blocks},{kept[0]}", f"values.{index}": f"blocks,{kept[1]}"}
    limits = {"tokens": task.chunk, "sequences": task.sequences, "rows": task.sequences, "width": width}
    limits["blocks"] = blocks
    sizes = {name: min(size, limits[name]) for name, size in _SAMPLE.items()}
    make = partial(_inputs, config, context, limits)

    def caches(*shape: int) -> list[Tensor]:
        return [torch.zeros(sizes["blocks"], config.kv_heads, *shape, dtype=dtype) for _ in range(config.layers)]

    samples = {**make(sizes), "keys": caches(config.head_size, BLOCK), "values": caches(BLOCK, config.head_size)}
    described = {
        "entry": ENTRY, "context": context, "block": BLOCK, "vocabulary": config.vocabulary, "max_tokens": task.chunk,
        "max_sequences": task.sequences, "layers": config.layers, "kv_heads": config.kv_heads,
        "head_size": config.head_size, "cache_dtype": str(dtype).removeprefix("torch."), **text,
    }  # fmt: skip
    states = tuple(name for name in shapes if name.startswith(("keys.", "values.")))
    entry = Entry("step", (), samples, shapes, make=make, states=states)
    return Loaded(module, entries={ENTRY: entry}, info={"generation": described}, files=files)


def _inputs(config: Config, context: int, limits: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs at given sizes; a symbol with only one value is not among them."""
    return step_inputs(config, context, {**limits, **sizes})


def _fill(module: Decoder, folder: Path, family: Family) -> None:
    """Put a checkpoint's tensors in the places of a module without data."""
    found = check_weight_files(folder)
    wanted = {
        ours: family.tensor(ours) for ours in module.state_dict() if not (module.config.tied and ours == "head.weight")
    }
    for ours, theirs in wanted.items():
        expected = list(module.get_parameter(ours).shape)
        if theirs not in found:
            missing = sum(name not in found for name in wanted.values())
            more = f" and {missing - 1} more" if missing > 1 else ""
            raise ArtifactError(
                f"{folder}: the weights lack the tensor {theirs!r}, expected with shape {expected}{more}; they hold "
                f"{len(found)} others"
            )
        if list(found[theirs]) != expected:
            raise ArtifactError(
                f"{folder}: the tensor {theirs!r} has shape {list(found[theirs])} in the weights, but config.json asks "
                f"for {expected}"
            )
    tied = {family.tensor("head.weight")} if module.config.tied else set()
    left = sorted(name for name in found.keys() - wanted.values() - tied if not name.endswith(_IGNORED))
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ArtifactError(
            f"{folder}: the weights hold the tensor {left[0]!r} of shape {list(found[left[0]])}{more}, for which "
            f"config.json has no place"
        )
    tensors = map_tensors(folder)
    dtype = tensors[wanted["embedding.weight"]].dtype
    for theirs in wanted.values():
        if tensors[theirs].dtype != dtype or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ArtifactError(
                f"{folder}: the tensor {theirs!r} is of type {tensors[theirs].dtype}, the embedding of {dtype}; all "
                f"weights must be of one floating-point type (float32, bfloat16 or float16)"
            )
    module.load_state_dict({ours: tensors[theirs] for ours, theirs in wanted.items()}, strict=False, assign=True)
    if module.config.tied:
        module.head.weight = module.embedding.weight


def _token(value: Any, config: Config, path: Path) -> int | None:
    found = _tokens(value, config, path)
    return found[0] if found else None


def _tokens(value: Any, config: Config, path: Path) -> list[int]:
    """One token, several or none, as a list."""
    found = [] if value is None else value if isinstance(value, list) else [value]
    for token in found:
        if type(token) is not int or not 0 <= token < config.vocabulary:
            raise SourceError(f"{path}: the special token {token!r} is not among the {config.vocabulary} tokens")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds no object")
    return found

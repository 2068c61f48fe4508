"""A sentence encoder: a transformer with the pooling and normalisation of its sentence-transformers folder.

Such a folder has a ``modules.json`` that lists the stages: Transformer, Pooling and optionally Normalize. Formulas:
Reimers and Gurevych, "Sentence-BERT" (2019), and the configuration keys of sentence-transformers' pooling.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.errors import SourceError

_MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_SHORT = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}


@dataclass(frozen=True)
class Stages:
    """What follows the transformer: pooling modes (their results are concatenated) and whether vectors get length 1."""

    transformer: Path
    pooling: tuple[str, ...]
    normalize: bool


class SentenceEncoder(nn.Module):
    """Token ids to one vector per sentence.

    ``forward(input_ids, attention_mask, token_type_ids)``, int64 of shape (batch, seq) each, gives float (batch, width)
    times the number of pooling modes. Every row needs at least one token that is not masked.
    """

    def __init__(self, encoder: nn.Module, stages: Stages) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = stages.pooling
        self.normalize = stages.normalize
        self.takes_types = "token_type_ids" in inspect.signature(encoder.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode, pool and normalise."""
        types = {"token_type_ids": token_type_ids} if token_type_ids is not None and self.takes_types else {}
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)[0]
        vectors = [_pool(mode, tokens, attention_mask) for mode in self.pooling]
        vector = torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]
        if not self.normalize:
            return vector
        length = (vector * vector).sum(dim=1, keepdim=True).sqrt()
        return vector / length.clamp_min(1e-12)


def read_stages(folder: Path) -> Stages | None:
    """The stages of a sentence-transformers folder; None if the folder is none.

    Raises:
        SourceError: a stage that is missing, unreadable or of a kind that is not supported.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    listed = _json(path)
    try:
        stages = [(str(stage["type"]).rpartition(".")[2], folder / str(stage["path"])) for stage in listed]
    except (TypeError, KeyError) as error:
        raise SourceError(f"{path} does not list modules with a type and a path") from error
    kinds = [kind for kind, _ in stages]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise SourceError(
            f"{path} lists the modules {', '.join(kinds)}; supported are Transformer, Pooling and then Normalize "
            f"(remove modules.json to compile the transformer alone)"
        )
    return Stages(stages[0][1], _pooling_modes(stages[1][1] / "config.json"), len(stages) == 3)


def _pooling_modes(path: Path) -> tuple[str, ...]:
    config = _json(path)
    modes = tuple(mode for mode in _MODES if config.get(f"pooling_mode_{mode}") is True)
    named = config.get("pooling_mode")
    if isinstance(named, str):
        modes = (_SHORT.get(named, named),)
    if not modes or any(mode not in _MODES for mode in modes):
        raise SourceError(f"{path} names no pooling that is supported; known are {', '.join(_MODES)}")
    return modes


def _pool(mode: str, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """One vector per sentence, (batch, width), from token vectors (batch, seq, width)."""
    if mode == "cls_token":
        return tokens[:, 0]
    mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
    if mode == "max_tokens":
        return tokens.masked_fill(mask == 0, -1e9).amax(dim=1)
    if mode == "lasttoken":
        positions = torch.arange(attention_mask.shape[1]).unsqueeze(0) * (attention_mask != 0)
        last = positions.argmax(dim=1)
        return tokens.gather(1, last.view(-1, 1, 1).expand(-1, 1, tokens.shape[-1])).squeeze(1)
    if mode == "weightedmean_tokens":
        mask = mask * torch.arange(1, attention_mask.shape[1] + 1).view(1, -1, 1).to(tokens.dtype)
    total = (tokens * mask).sum(dim=1)
    count = mask.sum(dim=1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no JSON: {error}") from error

"""What an artifact says about generating text: the manifest's ``generation``, read and checked."""

from __future__ import annotations

from typing import Any

from ..artifact import Artifact
from ..errors import ArtifactError, UsageError
from ..manifest import FILE_NAME
from ..records import frozen

SECTION = "generation"
BYTES = "bytes"
"""The tokenizer of models whose tokens are the 256 bytes."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_POSITIVE = ("context", "block", "vocabulary", "max_tokens", "max_sequences", "layers", "kv_heads", "head_size")


@frozen
class Generation:
    """A decoder's entry point and its limits.

    Attributes:
        entry: the name of the entry point.
        context: how many positions a sequence may have.
        block: positions in a block of the cache.
        vocabulary: how many logits a row has.
        max_tokens: the most tokens that one step takes.
        max_sequences: the most sequences, and rows of logits, of one step.
        bos: the token that begins a text, or None.
        eos: tokens that end one.
        layers: how many layers have keys and values in the cache.
        kv_heads: heads of keys, and of values.
        head_size: numbers per head.
        cache_dtype: ``"float32"`` or ``"bfloat16"``.
        tokenizer: path of the tokenizer's file in the artifact, ``"bytes"``, or None.
    """

    entry: str
    context: int
    block: int
    vocabulary: int
    max_tokens: int
    max_sequences: int
    bos: int | None
    eos: tuple[int, ...]
    layers: int
    kv_heads: int
    head_size: int
    cache_dtype: str
    tokenizer: str | None

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.block * _ITEM_BYTES[self.cache_dtype]


def describe(artifact: Artifact) -> Generation:
    """The description of an artifact that generates.

    Raises:
        UsageError: the artifact does not generate text.
        ArtifactError: its description is incomplete or wrong.
    """
    info = artifact.manifest.info
    if not isinstance(info, dict) or SECTION not in info:
        raise UsageError(
            f"{artifact.path}: this model does not generate text (its entry points: {', '.join(artifact.plans)}); "
            f"compile a decoder's checkpoint folder to get one that does"
        )
    return read(info[SECTION], f"{artifact.path / FILE_NAME}: info.{SECTION}", artifact)


def read(data: Any, where: str, artifact: Artifact | None = None) -> Generation:
    """Check the section's values.

    Args:
        data: the section, as JSON has it.
        where: it is, for messages.
        artifact: whose entry points and files the section names.

    Raises:
        ArtifactError: names the value that is wrong.
    """

    def wrong(name: str, expected: str) -> ArtifactError:
        return ArtifactError(f"{where}.{name}: expected {expected}, got {data.get(name)!r}; compile the model again")

    if not isinstance(data, dict):
        raise ArtifactError(f"{where}: expected an object, got {data!r}; compile the model again")
    for name in _POSITIVE:
        if type(data.get(name)) is not int or data[name] < 1:
            raise wrong(name, "a positive number")
    tokens = range(data["vocabulary"])
    bos, eos, tokenizer = data.get("bos"), data.get("eos"), data.get("tokenizer")
    if bos is not None and (type(bos) is not int or bos not in tokens):
        raise wrong("bos", "a token id or null")
    if not isinstance(eos, list) or not all(type(token) is int and token in tokens for token in eos):
        raise wrong("eos", "a list of token ids")
    if data.get("cache_dtype") not in _ITEM_BYTES:
        raise wrong("cache_dtype", " or ".join(_ITEM_BYTES))
    if not isinstance(data.get("entry"), str) or (artifact is not None and data["entry"] not in artifact.plans):
        raise wrong("entry", "the name of an entry point")
    files = {record.path for record in artifact.manifest.files} if artifact is not None else {tokenizer}
    if tokenizer is not None and tokenizer != BYTES and (not isinstance(tokenizer, str) or tokenizer not in files):
        raise wrong("tokenizer", f"a file of the artifact, {BYTES!r} or null")
    if tokenizer == BYTES and data["vocabulary"] < 256:
        raise wrong("vocabulary", "at least 256 for a model of bytes")
    values = {name: data.get(name) for name in Generation.__match_args__}
    return Generation(**values | {"eos": tuple(eos)})

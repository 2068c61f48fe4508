"""Text to tokens and back: the tokenizer that an artifact brings, and text that grows token by token.

Every token stands for some bytes, and a text is the bytes of its tokens decoded as UTF-8. So a character that is spread
over several tokens appears when its last byte is there, never in part, and a token costs constant time.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from ..artifact import Artifact
from ..errors import ArtifactError, InputError, UsageError
from .description import BYTES, Generation

_DECODERS = frozenset(("ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"))
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Text(ABC):
    """How a model's tokens and text correspond."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts before it.

        Raises:
            InputError: the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode: character {error.start} is {text[error.start]!r}, half of a pair or "
                f"a byte that is not UTF-8"
            ) from None
        return self._encode(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The same, for valid text."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for tokens that only control the model."""


class Detokenizer:
    """The text of a sequence, in pieces that end at characters."""

    def __init__(self, text: Text) -> None:
        """Begin where a prompt ends."""
        self._bytes = text.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that a token adds. Bytes that can never become a character are U+FFFD."""
        return self._decoder.decode(self._bytes(token))

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for a character that stayed incomplete."""
        return self._decoder.decode(b"", final=True)


def open_text(artifact: Artifact, description: Generation) -> Text | None:
    """The tokenizer of an artifact, or None where it has none.

    Raises:
        UsageError: it needs the package ``tokenizers``, which is not installed.
        ArtifactError: its file is damaged, or of a kind that is not supported.
    """
    if description.tokenizer is None:
        return None
    if description.tokenizer == BYTES:
        return ByteText(description.bos)
    return FileText(artifact.content(description.tokenizer), str(artifact.path / description.tokenizer))


class ByteText(Text):
    """One token per byte; ids from 256 on have no text."""

    def __init__(self, bos: int | None) -> None:
        """Put ``bos`` before prompts, where there is one."""
        self._before = [] if bos is None else [bos]

    def _encode(self, text: str) -> list[int]:
        return [*self._before, *text.encode()]

    def token_bytes(self, token: int) -> bytes:
        """The byte itself."""
        return bytes((token,)) if token < 256 else b""


class FileText(Text):
    """A ``tokenizer.json``, read by the package ``tokenizers``."""

    def __init__(self, content: bytes, file: str) -> None:
        """Read a tokenizer.

        Args:
            content: of the file.
            file: its path, for messages.

        Raises:
            UsageError: ``tokenizers`` is not installed.
            ArtifactError: the file is no tokenizer, or decodes in a way that is not supported.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UsageError(
                f"{file}: reading it needs the package tokenizers, which is not installed; "
                f"pip install 'tilewright[text]'"
            ) from None
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises plain exceptions
            raise ArtifactError(f"{file}: is no tokenizer that can be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = frozenset(token for token, entry in added.items() if entry.special)
        decoder = self._tokenizer.decoder
        self._piece_bytes = _piece_bytes(None if decoder is None else json.loads(decoder.__getstate__()), file)
        self._cache: dict[int, bytes] = {}

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of the token's piece; none for special tokens and for ids that the tokenizer does not know."""
        found = self._cache.get(token)
        if found is None:
            piece = None if token in self._silent else self._tokenizer.id_to_token(token)
            found = self._cache[token] = b"" if piece is None else self._piece_bytes(piece)
        return found


def _piece_bytes(decoder: Any, file: str) -> Callable[[str], bytes]:
    """How the pieces of a vocabulary become bytes, by the ``decoder`` of its file."""
    parts = _flatten(decoder)
    kinds = {part["type"] for part in parts}
    if unknown := kinds - _DECODERS:
        known = ", ".join(sorted(_DECODERS))
        raise ArtifactError(f"{file}: the decoder {', '.join(sorted(unknown))} is not supported; {known} are")
    if "ByteLevel" in kinds:
        return _byte_level
    if not kinds:
        return lambda piece: f" {piece}".encode()  # without a decoder, pieces are words

    # Fuse joins pieces, which happens here anyway. Strip removes the blank before the first word of a whole text;
    # what is generated goes on after a prompt, and keeps it.
    replaced = [(part["replacement"], " ") for part in parts if part["type"] == "Metaspace"]
    for part in parts:
        if part["type"] == "Replace":
            if "String" not in part["pattern"]:
                raise ArtifactError(f"{file}: a decoder that replaces by a regular expression is not supported")
            replaced.append((part["pattern"]["String"], part["content"]))
    fallback = "ByteFallback" in kinds

    def to_bytes(piece: str) -> bytes:
        if fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes((int(byte[1], 16),))
        for pattern, content in replaced:
            piece = piece.replace(pattern, content)
        return piece.encode()

    return to_bytes


def _flatten(decoder: Any) -> list[Any]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _flatten(inner)]
    return [decoder]


def _visible_bytes() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes.

    Printable Latin-1 stands for itself; the other bytes are, in order, the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_VISIBLE = _visible_bytes()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_VISIBLE[character] for character in piece])
    except KeyError:
        return piece.encode()  # an added token is written as it is

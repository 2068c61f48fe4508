"""Tokens to text: characters are never split, whatever the tokenizer does with bytes."""

from __future__ import annotations

import json
import random
import sys

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tilewright.runtime.errors import ArtifactError, InputError, UsageError
from tilewright.runtime.generation.text import ByteText, Detokenizer, FileText

TEXTS = [
    "Hello, world",
    "  two  blanks\n\ttab",
    "naïve café",
    "日本語の文",
    "👩‍👩‍👧 family",
    "e\u0301",
    "\u0000\x7f ÿ",
    "▁ and Ġ",
]


def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen have it: pieces of visible characters that stand for bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "He", "ll", "Hell", "Ġt"])}
    made = Tokenizer(models.BPE(vocabulary, [("H", "e"), ("l", "l"), ("He", "ll"), ("Ġ", "t")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    made.add_tokens([AddedToken("<call name>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 260)])
    return made


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: blanks are U+2581, and characters without a piece are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helo,wrdé", "▁w", "ll"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "w"), ("l", "l")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def opened(made: Tokenizer) -> FileText:
    return FileText(made.to_str().encode(), "tokenizer.json")


def pieces(text, tokens):
    detokenizer = Detokenizer(text)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("string", TEXTS)
def test_text_comes_back(make, string):
    if make is byte_fallback:
        string = string.replace("▁", " ")  # it writes blanks so, and cannot tell
    text = opened(make())
    tokens = text.encode(string)
    shown = pieces(text, tokens)
    assert "".join(shown).removeprefix(" " if make is byte_fallback else "") == string
    assert not any("\ufffd" in piece for piece in shown)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_package_decodes_valid_text_equally(make):
    made, chance = make(), random.Random(0)
    text = opened(made)
    for _ in range(100):
        tokens = [chance.randrange(made.get_vocab_size()) for _ in range(chance.randint(1, 12))]
        whole = made.decode(tokens)
        if "\ufffd" not in whole:
            mine = "".join(pieces(text, tokens))
            assert mine == whole or (make is byte_fallback and mine.removeprefix(" ") == whole)


def test_special_tokens_are_silent_and_added_ones_are_not():
    made = byte_level()
    text = opened(made)
    tokens = text.encode("Hello <|end|><call name>")
    assert tokens[0] == 260 and 261 in tokens and 262 in tokens
    assert "".join(pieces(text, tokens)) == "Hello <call name>"
    assert text.token_bytes(100_000) == b""


def test_invalid_bytes_are_replaced():
    text = ByteText(None)
    assert pieces(text, b"a\xe4\xb8") == ["a", "", "", "\ufffd"]
    assert pieces(text, b"\xe4\xb8a") == ["", "", "\ufffda", ""]
    assert pieces(text, b"\xff\xfe") == ["\ufffd", "\ufffd", ""]
    assert pieces(text, [0xE4, 300, 0xB8, 0xAD]) == ["", "", "", "中", ""]


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_are_decoded_as_python_does(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(200):
        parts = [chance.choice(TEXTS).encode(), chance.randbytes(3), "é🙂".encode()[: chance.randint(0, 6)]]
        content = b"".join(chance.choices(parts, k=4))
        assert "".join(pieces(ByteText(None), content)) == content.decode(errors="replace")


def test_bytes_get_their_first_token():
    assert ByteText(None).encode("é") == [0xC3, 0xA9] and ByteText(256).encode("a") == [256, 97]


@pytest.mark.parametrize("text", [ByteText(None), opened(byte_level())], ids=["bytes", "file"])
def test_half_characters_are_refused(text):
    with pytest.raises(InputError, match="character 2 is '.udc80'"):
        text.encode("ab\udc80")


def test_padding_and_truncation_of_the_file_do_not_count():
    made = byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=10)
    assert len(opened(made).encode("Hello, worlds")) == 11


def test_words_without_a_decoder():
    made = Tokenizer(models.WordLevel({"a": 0, "cat": 1}, unk_token="a"))
    assert pieces(opened(made), [0, 1]) == [" a", " cat", ""]


@pytest.mark.parametrize(
    "decoder, message",
    [(decoders.WordPiece(), "WordPiece is not supported; ByteFallback, ByteLevel"),
     (decoders.Replace(Regex("x+"), "y"), "regular expression")],
    ids=["kind", "regex"],
)  # fmt: skip
def test_other_decoders_are_refused(decoder, message):
    made = byte_fallback()
    made.decoder = decoder
    with pytest.raises(ArtifactError, match=message):
        opened(made)


def test_a_damaged_file_is_named():
    content = json.dumps({"model": {}}).encode()
    with pytest.raises(ArtifactError, match="x.json: is no tokenizer"):
        FileText(content, "x.json")


def test_the_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'tilewright\[text\]'"):
        FileText(b"{}", "x.json")

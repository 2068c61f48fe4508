"""A compiled checkpoint generates what transformers does, whatever runs beside it and however small its cache is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM

import tilewright
from tilewright.compiler.options import Task
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.generation.sampling import SamplingParams

CONTEXT = 20000
BEGIN, END = 256, 257
PROMPTS = ["def main():", "x", "a" * 70, "for name, value in self.items():\n" * 3, "\n\n", "import os, sys  # é"]
COUNT = 24
COMPILE_ONLY = ("torch", "jinja2", "networkx", "sympy", "onnx", "transformers", "safetensors", "ziglang")


def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token; texts begin with a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<begin>", special=True), AddedToken("<end>", special=True)])
    made.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BEGIN)])
    return made


@pytest.fixture(scope="module")
def decoder() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=END + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=CONTEXT, sliding_window=40, bos_token_id=BEGIN,
        eos_token_id=END, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def artifact(decoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    decoder.save_pretrained(folder / "checkpoint")
    bytes_tokenizer().save(str(folder / "checkpoint" / "tokenizer.json"))
    tilewright.compile(
        folder / "checkpoint", output=folder / "tiny.tw", task=Task("generate", chunk=64, sequences=4), verify="off"
    )
    return folder / "tiny.tw"


@pytest.fixture(scope="module")
def model(artifact):
    with tilewright.load(artifact, threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(decoder) -> list[tuple[int, ...]]:
    """What every prompt is followed by, from the whole text anew for every token."""
    found = []
    for prompt in PROMPTS:
        tokens = bytes_tokenizer().encode(prompt).ids
        with torch.no_grad():
            for _ in range(COUNT):
                tokens.append(int(decoder(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tuple(tokens[-COUNT:]))
    assert END not in {token for tokens in found for token in tokens}
    return found


def test_alone_and_together(model, expected):
    together = model.generate(PROMPTS, max_tokens=COUNT)
    assert [one.tokens for one in together] == expected
    alone = [model.generate(prompt, max_tokens=COUNT)[0] for prompt in PROMPTS]
    assert [one.tokens for one in alone] == expected
    assert [one.text for one in alone] == [bytes_tokenizer().decode(tokens) for tokens in expected]
    assert together[1].prompt_tokens == 2 and together[1].finish == "length"


@pytest.mark.parametrize("step_tokens", [4, 33])
def test_prompts_in_parts(model, expected, step_tokens):
    with model.generator(cache_tokens=1024, step_tokens=step_tokens) as generator:
        found = generator.generate(PROMPTS, [SamplingParams(max_tokens=COUNT)] * len(PROMPTS))
    assert [one.tokens for one in found] == expected


def test_a_cache_too_small_for_all_at_once(model, expected):
    found = model.generate(PROMPTS * 2, max_tokens=COUNT, cache_tokens=160)
    assert [one.tokens for one in found] == expected * 2
    found = model.generate(PROMPTS[:2] * 4, max_tokens=60, cache_tokens=96)
    assert [one.tokens[:COUNT] for one in found] == expected[:2] * 4
    assert sum(one.preempted for one in found) > 0


def test_seeds_and_logprobs(model):
    options = {"max_tokens": 16, "top_p": 0.9, "logprobs": 2}
    together = model.generate(PROMPTS, seed=5, **options)
    alone = model.generate(PROMPTS[2], seed=together[2].seed, **options)[0]
    assert together[2].seed == 7 and alone.tokens == together[2].tokens
    for mine, other in zip(alone.logprobs, together[2].logprobs, strict=True):
        assert mine.chosen == pytest.approx(other.chosen, abs=1e-4)


def test_streams_end_early_and_others_go_on(model, expected):
    with model.generator(cache_tokens=512) as generator:
        params = SamplingParams(max_tokens=COUNT)
        kept, gone = generator.submit(PROMPTS[0], params), generator.submit(PROMPTS[3], params)
        for _ in range(5):
            generator.step()
        generator.cancel(gone)
        late = generator.submit(PROMPTS[4], params)
        while generator.busy:
            generator.step()
        assert (tuple(kept.tokens), tuple(late.tokens)) == (expected[0], expected[4])
        assert tuple(gone.tokens) == expected[3][: len(gone.tokens)] and gone.finish == "cancelled"
        assert generator.free_blocks == generator.blocks
    stream = model.stream(PROMPTS[0])
    assert next(stream).token == expected[0][0]
    stream.close()
    assert stream.completion.finish == "cancelled"


def test_a_failing_step_ends_the_request_that_is_to_blame(model, expected):
    with model.generator(cache_tokens=512) as generator:
        inner = generator._scheduler._step

        def step(tokens, *rest):
            if (tokens == END).any():
                raise RuntimeError("no ends")
            return inner(tokens, *rest)

        generator._scheduler._step = step
        params = [SamplingParams(max_tokens=COUNT)] * 3
        found = generator.generate([PROMPTS[0], [5, END, 5], PROMPTS[1]], params, keep_errors=True)
        assert [one.finish for one in found] == ["length", "error", "length"] and str(found[1].error) == "no ends"
        assert [found[0].tokens, found[2].tokens] == expected[:2]
        assert generator.free_blocks == generator.blocks


@pytest.mark.parametrize(
    "prompt, options, error, message",
    [
        (np.zeros(CONTEXT, int), {}, InputError, f"prompt has {CONTEXT} tokens, and the model's context is {CONTEXT}"),
        ("a", {"max_tokens": CONTEXT}, InputError, f"ask for at most {CONTEXT - 2}"),
        ("a" * 39, {"max_tokens": 25, "cache_tokens": 64}, InputError, "needs 65 positions .* cache has 64"),
        ("a", {"cache_tokens": 10**9}, UsageError, "compiled for caches of at most"),
        ("a\udc80", {}, InputError, "not valid Unicode"),
        ([END + 1], {}, InputError, "the token 258, but the model's are 0 to 257"),
        ([], {}, UsageError, "empty"),
        ("a", {"temprature": 1}, UsageError, "no parameter 'temprature'"),
    ],
)
def test_bad_input(model, prompt, options, error, message):
    with pytest.raises(error, match=message):
        model.generate([prompt], **options)
    with pytest.raises(error, match=message):
        model.stream(prompt, **options)


def test_a_model_that_does_not_generate(tmp_path):
    tilewright.compile(torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),), output=tmp_path / "x.tw", verify="off")
    with tilewright.load(tmp_path / "x.tw") as linear, pytest.raises(UsageError, match="does not generate text"):
        linear.generate("a")


BLOCKED = f"""
import sys
for name in {COMPILE_ONLY!r}:
    sys.modules[name] = None
from tilewright.compiler.cli import main
main()
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", BLOCKED, "generate", *map(str, arguments)]


def test_the_command_needs_no_torch(artifact, expected):
    done = subprocess.run(
        command(artifact, "--batch-file", "-", "--json", "-n", COUNT, "--threads", 2),
        input="\n".join([PROMPTS[0], PROMPTS[1]]).encode(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [tuple(json.loads(line)["tokens"]) for line in done.stdout.splitlines()] == expected[:2]


def test_an_interrupt_flushes_what_there_is(artifact, expected):
    with subprocess.Popen(
        command(artifact, "--prompt", PROMPTS[0]), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        text = (first + process.stdout.read()).decode()
        assert process.wait(60) == 130 and process.stderr.read().decode().strip() == "interrupted"
    whole = bytes_tokenizer().decode(expected[0])
    assert text[:8].startswith(whole[: len(text) - 1][:8]) and len(text) > 1

"""``tilewright generate`` over a model that counts: after a byte comes the next one, after ``z`` the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tilewright.compiler.cli import cli
from tilewright.runtime import model as model_module

GENERATION = {
    "entry": "step", "context": 64, "block": 4, "vocabulary": 256, "max_tokens": 16, "max_sequences": 4, "bos": None,
    "eos": [ord("z") + 1], "layers": 1, "kv_heads": 1, "head_size": 8, "cache_dtype": "float32", "tokenizer": "bytes",
}  # fmt: skip


class Counting:
    """Stands for a loaded model."""

    def __init__(self) -> None:
        manifest = SimpleNamespace(info={"generation": GENERATION}, files=())
        self.artifact = SimpleNamespace(manifest=manifest, path=Path("count.tw"), plans={"step": None})
        self.sessions: list[int] = []
        self.interrupt_at = 0
        self.calls = 0

    def entry(self, name: str) -> Any:
        return SimpleNamespace(plan=SimpleNamespace(ranges=lambda: {"blocks": (1, 64)}))

    def session(self, sizes: dict[str, int]) -> Any:
        self.sessions.append(sizes["blocks"])
        return SimpleNamespace(entry=lambda name: self.step, close=lambda: self.sessions.append(-1))

    def step(self, tokens, positions, starts, contexts, table, rows) -> dict[str, np.ndarray]:
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        logits = np.zeros((len(rows), 256), np.float32)
        logits[np.arange(len(rows)), (tokens[rows] + 1) % 256] = 3
        return {"logits": logits}

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.sessions.count(-1) == len(self.sessions) / 2, "a session was left open"


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()
    monkeypatch.setattr(model_module, "load", lambda path, **options: made)
    return made


def call(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", "count.tw", *map(str, arguments)], input=stdin)


def test_text_goes_to_standard_output_and_speed_to_standard_error(counting):
    done = call("--prompt", "uvw")
    assert done.exit_code == 0 and done.stdout == "xyz\n"
    assert done.stderr.startswith("prompt: 3 tokens in ") and "generated: 4 tokens" in done.stderr
    assert done.stderr.endswith("ended by 123\n")
    assert counting.sessions == [16, -1]  # the context
    quiet = call("--prompt", "-", "-q", "--max-tokens", 2, "--cache-tokens", 9, stdin=b"ab")
    assert (quiet.stdout, quiet.stderr) == ("cd\n", "") and counting.sessions[2:] == [3, -1]


def test_stop_and_limits():
    assert call("--prompt", "a", "--stop", "ef", "--stop", "zz").stdout == "bcd\n"
    assert call("--prompt", "w", "--ignore-eos", "-n", 5).stdout == "xyz{|\n"
    assert call("--prompt", "w", "-n", 1).stdout == "x\n"


def test_a_document(counting):
    done = call("--prompt", "w", "--json", "--logprobs", 1, "--temperature", 0.01, "--seed", 5)
    data = json.loads(done.stdout)
    assert data["text"] == "xyz" and data["tokens"] == [*b"xyz{"] and data["stopped_by"] == 123
    assert (data["finish"], data["seed"], data["prompt_tokens"], data["error"]) == ("stop", 5, 1, None)
    assert [entry["top"][0][0] for entry in data["logprobs"]] == data["tokens"]
    assert "logprobs" not in json.loads(call("--prompt", "w", "--json").stdout)


def test_a_batch_in_the_order_of_the_file(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"w\r\n\nabc\nxy")
    done = call("--batch-file", tmp_path / "prompts.txt", "-n", 4)
    assert done.stdout == "== line 1 (stop) ==\nxyz\n== line 3 (length) ==\ndefg\n== line 4 (stop) ==\nz\n"
    assert done.stderr.startswith("3 prompts in ") and "6 prompt tokens" in done.stderr
    done = call("--batch-file", "-", "-n", 4, "--json", "--seed", 7, "--temperature", 0.01, stdin=b"w\nabc\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["line"], line["text"], line["seed"]) for line in lines] == [(1, "xyz", 7), (2, "defg", 8)]


def test_objects_override_the_options(tmp_path):
    requests = [{"prompt": "a", "max_tokens": 2}, {"prompt": [98, 99], "stop": ["f"]}, {"prompt": "c"}]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    done = call("--batch-file", path, "-n", 5, "--json")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["bc", "de", "defgh"]


def test_one_bad_prompt_leaves_the_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w"}\n{"prompt": [300]}\n{"prompt": "x"}\n')
    done = call("--batch-file", path, "--json")
    assert done.exit_code == 1
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["xyz", "", "yz"]
    assert "the token 300" in json.loads(done.stdout.splitlines()[1])["error"]
    assert "error: line 2: the prompt has the token 300" in done.stderr


def test_an_interrupt_shows_what_there_is(counting, tmp_path):
    counting.interrupt_at = 4
    done = call("--prompt", "a", "--stop", "def")
    assert (done.exit_code, done.stdout, done.stderr.strip()) == (130, "bcd\n", "interrupted")
    counting.interrupt_at, counting.calls = 3, 0
    done = call("--prompt", "a", "--json")
    assert done.exit_code == 130 and json.loads(done.stdout)["text"] == "bc"
    counting.calls = 0
    done = call("--batch-file", "-", "--json", stdin=b"z\na\nb\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 130
    assert [(line["finish"], line["text"]) for line in lines] == [
        ("stop", ""),
        ("cancelled", "bc"),
        ("cancelled", "cd"),
    ]


@pytest.mark.parametrize(
    "arguments, stdin, code, message",
    [
        ((), None, 2, "either --prompt TEXT or --batch-file FILE"),
        (("--prompt", "a", "--batch-file", "-"), None, 2, "either --prompt"),
        (("--prompt", ""), None, 2, "the prompt is empty"),
        (("--prompt", "a" * 64), None, 1, "prompt has 64 tokens, and the model's context is 64"),
        (("--prompt", "a", "-n", 64), None, 1, "together 65, .* ask for at most 63"),
        (("--prompt", "a", "-n", 30, "--cache-tokens", 8), None, 1, "needs 31 positions .* cache has 8"),
        (("--prompt", "a", "--cache-tokens", 0), None, 2, "cache_tokens: expected a whole number at least 1"),
        (("--prompt", "a", "--cache-tokens", 1000), None, 2, "caches of at most 256 positions"),
        (("--prompt", "a", "--top-p", 2), None, 2, "top_p: expected a number above 0 and at most 1"),
        (("--prompt", "a", "--logprobs", 1), None, 2, "--logprobs shows nothing without --json"),
        (("--prompt", "-"), b"ab\xff", 1, r"standard input: is not UTF-8 text: byte 2 \(line 1\) is 0xff"),
        (("--prompt", "a\udcff"), None, 1, "not valid Unicode: character 1"),
        (("--batch-file", "-"), b"a\nb\nc\xe4", 1, r"byte 5 \(line 3\) is 0xe4"),
        (("--batch-file", "-"), b"\n\n", 2, "-: holds no prompts"),
        (("--batch-file", "none.txt"), None, 2, "none.txt: No such file"),
    ],
)
def test_wrong_use_is_one_clear_line(arguments, stdin, code, message):
    done = call(*arguments, stdin=stdin)
    assert done.exit_code == code and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "content, message",
    [
        ("nonsense", "line 1: is no JSON"),
        ('{"text": "a"}', 'line 1: expected an object with "prompt"'),
        ('{"prompt": "a", "temp": 1}', "line 1: there is no parameter 'temp'"),
        ('{"prompt": "a"}\n{"prompt": "b", "top_k": 0}', "line 2: top_k: expected"),
    ],
)
def test_wrong_objects_name_their_line(content, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    done = call("--batch-file", tmp_path / "x.jsonl")
    assert done.exit_code == 2 and message in done.stderr


@pytest.mark.parametrize("prompt", ["5", "null", "true", '{"a": 1}', "[0.5]", "[[1]]", "[]"])
def test_a_prompt_of_another_type_fails_alone(prompt, tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"prompt": {prompt}}}\n{{"prompt": "a", "max_tokens": 2}}')
    done = call("--batch-file", tmp_path / "x.jsonl")
    assert done.exit_code == 1 and "== line 2 (length) ==\nbc\n" in done.stdout
    assert re.search(
        "^error: line 1: (a prompt is a string or a list of token ids|the prompt is empty)", done.stderr, re.M
    )


def test_a_model_that_does_not_generate(counting):
    counting.artifact.manifest.info = {}
    done = call("--prompt", "a")
    assert done.exit_code == 2
    assert "count.tw: this model does not generate text (its entry points: step); compile a decoder" in done.stderr

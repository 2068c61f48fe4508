"""The same input and options give the same bytes, in another process, another directory and another hash order.

Two processes compile at the same time everything that the tests look at: most of their time is starting.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import tilewright
from tilewright.codegen.cache import Cache

SCRIPT = '''
"""Compiles models into one directory: one through the kernel cache in the other directory, the others without."""
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

import tilewright
from tilewright.compiler.capture import capture
from tilewright.models.initialize import initialize

torch.set_num_threads(1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 20, 3, padding=1), nn.Linear(20, 5)

    def forward(self, image):
        x = F.max_pool2d(self.norm(self.first(image)).relu(), 2)
        return self.head((self.second(x) + 1).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids):
        x = self.table(ids)
        y = self.norm(x)
        q, k, v = (part(y).unflatten(2, (4, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        x = x + (scores @ v).transpose(1, 2).flatten(2)
        return {"logits": x + self.down(F.gelu(self.up(x))), "attention": scores}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 8)

    def forward(self, x):
        return self.head(self.norm(x).sin())


V3, V4, GPUS = "cpu:x86-64-v3", "cpu:x86-64-v4", "cuda:sm_80,cuda:sm_90"
for name, target, module, sample, shapes in (
    ("cached", V3, Small(), torch.ones(2, 24), None),
    ("cnn", f"{V3},{V4}", Network(), torch.randn(2, 3, 12, 12), {"image": "batch:1..8,3,12,12"}),
    ("transformer", V3, Block(), torch.zeros(2, 6, dtype=torch.int64), {"ids": "batch:1..8,seq:1..32"}),
    ("gpus", f"{GPUS},{V3}", Small(), torch.ones(3, 24), None),
):
    os.environ["TILEWRIGHT_CACHE"] = sys.argv[2] if name == "cached" else "off"
    tilewright.compile(
        initialize(module, 0), (sample,), output=f"{sys.argv[1]}/{name}.tw", dynamic_shapes=shapes,
        target=target, verify="off", ptx="cuda" in target,
    )

module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
program = capture("main", module, (torch.ones(1, 3, 8, 8),), shapes={"input": "batch:1..4,3,2*h:4..9,w:8..16"})
for node in program.graph.nodes:
    print(node.format_node(), getattr(node.meta.get("val"), "shape", node.meta.get("val")), node.meta.get("source"))
print(program.inputs, program.symbols, program.guards, program.results)
'''


@dataclass(frozen=True)
class Runs:
    """Where two processes have put their artifacts, what each printed, and the cache of kernels that they shared."""

    first: Path
    second: Path
    cache: Path
    printed: tuple[str, str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes that have run the script at the same time."""
    top, started = tmp_path_factory.mktemp("runs"), []
    first, second, cache = top / "a", top / "another" / "place", top / "cache"
    for seed, folder in (("1", first), ("77", second)):
        folder.mkdir(parents=True)
        source = folder / "network.py"
        source.write_text(SCRIPT)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(folder)}
        command = [sys.executable, str(source), str(folder), str(cache)]
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    printed = []
    for run in started:
        text, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        printed.append(text)
    return Runs(first, second, cache, tuple(printed))


@pytest.mark.parametrize(
    ("name", "libraries", "others"),
    [("cnn.tw", 2, ()), ("transformer.tw", 1, ()), ("gpus.tw", 1, (".cubin", ".ptx")), ("cached.tw", 1, ())],
)
def test_two_processes_give_the_same_bytes(runs, name, libraries, others):
    first, second = runs.first / name, runs.second / name
    files = _files(first)
    assert files == _files(second)
    assert sum(path.endswith("model.so") for path in files) == libraries
    assert all(any(path.endswith(ending) for path in files) for ending in others)
    for path in files:
        content = (first / path).read_bytes()
        assert content == (second / path).read_bytes(), f"{name}/{path} differs"
        for place in (runs.cache.parent, Path(tilewright.__file__).parent):
            assert str(place).encode() not in content, f"{name}/{path} names {place}"
    tilewright.load(first, device="cpu").close()


def test_two_processes_capture_the_same_program(runs):
    first, second = runs.printed
    assert first == second
    assert "batch" in first and not re.search(r"\bs\d+\b", first), "the exporter's own symbols leaked"


def test_builds_at_the_same_time_share_the_cache(runs):
    files = [path for path in runs.cache.rglob("*") if path.is_file()]
    assert files and not [path for path in files if path.name.startswith("partial-")]
    assert all(Cache(runs.cache).get(path.name) is not None for path in files)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

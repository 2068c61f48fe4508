"""The same input and options give the same bytes, in another process, another directory and another hash order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tilewright

SCRIPT = '''
"""Compiles a convolutional network for two targets and a transformer for one into the directory of its argument."""
import sys

import torch
import torch.nn.functional as F
from torch import nn

import tilewright
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


V3, V4 = "cpu:x86-64-v3", "cpu:x86-64-v4"
for name, target, module, sample, shapes in (
    ("cnn", f"{V3},{V4}", Network(), torch.randn(2, 3, 12, 12), {"image": "batch:1..8,3,12,12"}),
    ("transformer", V3, Block(), torch.zeros(2, 6, dtype=torch.int64), {"ids": "batch:1..8,seq:1..32"}),
):
    tilewright.compile(
        initialize(module, 0), (sample,), output=f"{sys.argv[1]}/{name}.tw", dynamic_shapes=shapes,
        target=target, verify="off",
    )
'''


def test_two_processes_give_the_same_bytes(tmp_path):
    runs = []
    for seed, folder in (("1", tmp_path / "a"), ("77", tmp_path / "another" / "place")):
        folder.mkdir(parents=True)
        source = folder / "network.py"
        source.write_text(SCRIPT)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TILEWRIGHT_CACHE": "off", "TMPDIR": str(folder)}
        runs.append(
            subprocess.Popen(
                [sys.executable, str(source), str(folder)], cwd=folder, env=environment, stderr=subprocess.PIPE
            )
        )
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors.decode()
    for name, targets in (("cnn.tw", 2), ("transformer.tw", 1)):
        first, second = tmp_path / "a" / name, tmp_path / "another" / "place" / name
        files = _files(first)
        assert files == _files(second)
        assert sum(path.endswith("model.so") for path in files) == targets
        for path in files:
            content = (first / path).read_bytes()
            assert content == (second / path).read_bytes(), f"{name}/{path} differs"
            for place in (tmp_path, Path(tilewright.__file__).parent):
                assert str(place).encode() not in content, f"{name}/{path} names {place}"
        tilewright.load(first).close()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

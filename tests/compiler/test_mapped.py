"""Pages of memory-mapped weights go when they are given back, and come again from the file."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tilewright
from tilewright.compiler import driver
from tilewright.compiler.frontends.weights import map_tensors, weight_files
from tilewright.compiler.mapped import release

SMAPS = Path("/proc/self/smaps")


def resident(path: Path) -> int:
    """KiB of a file that are in this process's memory."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not SMAPS.exists(), reason="reads Linux's memory accounting")
def test_pages_go_and_come_again(tmp_path):
    save_file({"w": torch.arange(1 << 18, dtype=torch.float32)}, tmp_path / "model.safetensors")
    save_file({"w": torch.ones(1 << 18)}, tmp_path / "other.safetensors")
    (path,) = weight_files(tmp_path)
    weight, mine = map_tensors(tmp_path)["w"], torch.ones(1 << 18)
    total = weight.double().sum()
    assert resident(path) >= 1024
    release([path, tmp_path / "other.safetensors"])
    assert resident(path) == 0
    assert torch.equal(weight.double().sum(), total) and mine.sum() == 1 << 18
    release([])
    assert resident(path) >= 1024


@pytest.mark.skipif(not SMAPS.exists(), reason="reads Linux's memory accounting")
def test_pages_that_processes_share_go_likewise(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (1 << 12))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == path.read_bytes() and resident(path) == 1024
        release([path])
        assert resident(path) == 0 and mapped[511] == 255


def test_a_large_artifact_gives_back_pages_while_it_is_verified(tmp_path, monkeypatch):
    released = []

    def noting(files):
        released.extend(file.name for file in files)
        release(files)

    monkeypatch.setattr(driver, "LARGE", 0)
    monkeypatch.setattr(driver, "release", noting)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    done = tilewright.compile(net, (torch.randn(2, 8),), output=tmp_path / "m.tw")
    assert done.errors and max(error.error for error in done.errors) < 1e-5
    assert released == ["weights.safetensors"] * 2, "after every step"

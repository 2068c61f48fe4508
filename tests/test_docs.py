"""The pages say what is there: links and files exist, the README's example runs, its models are the registry's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tilewright
from tilewright import models

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
SOURCES = [path for path in ROOT.glob("*/**/*") if path.suffix in (".py", ".c", ".h", ".jinja")]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_source_files_exist(page):
    """A path is looked up from the root or from its last parts, as pages shorten what stands beside each other."""
    known = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    examples = {"verb_object.py", "file.py", "model.c"}
    for name in re.findall(r"`([\w./-]+\.(?:py|c|h|jinja))`", without_blocks(page.read_text())):
        found = name in examples or any(path == name or path.endswith(f"/{name}") for path in known)
        assert found, f"{page.name} names {name}, which is not in the repository"


def test_the_readme_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert "[[" in capsys.readouterr().out
    assert (tmp_path / "linear.tw" / "manifest.json").is_file()


def test_the_readme_shapes_are_understood(tmp_path):
    (shapes,) = re.findall(r"`dynamic_shapes=(\{.*?\})`", README)
    output = tmp_path / "linear.tw"
    tilewright.compile(
        torch.nn.Linear(8, 4).eval(), (torch.randn(2, 8),), output=output, dynamic_shapes=eval(shapes), verify="off"
    )
    with tilewright.load(output) as model:
        assert model(np.zeros((64, 8), np.float32)).shape == (64, 4)


def test_the_readme_names_every_model():
    (listed,) = re.findall(r"\*\*Models by name\*\*: (.*?)\. `digits`", " ".join(README.split()))
    assert re.findall(r"`(\w+)`", listed) == models.names()

"""A folder is a stage and imports run one way: which folder may import which, read from the source."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder → what it may import of ours, besides itself. A name with a dot stands for that part only.
ALLOWED = {
    "runtime": (),
    "models": (),
    "passes/graph": ("runtime.errors",),
    "passes": ("passes.graph", "runtime.errors"),
    "codegen": ("passes.graph", "runtime", "__version__"),
    "compiler": ("models", "passes", "codegen", "runtime", "__version__"),
}
HEAVY = {"torch", "onnx", "networkx", "jinja2", "safetensors", "transformers", "sympy"}


def folder_of(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return max((folder for folder in ALLOWED if relative.startswith(f"{folder}/")), key=len)


def imports(path: Path):
    """(line, dotted name) of everything imported; names of ours relative to the root."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            for alias in node.names:
                yield node.lineno, ".".join(part for part in (*base, alias.name) if part), True
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", False


FILES = [
    path for folder in ("runtime", "models", "passes", "codegen", "compiler") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    folder = folder_of(path)
    allowed = (folder.replace("/", "."), *ALLOWED[folder])
    for line, name, ours in imports(path):
        assert ours or name.partition(".")[0] != "tilewright", f"{path}:{line}: import {name} relatively"
        if ours:
            fits = any(name == one or name.startswith(f"{one}.") for one in allowed)
            assert fits, f"{path}:{line}: {folder} may not import {name}"
        elif folder == "runtime":
            assert name.partition(".")[0] not in HEAVY, f"{path}:{line}: the runtime may not import {name}"


def test_triton_stays_in_the_interpreter_s_process():
    """The worker and its modules import Triton; the runtime starts the worker as a process and imports none of them."""
    own = {f"runtime.interpreter.{name}" for name in ("worker", "patches", "quick")}
    for path in (ROOT / "runtime").rglob("*.py"):
        if ".".join(path.relative_to(ROOT).with_suffix("").parts) in own:
            continue
        for line, name, _ in imports(path):
            assert name.partition(".")[0] != "triton" and name not in own, f"{path}:{line}: imports {name}"


def test_every_package_is_checked():
    found = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert found <= {folder.split("/")[0] for folder in ALLOWED}
    assert len(FILES) > 100


def test_every_package_is_installed():
    """The wheel has the packages that pyproject.toml lists; an editable install has all of them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    stages = {folder.split("/")[0] for folder in ALLOWED}
    found = {ROOT} | {init.parent for stage in stages for init in (ROOT / stage).rglob("__init__.py")}
    names = {".".join(("tilewright", *folder.relative_to(ROOT).parts)) for folder in found}
    assert sorted(listed) == sorted(names)

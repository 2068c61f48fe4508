"""What runs an artifact needs no PyTorch, and imports between the packages run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import tilewright
from tilewright import models

ROOT = Path(tilewright.__file__).parent
PACKAGES = ("compiler", "passes", "codegen", "runtime", "models")
COMPILE_ONLY = ("torch", "jinja2", "networkx", "sympy", "onnx", "transformers", "safetensors", "ziglang", "tokenizers")

BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ImportError
"""


def run(script: str, *arguments: str) -> str:
    """Standard output of a script in a process where what only compiling needs cannot be imported."""
    script = BLOCKED.format(blocked=COMPILE_ONLY) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["mlp", "digits"])
def test_artifacts_run_without_torch(name, tmp_path):
    spec = models.get(name)
    (x,), _ = spec.example()
    tilewright.compile(name, output=tmp_path / "model.tw")
    np.save(tmp_path / "x.npy", x.numpy())
    run(
        """
        import sys
        import numpy as np
        import tilewright
        folder = sys.argv[1]
        with tilewright.load(f"{folder}/model.tw", threads=2) as model:
            x = np.load(f"{folder}/x.npy")
            np.save(f"{folder}/y.npy", model(x))
            assert model(np.concatenate([x] * 5)).shape[0] == 5 * len(x)
            try:
                model(x[:, :1])
            except tilewright.TilewrightError as error:
                assert type(error).__name__ == "ShapeError"
            model.profile(x)
        assert not [name for name in sys.modules if ".generation" in name]
        """,
        str(tmp_path),
    )
    with torch.no_grad():
        expected = spec.build()(x).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5, atol=1e-5)


def test_commands_without_torch(tmp_path):
    tilewright.compile("mlp", output=tmp_path / "model.tw")
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 128), np.float32))
    out = run(
        """
        import sys
        from tilewright.compiler.cli import cli
        folder = sys.argv[1]
        for arguments in (
            ["run", f"{folder}/model.tw", "--input", f"{folder}/x.npz", "-o", f"{folder}/y.npz"],
            ["inspect", f"{folder}/model.tw"],
            ["bench", f"{folder}/model.tw", "--help"],
        ):
            try:
                cli.main(arguments)
            except SystemExit as end:
                assert not end.code, (arguments, end.code)
        import numpy as np
        print([array.shape for array in np.load(f"{folder}/y.npz").values()])
        """,
        str(tmp_path),
    )
    assert "(3, 10)" in out


def test_the_runtime_imports_numpy_and_the_standard_library_only():
    out = run(
        """
        import importlib, pkgutil, sys
        import tilewright.runtime
        for module in pkgutil.iter_modules(tilewright.runtime.__path__):
            importlib.import_module(f"tilewright.runtime.{module.name}")
        names = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
        foreign = names - set(sys.stdlib_module_names) - {"numpy", "ml_dtypes", "tilewright"}
        print(sorted(name for name in foreign if not name.startswith("_")))
        print(sorted({name.split(".")[1] for name in sys.modules if name.startswith("tilewright.")}))
        """
    )
    assert out.splitlines() == ["[]", "['runtime']"]


def test_importing_the_package_imports_nothing_heavy():
    out = run("import tilewright, sys; print('numpy' in sys.modules, 'tilewright.compiler' in sys.modules)")
    assert out.split() == ["False", "False"]


# -- the direction of imports ------------------------------------------------------------------------------------------

ALLOWED = {  # package -> siblings that its modules may import; "package.module" allows that module alone
    "runtime": (),
    "models": (),
    "passes": ("runtime.errors",),
    "codegen": ("passes.graph", "runtime"),
    "compiler": ("models", "passes", "codegen", "runtime"),
}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a module of the package imports."""
    package = ("tilewright", *path.relative_to(ROOT).with_suffix("").parts)[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "tilewright" or len(parts) < 2 or parts[1] not in PACKAGES or parts[1] == package:
                continue
            target = ".".join(parts[1:])
            if not any(target == allowed or target.startswith(f"{allowed}.") for allowed in ALLOWED[package]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_runtime_names_no_foreign_package():
    known = {*sys.stdlib_module_names, "numpy", "ml_dtypes", "tilewright", "__future__"}
    extras = {
        "interpreter": {"triton"},
        "cuda": {"cuda"},
        "generation": {"tokenizers"},
    }  # each inside its own folder only
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        for line, name in imports(path)
        if name.partition(".")[0] not in known | extras.get(path.parent.name, set())
    ]
    assert not wrong, "\n".join(wrong)

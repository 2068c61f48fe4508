"""The runtime in a process of its own: without torch, with few imports, and started by a C program's rules."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runs_without_torch(toy):
    out = run(
        """
        import sys
        for name in ("torch", "onnx", "networkx", "jinja2", "safetensors", "transformers"):
            sys.modules[name] = None
        import numpy as np, tilewright
        with tilewright.load(sys.argv[1], threads=2) as model:
            x, idx = np.ones((3, 8), np.float32), np.arange(3)
            print(model(x, idx).shape, model.entry("busy")(np.zeros((50, 64), np.float32))[0].max())
            try:
                model(x, np.full(3, 10))
            except tilewright.TilewrightError as error:
                print(type(error).__name__)
        """,
        str(toy),
    )
    assert out.split("\n") == ["(3, 4) 64.0", "InputError", ""]


def test_imports_nothing_that_it_does_not_need(toy):
    out = run(
        """
        import sys
        import tilewright.runtime.model, tilewright.runtime.cpu_device
        heavy = ("torch", "numpy", "dataclasses", "inspect", "ml_dtypes", "rich", "click", "asyncio", "unittest")
        heavy += ("multiprocessing", "email", "http")
        print([name for name in heavy if name in sys.modules])
        print(sorted({name.split(".")[1] for name in sys.modules if name.startswith("tilewright.")}))
        """
    )
    assert out.split("\n")[:2] == ["[]", "['runtime']"]


def test_exit_with_a_call_running_does_not_hang_or_crash(toy):
    run(
        """
        import sys, threading, time
        import numpy as np, tilewright
        model = tilewright.load(sys.argv[1], threads=3)
        x = np.zeros((4096, 64), np.float32)
        def forever():
            while True:
                model.entry("busy")(x)
        threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.2)
        """,
        str(toy),
    )


@pytest.mark.parametrize("file", sorted((PACKAGE / "runtime").glob("*.py")), ids=lambda path: path.name)
def test_no_eval_and_no_pickle(file):
    text = file.read_text()
    for word in ("eval(", "exec(", "pickle", "import torch", "marshal"):
        assert word not in text, word

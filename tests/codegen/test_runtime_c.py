"""The C thread pool: every unit once, faults, several callers, forks, sanitizers, and libraries that load anywhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tilewright.codegen.c import toolchain
from tilewright.codegen.targets import parse
from tilewright.runtime.cpu import features

SOURCES = Path(__file__).parents[2] / "codegen" / "templates" / "c"
DRIVER = Path(__file__).with_name("runtime_driver.c")
COMPILERS = toolchain.available_compilers()


def build(folder: Path, command: tuple[str, ...], *flags: str) -> Path:
    program = folder / "driver"
    warnings = ("-Wall", "-Wextra", "-Werror", "-std=gnu11", "-pthread", "-I", str(SOURCES))
    text = (*command, *warnings, *flags, str(DRIVER), str(SOURCES / "tw_runtime.c"), "-o", str(program))
    done = subprocess.run(text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module", params=COMPILERS, ids=lambda compiler: compiler.kind)
def driver(request, tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("driver"), request.param.command, "-O2")


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_unit_is_done_once_whoever_calls_and_forks(driver, threads):
    done = subprocess.run([driver, "check", str(threads), "4000"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("threads", [2, 4])
def test_no_data_races(tmp_path, threads):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc's thread sanitizer")
    program = build(tmp_path, ("gcc",), "-O1", "-g", "-fsanitize=thread", "-DNO_FORK")
    done = subprocess.run([program, "check", str(threads), "3000"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


# A child of a process with threads may inherit the locks of gcc's address sanitizer held, and wait for them for ever.
@pytest.mark.parametrize("flags", [("-fsanitize=address,undefined", "-DNO_FORK"), ("-fsanitize=undefined",)])
def test_no_undefined_behaviour(tmp_path, flags):
    if not shutil.which("gcc"):
        pytest.skip("needs gcc's sanitizers")
    program = build(tmp_path, ("gcc",), "-O1", "-g", *flags, "-fno-sanitize-recover=all")
    done = subprocess.run([program, "check", "3", "1000"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda compiler: compiler.kind)
def test_library_is_portable(compiler):
    """Linking fails when the runtime binds to a C library newer than the floor."""
    target = parse("cpu", features())
    entry = (
        '#include "tw_runtime.h"\nconst char tw_weights_id[65] = "";\nconst int64_t tw_weights_size = 0;\n'
        "TW_API int32_t tw_run_main(tw_call *call) { return call->fault; }\n"
    )
    runtime = (SOURCES / "tw_runtime.c").read_text()
    sources = [toolchain.Source("tw_runtime", runtime), toolchain.Source("entry_main", entry)]
    objects = toolchain.compile_objects(compiler, sources, target, cache=None)
    assert toolchain.link_shared(compiler, objects, target)

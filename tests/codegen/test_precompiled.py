"""Precompiled intrinsics: the objects are the same with and without, and they are made only where they pay."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tilewright.codegen.c import precompiled, toolchain
from tilewright.codegen.c.toolchain import COMPILE_FLAGS, INCLUDE_DIRECTORY, Source, compile_object, compile_objects
from tilewright.codegen.targets import parse

TEXT = '#include "tw_sums.h"\nfloat total(const float *x) {{ return x[0] + {number}; }}\n'
TARGET = parse("cpu:x86-64-v4", frozenset())


@pytest.fixture(params=["gcc", "zig"])
def compiler(request, monkeypatch):
    """A compiler, and headers of this test's own."""
    found = [compiler for compiler in toolchain.available_compilers() if compiler.kind == request.param]
    if not found:
        pytest.skip(f"no {request.param}")
    monkeypatch.setattr(toolchain, "PRECOMPILED", precompiled.Precompiled())
    return found[0]


def made() -> list[Path]:
    folder = toolchain.PRECOMPILED._folder
    return sorted(Path(folder.name).glob("*.gch")) if folder else []


def test_objects_are_the_same(compiler):
    sources = [Source(f"k{number}", TEXT.format(number=number)) for number in range(2)]
    flags = (*COMPILE_FLAGS, *TARGET.flags(compiler.kind))
    without = [compile_object(compiler, source, flags) for source in sources]
    assert not made(), "one source alone is no reason"
    assert compile_objects(compiler, sources, TARGET) == without
    assert len(made()) == 1
    compile_objects(compiler, [Source("k2", TEXT.format(number=2))], TARGET)
    assert len(made()) == 1, "what is there is used"
    shutil.rmtree(toolchain.PRECOMPILED._folder.name)
    assert compile_objects(compiler, sources, TARGET) == without, "it may be tidied up by others"
    broken = (*compiler.command, "-no-such-flag"), compiler.kind, 2
    assert toolchain.PRECOMPILED.options(*broken) == () == toolchain.PRECOMPILED.options(*broken)


def test_gcc_reads_little_for_avx2(compiler):
    """Where parts of the header are enough, nothing is precompiled, and only they are read."""
    target = parse("cpu:x86-64-v3", frozenset())
    sources = [Source(f"k{number}", TEXT.format(number=number)) for number in range(2)]
    compile_objects(compiler, sources, target)
    assert len(made()) == (compiler.kind != "gcc")
    command = (*compiler.command, *target.flags(compiler.kind), "-I", str(INCLUDE_DIRECTORY), "-E", "-x", "c", "-")
    read = subprocess.run(command, input='#include "tw_sums.h"\n', capture_output=True, text=True, check=True).stdout
    assert "_mm256_permutevar8x32_epi32" in read and ("_mm512_add_ps" in read) == (compiler.kind != "gcc")


def test_finds_out_who_needs_them():
    needs = precompiled.needs_intrinsics
    assert needs('#include "tw_attention.h"\n', INCLUDE_DIRECTORY) and needs(
        "# include <immintrin.h>", INCLUDE_DIRECTORY
    )
    assert not needs('#include "tw_math.h"\n/* immintrin.h */\n', INCLUDE_DIRECTORY)

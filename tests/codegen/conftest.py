"""The ``native`` fixture: render a kernel template (or take C text), compile it, call it from numpy.

::

    def test_it(native):
        source = native.render("matmul.c.jinja", name="k", prelude="...", ...)
        kernel = native.build(source, "k", target="v3", compiler="gcc")
        kernel([x, w, y], [m, n, k], units)                 # units [0, units)
        assert kernel([x, w, y], [m, n, k], 3, 7) == 0      # units [3, 7); returns the fault word

Tests parametrize over ``target`` ("v3"; "v4base"; "v4" with VNNI and BF16) and ``compiler`` ("gcc", "zig"); a target
that the processor cannot run skips the test. ``make sanitize`` (TILEWRIGHT_TEST_SANITIZE=1, libasan preloaded) builds
with address and undefined-behaviour sanitizers and runs the tests that are marked for it::

    @pytest.mark.sanitize                       # all its cases
    @pytest.mark.sanitize("5x2", "groups")      # those whose names hold one of these
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from tilewright.codegen.c.precompiled import PRECOMPILED, needs_intrinsics

TEMPLATES = Path(__file__).parents[2] / "codegen" / "templates" / "c"

FLAGS = [
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fopenmp-simd",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Werror",
]
GCC_TARGETS = {
    "v3": ["-march=x86-64-v3", "-mprefer-vector-width=256"],
    "v4base": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v4": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512"],
}
ZIG_TARGETS = {
    "v3": ["-mcpu=x86_64_v3", "-mprefer-vector-width=256"],
    "v4base": ["-mcpu=x86_64_v4", "-mprefer-vector-width=512"],
    "v4": ["-mcpu=x86_64_v4+avx512vnni+avx512bf16", "-mprefer-vector-width=512"],
}
NEEDS = {"v3": {"avx2", "fma"}, "v4base": {"avx512f", "avx512bw", "avx512vl"}}
NEEDS["v4"] = NEEDS["v4base"] | {"avx512_vnni", "avx512_bf16"}
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
SANITIZED = "TILEWRIGHT_TEST_SANITIZE"


@functools.cache
def processor_features() -> frozenset[str]:
    """The ``flags`` line of /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@dataclass(frozen=True)
class Hole:
    """What the code generator passes for a hole: ``row``, ``element`` inside the simd loop, ``finish`` after it."""

    row: str = ""
    element: str = ""
    finish: str = ""


class Kernel:
    """A compiled kernel function with the kernel ABI."""

    def __init__(self, path: Path, name: str):
        self.library = ctypes.CDLL(str(path))
        self.function = getattr(self.library, name)
        self.function.restype = None
        self.function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]

    def __call__(self, arrays: Sequence[np.ndarray], dims: Sequence[int], begin: int, end: int | None = None) -> int:
        """Do units [begin, end), or [0, begin) when ``end`` is left out; returns the fault word.

        Arrays are passed by address: they must be C-contiguous unless the kernel expects their strides.
        """
        if end is None:
            begin, end = 0, begin
        buffers = (ctypes.c_void_p * max(1, len(arrays)))(*(array.ctypes.data for array in arrays))
        sizes = (ctypes.c_int64 * max(1, len(dims)))(*dims)
        fault = ctypes.c_int32(0)
        self.function(buffers, sizes, begin, end, ctypes.byref(fault))
        return fault.value


class Native:
    """Renders, compiles (each distinct source once per session, whose workers share a folder) and loads."""

    Hole = Hole

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self.sanitize = bool(os.environ.get(SANITIZED))

    def render(self, template: str, **context: Any) -> str:
        """The template's text with its context filled in; an undefined name is an error."""
        return self.environment.get_template(template).render(**context)

    def build(
        self, source: str, name: str, target: str = "v3", compiler: str = "gcc", flags: Sequence[str] = ()
    ) -> Kernel:
        """Compile C text for a target ("v3", "v4base", "v4") with ``gcc`` or ``zig`` and load function ``name``."""
        if not NEEDS[target] <= processor_features():
            pytest.skip(f"this processor cannot run {target}")
        return Kernel(self.compile(source, target, compiler, flags), name)

    def compile(self, source: str, target: str = "v3", compiler: str = "gcc", flags: Sequence[str] = ()) -> Path:
        """Compile C text to a shared library; fails the test on any warning, showing the compiler's message."""
        # Kernels are exported here; in an artifact they are linked into one library and stay hidden.
        source = "#pragma GCC visibility push(default)\n" + source
        if compiler == "zig":
            specification = importlib.util.find_spec("ziglang")
            if specification is None or specification.origin is None:
                pytest.skip("ziglang is not installed")
            command = [str(Path(specification.origin).parent / "zig"), "cc", *FLAGS, *ZIG_TARGETS[target]]
        else:
            command = [compiler, *FLAGS, *GCC_TARGETS[target], *(SANITIZE if self.sanitize else ())]
        command += flags
        if needs_intrinsics(source, TEMPLATES):
            command += PRECOMPILED.options(command, "zig" if compiler == "zig" else "gcc", wanting=2)
        command += ["-shared", "-I", str(TEMPLATES)]
        key = hashlib.sha256("\0".join([source, *command]).encode()).hexdigest()[:20]
        library = self.folder / f"{key}.so"
        if not library.exists():
            text, made = (self.folder / f"{key}-{os.getpid()}.{kind}" for kind in ("c", "so"))
            text.write_text(source)
            command += [str(text), "-lm", "-o", str(made)]
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:6000]}\n{source}"
            made.replace(library)
        return library


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Renders, compiles and loads kernels; see the module docstring."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "native"
    folder.mkdir(exist_ok=True)
    return Native(folder)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """References are small: several threads would only wait for each other on a busy machine."""
    import torch

    torch.set_num_threads(1)


def aligned(shape: Sequence[int] | int, fill: float = np.nan) -> np.ndarray:
    """A float32 array on a 64-byte boundary, filled with ``fill`` so that elements never written show."""
    count = int(np.prod(shape))
    raw = np.empty(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + count * 4].view(np.float32).reshape(shape)
    array[...] = fill
    return array


@pytest.fixture(scope="session")
def new_array():
    """The function :func:`aligned`, for tests (test modules cannot import this file)."""
    return aligned

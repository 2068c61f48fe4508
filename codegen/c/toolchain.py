"""The C compiler: finding one, compiling kernels to objects in parallel and through the cache, linking them.

Compilation sees only text: a source is written under its own relative name into an empty directory and compiled there,
so the same source, flags and compiler give the same bytes anywhere. Everything takes and returns bytes; nothing is left
on disk but the cache.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...runtime.environment import CACHE, COMPILER
from ...runtime.errors import CompileError
from ..cache import Cache, key_of
from ..targets import GLIBC_FLOOR, CompilerKind, Target
from . import elf
from .precompiled import PRECOMPILED, needs_intrinsics

INCLUDE_DIRECTORY = Path(__file__).parents[1] / "templates" / "c"
"""Headers that kernels include."""

COMPILE_FLAGS = (
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",  # the arena holds one value after another in the same bytes
    "-fopenmp-simd",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-ident",
    "-g0",
    "-Werror=date-time",
    "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types",
)
LINK_FLAGS = ("-shared", "-O2", "-s", "-Wl,--build-id=none", "-Wl,-z,defs", "-Wl,-z,now")

HOW_TO_GET_ONE = (
    "install one with 'pip install ziglang' (needs no system packages), or the system's (Debian and Ubuntu: "
    f"'apt install gcc libc6-dev'), or name one in {COMPILER.name}"
)
_ERROR_LINES = 12
_SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libpthread|libdl|librt|ld-linux-x86-64)\.so\.\d+")


@dataclass(frozen=True)
class Compiler:
    """A C compiler that answered.

    Attributes:
        command: the start of its command line.
        kind: whose options it takes.
        version: first line of its ``--version``.
    """

    command: tuple[str, ...]
    kind: CompilerKind
    version: str


@dataclass(frozen=True)
class Source:
    """One C file: a name that is an identifier (shown in errors) and its text."""

    name: str
    text: str


def find_compiler() -> Compiler:
    """The compiler to use: the environment's, else the system's, else the ``ziglang`` package's.

    Raises:
        CompileError: the one the environment names does not work, or there is none; says how to get one.
    """
    if named := COMPILER.get():
        compiler = _probe(_zig_package() if named == "zig" else tuple(shlex.split(named)))
        if compiler is None:
            raise CompileError(f"{COMPILER.name}={named!r} is no C compiler that runs here; {HOW_TO_GET_ONE}")
        return compiler
    found = available_compilers()
    if not found:
        raise CompileError(
            f"no C compiler: cc, gcc and clang are not on PATH and ziglang is not installed; {HOW_TO_GET_ONE}"
        )
    return found[0]


def available_compilers() -> list[Compiler]:
    """Every compiler found, in order of preference, each once (``cc`` is mostly a link to one of the others)."""
    compilers: dict[str, Compiler] = {}
    for command in (("cc",), ("gcc",), ("clang",), _zig_package()):
        if compiler := _probe(command):
            compilers.setdefault(os.path.realpath(compiler.command[0]), compiler)
    return list(compilers.values())


def compile_objects(
    compiler: Compiler,
    sources: Sequence[Source],
    target: Target,
    *,
    cache: Cache | None = None,
    flags: Sequence[str] = (),
    include: Path = INCLUDE_DIRECTORY,
    progress: Callable[[str], None] | None = None,
) -> list[bytes]:
    """Compile sources for a target, as many at once as there are processors.

    Args:
        compiler: who compiles.
        sources: the files, with distinct names.
        target: what they are compiled for.
        cache: where finished objects are looked up and stored.
        flags: further flags, after :data:`COMPILE_FLAGS` and the target's.
        include: directory of headers.
        progress: called with the name of each source when its object is there (from this thread).

    Returns:
        The objects, in the order of ``sources``.

    Raises:
        CompileError: a source does not compile; names it and shows the compiler's first error.
    """
    flags = (*COMPILE_FLAGS, *target.flags(compiler.kind), *flags)
    headers = [part for path in sorted(include.glob("*.h")) for part in (path.name, path.read_bytes())]
    objects: dict[int, bytes] = {}
    missing: dict[int, str] = {}
    for index, source in enumerate(sources):
        key = key_of((compiler.version, *compiler.command, *flags, source.name, source.text, *headers))
        found = _cached(cache, key)
        if found is None:
            missing[index] = key
        else:
            objects[index] = found
            if progress:
                progress(source.name)
    if missing:
        wanting = sum(needs_intrinsics(sources[index].text, include) for index in missing)
        pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        try:
            jobs = {pool.submit(compile_object, compiler, sources[i], flags, include, wanting): i for i in missing}
            for job in as_completed(jobs):
                index = jobs[job]
                objects[index] = job.result()
                if progress:
                    progress(sources[index].name)
        finally:
            pool.shutdown(cancel_futures=True)
        _store(cache, {key: objects[index] for index, key in missing.items()})
    return [objects[index] for index in range(len(sources))]


def compile_object(
    compiler: Compiler, source: Source, flags: Sequence[str], include: Path = INCLUDE_DIRECTORY, wanting: int = 1
) -> bytes:
    """Compile one source with exactly these flags; returns the object file.

    Args:
        compiler: who compiles.
        source: the file.
        flags: all of them.
        include: directory of headers.
        wanting: how many of the sources that are compiled with these flags include the processor's intrinsics.

    Raises:
        CompileError: it does not compile; names it and shows the compiler's first error.
    """
    with _workplace() as folder:
        (folder / f"{source.name}.c").write_text(source.text)
        command = (*compiler.command, *flags)
        if needs_intrinsics(source.text, include):
            command += PRECOMPILED.options(command, compiler.kind, wanting)
        command += (*_system_bindings(compiler), "-I", str(include))
        prefixes = (f"-ffile-prefix-map={folder}=.", f"-ffile-prefix-map={include}=.")
        _run(
            (*command, *prefixes, "-c", f"{source.name}.c", "-o", "out.o"), folder, compiler, f"kernel {source.name!r}"
        )
        return (folder / "out.o").read_bytes()


def link_shared(compiler: Compiler, objects: Sequence[bytes], target: Target, flags: Sequence[str] = ()) -> bytes:
    """Link objects into one shared library that needs nothing but the C library.

    Args:
        compiler: the one that compiled them.
        objects: object files, in the order in which they lie in the library.
        target: what they were compiled for.
        flags: further flags.

    Raises:
        CompileError: a symbol is undefined, another library is needed, or a symbol of a C library newer than
            :data:`~tilewright.codegen.targets.GLIBC_FLOOR` is.
    """
    with _workplace() as folder:
        names = [f"{index:05d}.o" for index in range(len(objects))]
        for name, content in zip(names, objects, strict=True):
            (folder / name).write_bytes(content)
        (folder / "objects.txt").write_text("\n".join(names))
        # In glibc before 2.34 threads are a library of their own; newer systems keep an empty one for such programs.
        threads = "-lpthread" if compiler.kind == "zig" else "-l:libpthread.so.0"
        libraries = ("-Wl,--no-as-needed", threads, "-Wl,--as-needed", "-lm", "-static-libgcc")
        target_flags = target.flags(compiler.kind) if compiler.kind == "zig" else ()
        command = (*compiler.command, *LINK_FLAGS, *target_flags, "@objects.txt", *libraries, *flags, "-o", "out.so")
        _run(command, folder, compiler, "linking the kernels")
        library = (folder / "out.so").read_bytes()
    if not flags:
        check_portable(library)
    return library


def check_portable(library: bytes) -> None:
    """Check that a library needs only the C library, and no newer one than the floor.

    Raises:
        CompileError: it needs more; names what.
    """
    if foreign := [name for name in elf.needed_libraries(library) if not _SYSTEM_LIBRARIES.fullmatch(name)]:
        raise CompileError(f"the linked kernels need {', '.join(foreign)}; they may need nothing but the C library")
    newest = elf.newest_glibc(library)
    if newest > GLIBC_FLOOR:
        floor, got = (".".join(map(str, version)) for version in (GLIBC_FLOOR, newest))
        raise CompileError(
            f"the linked kernels bind to symbols of glibc {got}, but are promised to load on {floor}: "
            f"add the older version to tw_glibc.h, or compile with ziglang ({COMPILER.name}=zig)"
        )


def _cached(cache: Cache | None, key: str) -> bytes | None:
    try:
        return cache.get(key) if cache else None
    except OSError as error:
        warnings.warn(f"the kernel cache cannot be read ({error}); compiling instead", stacklevel=3)
        return None


def _store(cache: Cache | None, objects: dict[str, bytes]) -> None:
    """Store new objects. What was compiled is good even where the cache is not, so that is a warning."""
    if cache is None:
        return
    try:
        for key, content in objects.items():
            cache.put(key, content)
        cache.trim()
    except OSError as error:
        warnings.warn(
            f"the kernel cache cannot be written ({error}); kernels will be compiled again next time. "
            f"Name another directory in {CACHE.name}, or switch it off with {CACHE.name}=off",
            stacklevel=3,
        )


def _zig_package() -> tuple[str, ...]:
    specification = importlib.util.find_spec("ziglang")
    if specification is None or specification.origin is None:
        return ()
    return (str(Path(specification.origin).parent / "zig"), "cc")


def _probe(command: tuple[str, ...]) -> Compiler | None:
    """The compiler behind a command; None where it is absent or does not answer."""
    program = shutil.which(command[0]) if command else None
    return _identify((program, *command[1:])) if program else None


@functools.cache
def _identify(command: tuple[str, ...]) -> Compiler | None:
    program = command[0]
    try:
        answer = subprocess.run((*command, "--version"), capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    version = answer.stdout.partition("\n")[0]
    if Path(program).stem == "zig":
        release = subprocess.run((program, "version"), capture_output=True, text=True, timeout=60, check=True)
        return Compiler(command, "zig", f"zig {release.stdout.strip()} ({version})")
    return Compiler(command, "clang" if "clang" in answer.stdout.lower() else "gcc", version)


def _system_bindings(compiler: Compiler) -> tuple[str, ...]:
    """Old symbol versions for the system's C library; zig links against a description of the floor itself."""
    return () if compiler.kind == "zig" else ("-include", str(INCLUDE_DIRECTORY / "tw_glibc.h"))


@contextmanager
def _workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        yield Path(folder).resolve()


def _run(command: Sequence[str], folder: Path, compiler: Compiler, what: str) -> None:
    environment = {**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    first = next((index for index, line in enumerate(lines) if re.search(r"\b(error|undefined)\b", line)), 0)
    shown = "\n".join(f"  {line}" for line in lines[first : first + _ERROR_LINES])
    status = f"exit status {done.returncode}" if done.returncode > 0 else f"killed by signal {-done.returncode}"
    raise CompileError(f"{what}: {compiler.version} failed ({status}):\n{shown}")

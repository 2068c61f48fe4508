"""What ``tilewright doctor`` examines. Imports no PyTorch: versions are read from the packages' metadata."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...codegen import targets
from ...codegen.c.toolchain import (
    HOW_TO_GET_ONE,
    Compiler,
    Source,
    available_compilers,
    compile_objects,
    find_compiler,
    link_shared,
)
from ...codegen.cache import user_cache
from ...runtime import cpu
from ...runtime.cuda.driver import open_driver
from ...runtime.cuda.probe import gpus_present
from ...runtime.environment import CACHE, VARIABLES
from ...runtime.errors import TilewrightError
from ...runtime.threads import cpu_quota, default_threads

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*([^;]*)(?:;(.*))?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")
_BOUND = re.compile(r"(>=|<=|==|!=|<|>)\s*([\d.]+)")
_SHOWN_EXTRAS = {"": "running", "compile": "compiling", "cuda": "running on GPUs", "text": "tokenizing"}
_PROBE = Source(
    "doctor_probe",
    "#include <math.h>\n#include <stdint.h>\n"
    '__attribute__((visibility("default"))) int32_t doctor_probe(int32_t x) { return (int32_t)sqrt((double)x) + 1; }\n',
)


@dataclass(frozen=True)
class Finding:
    """A problem and its remedy; a serious one means that artifacts cannot run here."""

    what: str
    remedy: str
    serious: bool = False


def examine(build: bool = False) -> dict[str, Any]:
    """Everything that doctor shows, as JSON data.

    Args:
        build: also compile and load a small library with each compiler.
    """
    library = " ".join(platform.libc_ver()).strip() or "C library unknown"
    return {
        "tilewright": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {library}",
        "packages": list(_packages()),
        "targets": _targets(),
        "gpus": _gpus(),
        **_compilers(build),
        "threads": {
            "default": default_threads(), "processors": os.cpu_count(), "allowed": len(os.sched_getaffinity(0)),
            "quota": cpu_quota(),
        },
        "cache": _cache(),
        "environment": [{**vars(variable), "value": variable.get()} for variable in VARIABLES],
    }  # fmt: skip


def problems_of(found: dict[str, Any]) -> list[Finding]:
    """What is wrong, the serious things first."""
    problems = []
    if not any(target["fits"] for target in found["targets"]):
        weakest = found["targets"][0]
        problems.append(
            Finding(
                f"no target fits this processor: {weakest['name']} needs {' '.join(weakest['missing'])}",
                "artifacts cannot run here; use a machine with these instructions",
                serious=True,
            )
        )
    for package in found["packages"]:
        running = package["for"] == _SHOWN_EXTRAS[""]
        extra = next((name for name, use in _SHOWN_EXTRAS.items() if use == package["for"]), "")
        remedy = "pip install tilewright" if running else f"pip install 'tilewright[{extra}]'"
        if package["version"] is None:
            problems.append(Finding(f"{package['name']} is not installed ({package['for']} needs it)", remedy, running))
        elif not package["fits"]:
            what = f"{package['name']} {package['version']} is outside of {package['needs']}"
            problems.append(Finding(what, f"pip install '{package['name']}{package['needs']}'"))
    for gpu in found["gpus"]["devices"]:
        if gpu["target"] is None:
            what = f"{gpu['device']} ({gpu['name']}) has compute capability {gpu['capability']}, and no target fits it"
            problems.append(Finding(what, "artifacts with PTX (compile --ptx) may run on it"))
    if found["compiler_error"] is not None:
        problems.append(Finding(found["compiler_error"], f"only compiling needs one: {HOW_TO_GET_ONE}"))
    for index, compiler in enumerate(found["compilers"]):
        if compiler.get("build", "ok") != "ok":
            used = index == 0
            problems.append(Finding(f"{compiler['version']}: {compiler['build']}", HOW_TO_GET_ONE, serious=used))
    if found["cache"]["error"] is not None:
        remedy = f"name a directory that can be written in {CACHE.name}, or 'off'"
        problems.append(Finding(found["cache"]["error"], remedy))
    return sorted(problems, key=lambda item: not item.serious)


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version such as ``2.13.0+cpu`` is inside of bounds such as ``>=2.11,<2.16``."""
    have = _numbers(version)
    for operator, bound in _BOUND.findall(bounds):
        want = _numbers(bound)
        length = max(len(have), len(want))
        a, b = (numbers + (0,) * (length - len(numbers)) for numbers in (have, want))
        holds = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}[operator]
        if not holds:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*", version.partition("+")[0])[0].split(".") if part)  # type: ignore[index]


def _packages() -> Iterator[dict[str, Any]]:
    """What this distribution requires, by its own metadata, and what is there."""
    for text in importlib.metadata.requires("tilewright") or ():
        match = _REQUIREMENT.match(text)
        extra = _EXTRA.search(text)
        use = _SHOWN_EXTRAS.get(extra[1] if extra else "")
        if match is None or use is None:
            continue
        name, needs = match[1], match[2].strip(" ()")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and satisfies(version, needs)
        yield {"name": name, "version": version, "needs": needs, "for": use, "fits": fits}


def _targets() -> list[dict[str, Any]]:
    present = cpu.features()
    fitting = [target for target in targets.known() if present.issuperset(target.features)]
    best = targets.best(present).name if fitting else None
    return [
        {
            "name": target.name, "fits": target in fitting, "chosen": target.name == best,
            "missing": sorted(set(target.features) - present),
        }
        for target in targets.known()
    ]  # fmt: skip


def _gpus() -> dict[str, Any]:
    """The driver's version, the GPUs and their targets; or why there are none."""
    found: dict[str, Any] = {"driver": None, "error": None, "devices": []}
    try:
        version = open_driver()("cuDriverGetVersion")
        found["driver"] = f"{version // 1000}.{version % 1000 // 10}"
        present = gpus_present()
    except TilewrightError as error:
        present = []
        found["error"] = str(error)
    for number, gpu in enumerate(present):
        fitting = [target for target in targets.known_gpus() if target.architecture.runs_binary(gpu.major, gpu.minor)]
        found["devices"].append(
            {
                "device": f"cuda:{number}", "name": gpu.name, "capability": gpu.capability, "memory": gpu.memory,
                "target": fitting[-1].name if fitting else None,
            }
        )  # fmt: skip
    return found | {"targets": [target.name for target in targets.known_gpus()]}


def _compilers(build: bool) -> dict[str, Any]:
    found = {compiler.command: compiler for compiler in available_compilers()}
    problem = None
    try:
        used = find_compiler()
        found = {used.command: used} | found
    except TilewrightError as error:
        problem = str(error)
    described = []
    for compiler in found.values():
        item = {"kind": compiler.kind, "version": compiler.version, "command": " ".join(compiler.command)}
        described.append(item | {"build": _build(compiler)} if build else item)
    return {"compilers": described, "compiler_error": problem}


def _build(compiler: Compiler) -> str:
    """``ok``, or what went wrong when a small library was compiled, linked, loaded and called."""
    present = cpu.features()
    fitting = [target for target in targets.known() if present.issuperset(target.features)]
    target = fitting[-1] if fitting else targets.known()[0]
    try:
        library = link_shared(compiler, compile_objects(compiler, [_PROBE], target), target)
        if not fitting:
            return "ok"
        with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
            path = Path(folder) / "probe.so"
            path.write_bytes(library)
            answer = ctypes.CDLL(str(path)).doctor_probe(49)
    except (TilewrightError, OSError) as error:
        return str(error).replace("\n", " ")
    return "ok" if answer == 8 else f"the compiled code is wrong: {answer} instead of 8"


def _cache() -> dict[str, Any]:
    nothing: dict[str, Any] = {"directory": None, "entries": 0, "bytes": 0, "limit": 0, "error": None}
    try:
        cache = user_cache()
    except TilewrightError as error:
        return nothing | {"error": str(error)}
    if cache is None:
        return nothing
    sizes = []
    for path in cache.directory.glob("??/*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # trimmed meanwhile by another process
            continue
    existing = next(folder for folder in (cache.directory, *cache.directory.parents) if folder.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    return {
        "directory": str(cache.directory), "entries": len(sizes), "bytes": sum(sizes), "limit": cache.limit,
        "error": None if writable else f"the kernel cache {cache.directory} cannot be written",
    }  # fmt: skip

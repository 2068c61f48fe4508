"""A process that compiles Triton kernels to cubins: one JSON request per line in, one JSON answer per line out.

The script runs by path, on its own: it imports Triton and nothing of ours, above all no torch. Sources get fixed names
in place of files, so that nothing of what is compiled depends on where or when. No GPU driver is asked.

The first line in is ``{"path": folder of Triton, "headers": {module: text}, "folder": what to remove in the end}``,
answered by ``{"triton": version}``. A request has ``name``, ``text``, ``signature`` (types of the leading arguments),
``constants`` (names and values of the others), ``warps``, ``stages`` and ``capability``. Its answer holds ``cubin``
(base64), ``ptx``, ``log`` (of ptxas) and ``metadata``, or ``error`` and ``stage`` (``"source"``, ``"triton"`` or
``"ptxas"``).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import linecache
import os
import re
import shutil
import sys
import traceback
import types
from typing import Any

METADATA = (
    "name",
    "shared",
    "num_warps",
    "num_ctas",
    "tmem_size",
    "global_scratch_size",
    "global_scratch_align",
    "profile_scratch_size",
    "profile_scratch_align",
)
REGISTERS = 65536  # of a multiprocessor, on every architecture there is
MOST_REGISTERS = 255  # of a thread
FOLDER = "kernels/triton"  # of the sources in an artifact, and in messages

_loaded: dict[str, tuple[str, types.ModuleType]] = {}


def load(name: str, text: str) -> types.ModuleType:
    """A module from its text, under a name that is the same everywhere; loaded again only when the text is another."""
    known = _loaded.get(name)
    if known is not None and known[0] == text:
        return known[1]
    path = f"{FOLDER}/{name}.py"
    # Triton reads a function's source through inspect, and that through this cache.
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    exec(compile(text, path, "exec"), module.__dict__)
    _loaded[name] = (text, module)
    return module


def compile_kernel(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; see the module's docstring."""
    stage = "source"
    try:
        kernel = getattr(load(request["name"], request["text"]), request["name"])
        problem = _argument_problem(kernel.arg_names, request["signature"], request["constants"])
        if problem:
            return {"error": problem, "stage": stage}
        stage = "triton"
        compiled, log = _compile_logged(kernel, request)
        if _spills(log):
            # ptxas spills a little where more programs then fit on a multiprocessor, unless it is told a limit.
            limit = min(MOST_REGISTERS, REGISTERS // (32 * request["warps"]))
            other, other_log = _compile_logged(kernel, request, maxnreg=limit)
            if not _spills(other_log):
                compiled, log = other, other_log
    except Exception as error:
        if type(error).__name__ == "PTXASError":
            return {"error": str(error).partition("Repro command:")[0].strip(), "stage": "ptxas"}
        return {"error": _describe(error), "stage": stage}
    return {
        "cubin": base64.b64encode(compiled.asm["cubin"]).decode(),
        "ptx": compiled.asm["ptx"],
        "log": log,
        "metadata": {name: getattr(compiled.metadata, name) for name in METADATA},
    }


def _argument_problem(names: list[str], signature: list[str], constants: dict[str, int]) -> str:
    """What is wrong with the arguments of a kernel, empty when they are those that it will be called with."""
    if names[len(signature) :] == list(constants):
        return ""
    return (
        f"takes the arguments ({', '.join(names)}); expected are {len(signature)} operands and sizes, "
        f"then the constants ({', '.join(constants)})"
    )


def _compile_logged(kernel: Any, request: dict[str, Any], **options: int) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas said, which Triton prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        compiled = _compile(kernel, request, options)
    return compiled, output.getvalue()


def _spills(log: str) -> bool:
    return re.search(r"[1-9]\d* bytes spill", log) is not None


def _compile(kernel: Any, request: dict[str, Any], more: dict[str, int]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, signature, constants = kernel.arg_names, request["signature"], request["constants"]
    types_of = dict(zip(names, [*signature, *["constexpr"] * len(constants)], strict=True))
    values = {(len(signature) + place,): value for place, value in enumerate(constants.values())}
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_name in enumerate(signature) if type_name.startswith("*")}
    options = {
        "num_warps": request["warps"],
        "num_stages": request["stages"],
        "enable_fp_fusion": True,  # its default differs between versions
        **more,
    }
    source = ASTSource(kernel, types_of, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", request["capability"], 32), options=options)


def _describe(error: BaseException) -> str:
    """The messages of an error and of its causes, outermost first; Triton's show the source line."""
    parts = []
    current: BaseException | None = error
    while current is not None:
        text = "".join(traceback.format_exception_only(current)).strip()
        parts.append(text.removeprefix("triton.compiler.errors."))
        current = current.__cause__
    return "\n".join(dict.fromkeys(parts))


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Triton or LLVM print does not get between the answers

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    start = json.loads(sys.stdin.readline())
    if start["path"] not in sys.path:
        sys.path.insert(0, start["path"])
    import triton

    for name, text in start["headers"].items():
        load(name, text)
    answer({"triton": triton.__version__})
    for line in sys.stdin:
        answer(compile_kernel(json.loads(line)))
        # Triton keeps every stage of every kernel; our own cache keeps the results.
        shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
    shutil.rmtree(start["folder"], ignore_errors=True)  # who started this process is gone


if __name__ == "__main__":
    main()

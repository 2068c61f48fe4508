"""The C backend: entry files, compilation for each target, and the binaries that an artifact holds.

One C function per entry point runs the kernels in order: offsets of the scratch buffers, operands, sizes and units are
computed from the call's symbols in C, so that a call interprets nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.plan import Plan, Ref, Variant
from ..artifact import TargetBinaries
from ..cache import Cache
from ..kernel_table import KernelSource
from ..targets import Target
from .description import description, size_text, symbol_lines, text
from .toolchain import INCLUDE_DIRECTORY, Compiler, Source, compile_objects, link_shared

STEPS_PER_FUNCTION = 64  # compilers take more than linear time over one function


@dataclass(frozen=True)
class Weights:
    """Identity and size of the weight file, compiled in."""

    id: str
    size: int


def build(
    plans: Sequence[Plan],
    kernels: Sequence[KernelSource],
    weights: Weights,
    targets: Sequence[Target],
    compiler: Compiler,
    cache: Cache | None,
    progress: Callable[[str], None] | None = None,
) -> list[TargetBinaries]:
    """Compile everything for every target; one shared library each, with the sources beside it.

    ``progress`` is called with ``"3 of 12: name"`` when a source is compiled.
    """
    shared = [Source(kernel.name, kernel.text) for kernel in kernels]
    shared += [Source(f"entry_{plan.entry}", entry_source(plan)) for plan in plans]
    shared.append(Source("tw_runtime", (INCLUDE_DIRECTORY / "tw_runtime.c").read_text()))
    finished = itertools.count(1)

    def report(name: str) -> None:
        if progress:
            progress(f"{next(finished)} of {(len(shared) + 1) * len(targets)}: {name}")

    binaries = []
    for target in targets:
        sources = [*shared, Source("weights", weights_source(weights, target))]
        objects = compile_objects(compiler, sources, target, cache=cache, progress=report)
        library = link_shared(compiler, objects, target)
        files = {f"{source.name}.c": source.text.encode() for source in sources}
        files |= {header.name: header.read_bytes() for header in sorted(INCLUDE_DIRECTORY.glob("*.h"))}
        files["flags.txt"] = (" ".join(target.flags(compiler.kind)) + f"\n{compiler.version}\n").encode()
        files["model.so"] = library
        binaries.append(TargetBinaries(target.name, target.features, files))
    return binaries


def weights_source(weights: Weights, target: Target) -> str:
    """The file that says what a library belongs to: its weights, and the processors that have its features."""
    return (
        '#include "tw_entry.h"\n\n'
        f'TW_API const char tw_weights_id[65] = "{weights.id}";\n'
        f"TW_API const int64_t tw_weights_size = {weights.size};\n"
        f"TW_API const char tw_features[] = {text(' '.join(target.features))};\n"
    )


def entry_source(plan: Plan) -> str:
    """The C file of one entry point."""
    names = sorted({variant.kernel for step in plan.steps for variant in step.variants})
    groups = [plan.steps[start : start + STEPS_PER_FUNCTION] for start in range(0, len(plan.steps), STEPS_PER_FUNCTION)]
    lines = ['#include "tw_entry.h"', '#include "tw_math.h"', ""]
    lines += [
        f"void {name}(void *const *restrict, const int64_t *restrict, int64_t, int64_t, int32_t *restrict);"
        for name in names
    ]
    lines += ["", *_arena_function(plan), ""]
    for number in range(len(groups)):
        first = number * STEPS_PER_FUNCTION
        lines += _steps_function(plan, number, first, first + len(groups[number]))
        lines.append("")
    lines += [f"TW_API int32_t tw_run_{plan.entry}(tw_call *call);", ""]
    lines += [f"TW_API int32_t tw_run_{plan.entry}(tw_call *call) {{"]
    lines += [
        f"    int64_t offsets[{max(len(plan.buffers), 1)}];",
        f"    tw_arena_{plan.entry}(call->symbols, offsets);",
    ]
    lines += [f"    tw_steps_{number}(call, offsets);" for number in range(len(groups))]
    lines += ["    return call->fault;", "}", "", *description(plan), ""]
    return "\n".join(lines)


def _arena_function(plan: Plan) -> list[str]:
    """Offsets by stacking every buffer on those below it."""
    head = f"TW_API int64_t tw_arena_{plan.entry}(const int64_t *symbols, int64_t *offsets)"
    lines = [f"{head};", f"{head} {{", *symbol_lines(plan, "symbols"), "    (void)symbols;", "    int64_t size = 0;"]
    placed: set[int] = set()
    order: list[int] = []
    waiting = list(range(len(plan.buffers)))
    while waiting:
        ready = [index for index in waiting if all(other in placed for other in plan.buffers[index].below)]
        order += ready
        placed.update(ready)
        waiting = [index for index in waiting if index not in placed]
    for index in order:
        buffer = plan.buffers[index]
        ends = [f"end{other}" for other in buffer.below]
        start = "0"
        for end in ends:
            start = end if start == "0" else f"tw_max_i64({start}, {end})"
        lines.append(f"    const int64_t at{index} = {start}; /* {buffer.name} */")
        lines.append(f"    const int64_t end{index} = at{index} + ({size_text(buffer.bytes)} + 63) / 64 * 64;")
        lines.append(f"    size = tw_max_i64(size, end{index});")
    if order:
        lines.append("    if (offsets) {")
        lines += [f"        offsets[{index}] = at{index};" for index in range(len(plan.buffers))]
        lines.append("    }")
    else:
        lines.append("    (void)offsets;")
    return [*lines, "    return size;", "}"]


def _steps_function(plan: Plan, number: int, first: int, last: int) -> list[str]:
    lines = [f"static void tw_steps_{number}(tw_call *call, const int64_t *offsets) {{"]
    lines += [*symbol_lines(plan, "call->symbols"), "    (void)offsets;"]
    for index in range(first, last):
        step = plan.steps[index]
        where = step.origin.module or " ".join(step.origin.nodes)
        lines.append(f"    /* {index}: {where.replace('*/', '')} {step.origin.source} */".rstrip())
        for position, variant in enumerate(step.variants):
            guarded = len(step.variants) > 1 and position < len(step.variants) - 1
            head = f"if ({size_text(variant.guard)}) " if guarded else ""
            lines.append(f"    {'else ' if position else ''}{head}{{")
            lines += [f"        {line}" for line in _launch(plan, index, position, variant)]
            lines.append("    }")
    return [*lines, "}"]


def _launch(plan: Plan, step: int, position: int, variant: Variant) -> list[str]:
    operands = ", ".join(_operand(plan, ref) for ref in variant.operands)
    dims = ", ".join(size_text(size) for size in variant.sizes) or "0"
    units, work = size_text(variant.units), size_text(sizes.add(variant.flops, variant.bytes))
    return [
        f"void *const buf[] = {{{operands}}};",
        f"const int64_t dim[] = {{{dims}}};",
        f"tw_step(call, {step}, {position}, {variant.kernel}, buf, dim, {units}, {work});",
    ]


def _operand(plan: Plan, ref: Ref) -> str:
    if ref.kind == "constant":
        return f"(void *)(call->weights + {plan.constants[ref.index].offset})"
    if ref.kind == "buffer":
        return f"call->arena + offsets[{ref.index}]"
    return f"call->{ref.kind}s[{ref.index}]" if ref.kind != "input" else f"(void *)call->inputs[{ref.index}]"

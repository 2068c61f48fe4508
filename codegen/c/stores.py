"""The loop over a kernel's vector axis that computes and stores its results.

Bfloat16 results that lie contiguous are computed as float32, a run at a time, then converted whole vectors at a time:
compilers do not use the instructions for it, and mix vectors of 16 and of 32 bits badly.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...runtime import sizes
from ...runtime.sizes import Size
from ..expr import Expr, coefficient
from ..iteration import Axis
from ..regions import Output
from .emit import SIMD, Scope, count_loop

RUN = 256  # elements that are computed before they are converted
Stored = tuple[Output, Expr, Size]
"""A result, its element, and where that is stored."""


def store_elements(scope: Scope, vector: Axis, count: str, stored: Sequence[Stored]) -> None:
    """Append the loop over the first ``count`` (C text) elements of the vector axis to a scope."""
    variable = vector.variable
    narrow = [item for item in stored if _is_narrow(item, variable)]
    if not narrow:
        element = scope.child(variable)
        for output, root, place in stored:
            element.store(output.parameter.name, place, root)
        scope.close(element, count_loop(variable, count), simd=simd(element))
        return
    most = sizes.bounds(vector.extent, scope.emitter.ranges)[1]
    if most <= RUN:
        _run(scope, variable, most, "0", count, stored)
        return
    run = scope.child()
    run.lines.append(f"const int64_t run_end = tw_min_i64(run + {RUN}, {count});")
    _run(run, variable, RUN, "run", "run_end", stored)
    scope.close(run, f"for (int64_t run = 0; run < {count}; run += {RUN})")


def _run(scope: Scope, variable: str, most: int, first: str, end: str, stored: Sequence[Stored]) -> None:
    """Elements ``first`` to ``end``, at most ``most``, then the conversions of what was computed."""
    start: Size = int(first) if first.isdecimal() else first
    element = scope.child(variable)
    after = []
    for item in stored:
        output, root, place = item
        name = output.parameter.name
        if not _is_narrow(item, variable):
            element.store(name, place, root)
            continue
        row = f"narrow_{name}"
        scope.lines.append(f"float {row}[{most}] __attribute__((aligned(64)));")
        element.assign(f"{row}[{variable} - {first}]" if start else f"{row}[{variable}]", root)
        count, at = f"{end} - {first}" if start else end, scope.size(sizes.substitute(place, {variable: start}))
        after.append(f"tw_store_bf16({name} + {at}, {row}, {count});")
    head = f"for (int64_t {variable} = {first}; {variable} < {end}; {variable}++)"
    scope.close(element, head, simd=simd(element))
    scope.lines.extend(after)


def _is_narrow(stored: Stored, variable: str) -> bool:
    output, _, place = stored
    return output.parameter.dtype == "bfloat16" and coefficient(place, variable) == 1


def simd(scope: Scope) -> str:
    """The vector pragma, unless the loop holds a run-time index check (a fault is an atomic store)."""
    return "" if any(check in line for line in scope.lines for check in ("tw_index(", "tw_row_index(")) else SIMD

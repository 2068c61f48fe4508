"""The frame around a kernel's body: how buffers and sizes get from the call into named variables."""

from __future__ import annotations

from collections.abc import Sequence

from ..kernel import NAME, Parameter
from . import dialect


def prelude(parameters: Sequence[Parameter], symbols: Sequence[str]) -> list[str]:
    """Declarations that unpack ``buf[]`` and ``dim[]`` into named pointers and sizes."""
    lines = []
    for position, parameter in enumerate(parameters):
        const = "" if parameter.written else "const "
        kind = dialect.STORAGE[parameter.dtype]
        lines.append(f"{const}{kind} *restrict {parameter.name} = buf[{position}];")
    lines.extend(f"const int64_t {name} = dim[{position}];" for position, name in enumerate(symbols))
    return lines


def frame(body: Sequence[str], parameters: Sequence[Parameter], symbols: Sequence[str]) -> str:
    """The whole source file of a kernel that needs no template."""
    narrow = any(parameter.written and parameter.dtype == "bfloat16" for parameter in parameters)
    lines = [
        '#include "tw_math.h"',
        *(['#include "tw_narrow.h"'] if narrow else []),
        *(['#include "tw_sums.h"'] if any("tw_sums " in line for line in body) else []),
        "",
        f"void {NAME}(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,",
        "    int32_t *restrict fault) {",
        *(f"    {line}" for line in prelude(parameters, symbols)),
        "    (void)dim;",
        "    (void)fault;",
        *(f"    {line}" for line in body),
        "}",
        "",
    ]
    return "\n".join(lines)

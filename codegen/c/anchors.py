"""Filling the holes of C templates: an anchor's operands, epilogue and stores as statements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.sizes import Size
from .. import anchors
from ..expr import Expr, coefficient
from ..kernel import NAME, KernelCode
from ..templating import Hole, render
from ..values import Value
from . import dialect
from .emit import Emitter, Scope
from .frame import prelude


@dataclass(frozen=True)
class Narrow:
    """A run of elements along a vector loop: where it starts, how many there are (C) and at most (a number)."""

    first: Size
    count: str
    most: int


class Anchored(anchors.Anchored):
    """A region around one anchor whose kernel is a C template."""

    def epilogue(
        self,
        index: tuple[Size, ...],
        outer: Sequence[str],
        inner: str,
        acc: Callable[[Expr], Expr],
        dtype: str = "float32",
        narrow: Narrow | None = None,
    ) -> Hole:
        """The stores of the results, given the accumulator at a logical index of the anchor's result.

        Args:
            index: in terms of the template's variables.
            outer: the template's variables outside the vector loop.
            inner: the vector loop's variable.
            acc: from the raw accumulator to the anchor's value (adds the bias).
            dtype: of the accumulator and the anchor's value.
            narrow: the run of elements after which the template has the hole's ``finish``: bfloat16 results that lie
                contiguous are then converted there, whole vectors at a time (compilers do not vectorise that well).
        """
        outside, inside = self.scopes(outer, inner)
        finish = []
        for parameter, offset, root in self.stores(index, acc, dtype):
            if narrow is None or parameter.dtype != "bfloat16" or coefficient(offset, inner) != 1:
                inside.store(parameter.name, offset, root)
                continue
            row, start = f"tw_narrow_{parameter.name}", sizes.substitute(offset, {inner: narrow.first})
            outside.lines.append(f"float {row}[{narrow.most}] TW_ALIGNED;")
            inside.assign(f"{row}[{dialect.size(sizes.add(inner, sizes.mul(-1, narrow.first)))}]", root)
            finish.append(f"tw_store_bf16({parameter.name} + {dialect.size(start)}, {row}, {narrow.count});")
        return Hole("\n".join(outside.lines), "\n".join(inside.lines), "\n".join(finish))

    def read(
        self,
        value: Value,
        index: tuple[Size, ...],
        outer: Sequence[str],
        inner: str,
        name: str,
        dtype: str = "float32",
    ) -> Hole:
        """A hole that defines ``<name>`` as one element of an operand, converted to ``dtype``."""
        outside, inside = self.scopes(outer, inner)
        text = inside.value(self.kernel.builder.cast(value.at(index), dtype))
        inside.lines.append(f"const {dialect.TYPES[dtype]} {name} = {text};")
        return Hole("\n".join(outside.lines), "\n".join(inside.lines))

    def scopes(self, outer: Sequence[str], inner: str) -> tuple[Scope, Scope]:
        """Fresh scopes for one hole: its row part and its element part."""
        outside = Scope(Emitter(self.kernel.builder, self.storage_dtypes()), None, outer)
        return outside, outside.child(inner, "acc")

    def code(
        self, template: str, *, family: str, units: Size, flops: Size, bytes: Size | None = None, **context: object
    ) -> KernelCode:
        """Render the template into a kernel; ``bytes`` moved are those of all parameters unless they are given."""
        symbols = self.symbols(units, flops, *(() if bytes is None else (bytes,)))
        lines = "\n".join([*prelude(self.frame.parameters, symbols), *(f"(void){name};" for name in symbols)])
        headers = ["tw_math.h"]
        if any(parameter.dtype == "bfloat16" for parameter in self.frame.results()):
            headers.append("tw_narrow.h")
        source = "".join(f'#include "{header}"\n' for header in headers)
        source += render(template, name=NAME, prelude=lines, **context)
        return KernelCode(
            family=family,
            label=self.task.label(),
            source=source,
            symbols=symbols,
            units=units,
            flops=flops,
            bytes=sizes.add(*(item.bytes() for item in self.frame.parameters)) if bytes is None else bytes,
            parameters=self.frame.parameters,
        )


def c_size(size: Size) -> int | str:
    """A size for a template: an int, or C text in parentheses."""
    return size if isinstance(size, int) else f"({dialect.size(size)})"

"""Filling the holes of Triton templates: an anchor's operands, epilogue and stores as statements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...runtime.plan import Tile
from ...runtime.sizes import Size
from .. import anchors
from ..expr import Expr
from ..regions import Made
from ..templating import render_triton
from ..values import Value
from .emit import Scope, Var
from .frame import FAULT, Arguments, Extra, index_type, kernel_code


class Anchored(anchors.Anchored):
    """A region around one anchor whose kernel is a Triton template.

    Holes are filled first, then :meth:`made` renders the template: whether a hole needs the fault word is known then.
    """

    _holes = 0
    _faults = False

    def scope(
        self, variables: Mapping[str, Var], scalars: Mapping[str, tuple[str, tuple[str, ...]]] | None = None
    ) -> Scope:
        """A scope for one hole, with names of its own. Give it to :meth:`text` when its statements are there."""
        self._holes += 1
        wide = index_type(self.frame.parameters, self.task.symbols.ranges) == "i64"
        prefix = f"t{self._holes}_"
        return Scope(self.kernel, variables, self.storage_dtypes(), scalars=scalars, prefix=prefix, wide=wide)

    def text(self, scope: Scope) -> str:
        """The statements of a finished scope."""
        self._faults = self._faults or scope.uses_fault
        return "\n".join(scope.lines)

    def needs_fault(self) -> None:
        """Say that the template itself stores to the fault word."""
        self._faults = True

    def read(self, value: Value, index: tuple[Size, ...], variables: Mapping[str, Var], name: str, dtype: str) -> str:
        """A hole that assigns one block of an operand to a name.

        Args:
            value: the operand.
            index: in terms of the template's variables.
            variables: how they read in this hole.
            name: to assign to.
            dtype: what the block is made, such as ``"bfloat16"`` for an operand of a product.
        """
        scope = self.scope(variables)
        text = scope.raw(self.kernel.builder.cast(value.at(index), value.compute), dtype)
        scope.lines.append(f"{name} = {text}")
        return self.text(scope)

    def epilogue(
        self,
        index: tuple[Size, ...],
        variables: Mapping[str, Var],
        acc: Callable[[Expr], Expr],
        shape: tuple[str, ...],
        *,
        name: str = "acc",
        also: str = "",
    ) -> str:
        """A hole that stores the results, given a block of float32 accumulators.

        Args:
            index: of the anchor's result, in terms of the template's variables.
            variables: how they read in this hole; all of them that are blocks are stored over.
            acc: from the raw accumulator to the anchor's value (adds the bias).
            shape: of the block of accumulators.
            name: of the block of accumulators.
            also: one more mask.
        """
        scope = self.scope(variables, {"acc": (name, shape)})
        for parameter, offset, root in self.stores(index, acc):
            scope.store(parameter.name, offset, root, also=also)
        return self.text(scope)

    def made(
        self,
        template: str,
        *,
        family: str,
        units: Size,
        flops: Size,
        tiles: Sequence[Tile],
        extras: Sequence[Extra] = (),
        sizes_used: Sequence[Size] = (),
        guard: Size = 1,
        **context: object,
    ) -> Made:
        """Render the template into a kernel.

        The template is the kernel's body; ``INDEX`` is the type of its index arithmetic, ``"tl.int32"`` or
        ``"tl.int64"``. Its text is indented by the template itself (``| indent`` for holes).

        Args:
            template: file name.
            family: the kernel family.
            units: programs of the grid; may name constants of the tiles.
            flops: arithmetic operations.
            tiles: the binaries to build, the default one first.
            extras: operands besides what is read and the results; the fault word is added where a hole needs it.
            sizes_used: sizes in the context whose symbols become arguments.
            guard: sizes at which this kernel may run.
            context: the template's holes and numbers.
        """
        if self._faults:
            extras = (*extras, Extra("fault", FAULT))
        ranges = self.task.symbols.ranges
        index = index_type(self.frame.parameters, ranges, *sizes_used)
        symbols = tuple(name for name in self.symbols(flops, *sizes_used) if name in ranges)
        arguments = Arguments(self.frame.parameters, tuple(extras), symbols, index)
        body = render_triton(template, INDEX="tl.int32" if index == "i32" else "tl.int64", **context)
        code = kernel_code(
            body, arguments, family=family, label=self.task.label(), units=units, flops=flops, tiles=tiles
        )
        return Made(code, arguments.storages(self.frame.storages), guard)

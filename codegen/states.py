"""The states of an entry point: how they take their new values, and what they begin as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ..runtime import sizes
from ..runtime.plan import StateBuffer
from ..runtime.plan_check import ITEM_BYTES
from ..runtime.sizes import Size
from .storage import ConstantTable, Recipe, Storage


def updates(values: Mapping[Storage, tuple[fx.Node, Storage]]) -> Iterator[tuple[fx.Node, Storage, Storage]]:
    """The copies that give states their new values, in an order in which none overwrites what another still reads.

    Args:
        values: state -> its new value, and where that lies; it may be another state.

    Yields:
        (value, from, into) of one copy. Where states exchange their values, one is put aside first.
    """
    pending = {state: (node, source) for state, (node, source) in values.items() if source is not state}
    while pending:
        read = [source for _, source in pending.values()]
        target = next((state for state in pending if state not in read), None)
        if target is None:
            target = next(iter(pending))
            node = next(node for node, source in pending.values() if source is target)
            aside = Storage("buffer", target.shape, target.dtype, name=f"{target.name}_before")
            yield node, target, aside
            pending = {
                state: (node, aside if source is target else source) for state, (node, source) in pending.items()
            }
        node, source = pending.pop(target)
        yield node, source, target


def state_buffer(
    state: Any, dtype: str, shape: tuple[Size, ...], constants: ConstantTable
) -> tuple[StateBuffer, int | None]:
    """A state in the plan.

    Args:
        state: of the program.
        dtype: its elements.
        shape: in the symbols of the plan.
        constants: where its initial value goes, unless that is zero.

    Returns:
        The state, and the place of its initial value in the table of constants, if it has one.
    """
    size = sizes.mul(sizes.product(shape), ITEM_BYTES[dtype])
    tensor = state.initial
    if not bool(torch.any(tensor != 0)):
        return StateBuffer(state.name, dtype, shape, size, ""), None
    extents = tuple(tensor.shape)
    recipe = Recipe((tensor.data_ptr(), extents), (state.name,), state.name, dtype, extents, lambda: tensor)
    index = constants.request(recipe)
    return StateBuffer(state.name, dtype, shape, size, constants.constants[index].key), index

"""Which values of a graph are caches: memory of a type of its own, whatever the model computes in."""

from __future__ import annotations

from torch import fx

from .cache_ops import CACHE_APPEND, PAGED_ATTENTION
from .query import calls


def caches(graph: fx.Graph) -> set[fx.Node]:
    """What cache operators append to and read, before and after. Their kernels convert single rows as they go."""
    found: set[fx.Node] = set()
    for node in calls(graph, (CACHE_APPEND, PAGED_ATTENTION)):
        if node.target == CACHE_APPEND:
            found.update((node, node.args[0]))  # type: ignore[arg-type]
        else:
            found.update(node.args[1:3])  # type: ignore[arg-type]
    return found

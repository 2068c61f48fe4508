"""A model of the ``models/`` registry, by name."""

from __future__ import annotations

from ...models import registry
from . import Loaded


def names() -> tuple[str, ...]:
    """The names that :func:`load_named` knows."""
    return tuple(registry.names())


def load_named(name: str) -> Loaded:
    """Build a registered model with its example inputs and shapes; its weights are seeded or shipped with it."""
    spec = registry.get(name)
    args, kwargs = spec.example()
    return Loaded(spec.build().eval(), args, kwargs, dict(spec.shapes))

"""Model definitions in plain PyTorch: a registry by name.

``names()`` and ``get(name)`` cost nothing; PyTorch is imported when a model is built.
"""

from .registry import ModelSpec, UnknownModel, get, names

__all__ = ["ModelSpec", "UnknownModel", "get", "names"]

"""Tilewright: an ahead-of-time compiler for trained models and the small runtime that runs its artifacts.

Names are resolved on first use, so that ``tilewright.load`` never imports torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": ".runtime.model",
    "Model": ".runtime.model",
    "TilewrightError": ".runtime.errors",
    "compile": ".compiler.driver",
    "Entry": ".compiler.options",
    "Task": ".compiler.options",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)

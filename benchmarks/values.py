"""Results of models as flat lists, and how far they are from a reference."""

from __future__ import annotations

from typing import Any

import numpy as np


def flatten(value: Any) -> list[Any]:
    """The leaves of nested dictionaries, tuples and lists, in order."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in flatten(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def deviation(reference: list[np.ndarray], values: list[np.ndarray]) -> float:
    """The largest error of any output, as a share of that output's largest value; NaN where there is a NaN.

    Raises:
        ValueError: another number of outputs, or other shapes.
    """
    worst = 0.0
    for want, value in zip(reference, values, strict=True):
        if want.shape != value.shape:
            raise ValueError(f"an output has shape {value.shape}, not {want.shape}")
        error = np.abs(value.astype(np.float64) - want).max() / np.abs(want.astype(np.float64)).max()
        worst = float(np.maximum(worst, error))
    return worst

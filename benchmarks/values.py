"""Results of models as flat lists, and how far they are from a reference. numpy is imported by what needs it only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def save_arrays(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write arrays one after the other, each as numpy's format has it: read without an archive's modules."""
    import numpy as np

    with open(path, "wb") as file:
        for array in arrays:
            np.save(file, array, allow_pickle=False)


def load_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of :func:`save_arrays`, in order."""
    import numpy as np

    arrays = []
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            arrays.append(np.load(file, allow_pickle=False))
    return arrays


def save_raw(folder: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write the bytes of each array to a file of its own, for :func:`load_raw`."""
    for index, array in enumerate(arrays):
        (folder / f"input_{index}.bin").write_bytes(array.tobytes())


def load_raw(folder: Path, count: int) -> list[bytes]:
    """What :func:`save_raw` wrote, without numpy."""
    return [(folder / f"input_{index}.bin").read_bytes() for index in range(count)]


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
    import numpy as np

    worst = 0.0
    for want, value in zip(reference, values, strict=True):
        if want.shape != value.shape:
            raise ValueError(f"an output has shape {value.shape}, not {want.shape}")
        error = np.abs(value.astype(np.float64) - want).max() / np.abs(want.astype(np.float64)).max()
        worst = float(np.maximum(worst, error))
    return worst

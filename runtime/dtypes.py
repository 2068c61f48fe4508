"""The plan's dtype names as numpy dtypes; bfloat16, which numpy lacks, comes from ml_dtypes when it is first needed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .plan import DTYPES


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a plan's dtype."""
    if name == "bfloat16":
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    assert name in DTYPES, name
    return np.dtype(name)

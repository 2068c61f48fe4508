"""Winograd's minimal filtering: the matrices, and weights as ``winograd.c.jinja`` streams through them.

A tile of ``T`` x ``T`` outputs of a 3x3 convolution is ``A' [(G g G') . (B' d B)] A`` (Lavin and Gray 2015, "Fast
algorithms for convolutional neural networks", equation 8) over ``T + 2`` x ``T + 2`` inputs ``d``. The matrices are
Toom's and Cook's: evaluate both polynomials at ``T + 1`` points and at infinity, multiply, interpolate.

The points decide how much precision is lost. Lavin and Gray take 0, 1, -1, 2, -2 for ``T = 4``; with powers closer to 1
(Barabasz, Anderson, Soodhalter and Gregg 2020, "Error analysis and improving the accuracy of Winograd convolution") the
largest error is a sixth of that, at the same cost: 2e-6 of the largest result over 256 channels, where direct
convolution has 1e-6.

``templates/c/tw_winograd.h`` has the other two matrices as code.
"""

from __future__ import annotations

import numpy as np

from .packing import pack_matmul

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)}
"""Interpolation points by the size of a tile, without infinity, in the order of the transforms' vectors."""


def filter_matrix(tile: int) -> np.ndarray:
    """``G``: ``[tile + 2, 3]`` in float64."""
    points = POINTS[tile]
    rows = []
    for point in points:
        scale = np.prod([point - other for other in points if other != point])
        rows.append([point**power / scale for power in range(3)])
    return np.array([*rows, [0.0, 0.0, 1.0]])


def pack_winograd(weight: np.ndarray, tile: int) -> np.ndarray:
    """``[OC, IC, 3, 3]`` as ``[ceil(OC/32), (tile + 2)**2, IC, 32]`` in the weight's dtype, transformed in float64."""
    matrix = filter_matrix(tile)
    outputs, inputs = weight.shape[:2]
    side = tile + 2
    flat = weight.astype(np.float64, copy=False).reshape(outputs * inputs, 9)
    points = flat @ np.kron(matrix, matrix).T
    rows = points.astype(weight.dtype).reshape(outputs, inputs, side * side).transpose(2, 1, 0)
    return np.ascontiguousarray(pack_matmul(rows).transpose(1, 0, 2, 3))

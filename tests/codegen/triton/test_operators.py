"""Every operator with a lowering as a loop kernel in Triton, interpreted, against PyTorch at awkward sizes.

The operators are those of the C dialect's tests.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).parents[1] / "test_operators.py"
SPEC = importlib.util.spec_from_file_location("operators_in_c", FILE)
OPERATORS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(OPERATORS)
CASES, BATCH = OPERATORS.CASES, OPERATORS.BATCH
SEED = 3


def flatten(result):
    return [leaf for part in result for leaf in flatten(part)] if isinstance(result, tuple | list) else [result]


def check(model, module, inputs, tolerance, tile=0):
    with torch.no_grad():
        expected = flatten(module(*inputs))
    got = model(*inputs, tile=tile)
    assert len(expected) == len(got)
    for position, (want, have) in enumerate(zip(expected, got, strict=True)):
        where = f"seed {SEED}, output {position}: {model.plan.steps[position].name}"
        assert (want.shape, want.dtype) == (have.shape, have.dtype), where
        if not want.dtype.is_floating_point:
            np.testing.assert_array_equal(have, want, err_msg=where)
            continue
        want, have = want.double().numpy(), have.double().numpy()
        finite = np.isfinite(want)
        np.testing.assert_array_equal(have[~finite], want[~finite], err_msg=where)
        scale = max(np.abs(want[finite]).max(initial=0), 1e-30)
        error = np.abs(have[finite] - want[finite]).max(initial=0) / scale
        assert error <= tolerance, f"{where}: error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_at_several_sizes(name, lowered):
    module_type, make, shapes, _ = CASES[name]
    torch.manual_seed(SEED)
    module = module_type()
    sizes = [(3, 7), (1, 4), (2, 65)] if name in ("views", "indexing") else [(3, 7), (1, 2), (2, 130)]
    model = lowered(module, make(*sizes[0]), shapes)
    for tile, size in enumerate(sizes):
        check(model, module, make(*size), 1e-5, tile)
    assert model.faults == 0


@pytest.mark.parametrize(("channels", "images"), [(16, "rows"), (21, "rows"), (21, "channels_last")])
def test_windows(channels, images, lowered):
    torch.manual_seed(SEED)
    module = OPERATORS.Windows()
    model = lowered(module, (torch.randn(2, channels, 14, 13),), ({0: BATCH},), images=images)
    assert any(buffer.layout == "channels_last" for buffer in model.plan.buffers) == (images == "channels_last")
    for batch in (1, 3):
        check(model, module, (torch.randn(batch, channels, 14, 13),), 1e-5)

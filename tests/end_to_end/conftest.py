"""Compiling a module as a user does, and comparing what it returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tilewright


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def make(tmp_path):
    """Compile with verification on, and load."""
    models = []

    def run(module, args=(), shapes=None, **options):
        path = tmp_path / f"model{len(models)}.tw"
        tilewright.compile(module.eval(), args, output=path, dynamic_shapes=shapes, **options)
        models.append(tilewright.load(path, threads=2))
        return models[-1]

    yield run
    for model in models:
        model.close()


@pytest.fixture(scope="session")
def same():
    """``same(got, want, tolerance=2e-6)``: the same structure, types, dtypes and numbers."""
    return _same


def _same(got, want, tolerance=2e-6):
    """The same structure, types, dtypes and numbers."""
    if isinstance(want, torch.Tensor):
        want = want.detach()
        expected = want.float().numpy() if want.dtype == torch.bfloat16 else want.numpy()
        if want.dtype == torch.bfloat16:
            assert got.dtype.name == "bfloat16"
            got = got.astype(np.float32)
        assert isinstance(got, np.ndarray) and got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            _same(got[key], want[key], tolerance)
    elif isinstance(want, tuple | list):
        assert type(got) is type(want) and len(got) == len(want)
        for left, right in zip(got, want, strict=True):
            _same(left, right, tolerance)
    else:
        assert type(got) is type(want) and got == want

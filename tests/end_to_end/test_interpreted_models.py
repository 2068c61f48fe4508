"""Every model family as GPU kernels, interpreted, against eager PyTorch in double precision.

Sizes are small: the interpreter takes time by the number of programs.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tilewright.passes.verify import TOLERANCES

SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "mlp": ({"batch": 1}, {"batch": 37}),
    "digits": ({"batch": 1}, {"batch": 5}),
    "resnet50": ({"batch": 1}, {"batch": 3}),
    "mobilenet_v3": ({"batch": 1},),
    "unet": ({"batch": 1},),
    "vit": ({"batch": 1}, {"batch": 3}),
    "bert": ({"batch": 1, "seq": 1}, {"batch": 3, "seq": 61}),
    "gpt2_tiny": ({"batch": 1, "seq": 1}, {"batch": 2, "seq": 37}),
    "llama_tiny": ({"batch": 1, "seq": 1}, {"batch": 2, "seq": 37}),
}
HALF: dict[str, tuple[torch.dtype, dict[str, int]]] = {
    "resnet50": (torch.bfloat16, {"batch": 1}),
    "bert": (torch.float16, {"batch": 2, "seq": 19}),
    "gpt2_tiny": (torch.float16, {"batch": 2, "seq": 19}),
    "llama_tiny": (torch.bfloat16, {"batch": 2, "seq": 19}),
}


@pytest.mark.parametrize("name", SIZES)
def test_float32_agrees_with_eager(name, small_model, gpu_artifact):
    _check(small_model(name), SIZES[name], gpu_artifact, torch.float32, 1e-5)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_agrees_with_eager(name, small_model, gpu_artifact):
    dtype, sizes = HALF[name]
    _check(small_model(name), (sizes,), gpu_artifact, dtype, TOLERANCES[dtype])


def _check(
    case: Any, chosen: tuple[dict[str, int], ...], gpu_artifact: Any, dtype: torch.dtype, tolerance: float
) -> None:
    module = case.module.to(dtype)
    exact = copy.deepcopy(module).double()
    path = gpu_artifact(module, _cast(case.inputs({}), dtype), case.shapes)
    with tilewright.load(path, device="interpreter") as model:
        for sizes in chosen:
            inputs = _cast(case.inputs(sizes), dtype)
            with torch.no_grad():
                expected = _leaves(exact(*_cast(inputs, torch.float64)))
            outputs = _leaves(model(*inputs))
            for position, (output, reference) in enumerate(zip(outputs, expected, strict=True)):
                error = _error(reference.numpy(), output)
                assert error <= tolerance, f"output {position} at {sizes}: {error:.2e}"


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, dict):
        return [leaf for value in result.values() for leaf in _leaves(value)]
    if isinstance(result, tuple | list):
        return [leaf for value in result for leaf in _leaves(value)]
    return [result]


def _error(reference: np.ndarray, got: np.ndarray) -> float:
    """max|a - b| / max|ref|."""
    assert reference.shape == got.shape
    return float(np.abs(got.astype(np.float64) - reference).max() / np.abs(reference).max())

"""Errors of outputs: the measure, NaN and infinities, and what the table says."""

import math

import pytest
import torch

from tilewright.passes.verify import TOLERANCES, check_outputs, error_of, same_type
from tilewright.runtime.errors import NumericsError


def test_error_is_relative_to_the_largest_reference():
    reference = torch.tensor([0.0, -4.0, 2.0])
    assert error_of(reference, reference + torch.tensor([0.0, 0.0, 1.0])) == 0.25
    assert error_of(reference, reference) == 0.0
    exact = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert error_of(exact, exact + 0.5) == 0.25 and exact.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize(
    ("reference", "value", "same"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], True),
        ([math.nan, 1.0], [1.0, 1.0], False),
        ([math.inf, 1.0], [math.inf, 1.0], True),
        ([math.inf, 1.0], [-math.inf, 1.0], False),
        ([1.0, 1.0], [math.inf, 1.0], False),
        ([1.0, 1.0], [math.nan, 1.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1e-20], False),
        ([], [], True),
        ([math.inf], [math.inf], True),
    ],
)
def test_positions_of_nan_and_infinity_agree(reference, value, same):
    error = error_of(torch.tensor(reference), torch.tensor(value))
    assert (error == 0.0) if same else (error == math.inf)


def test_shape_dtype_and_integers_must_be_equal():
    ones = torch.ones(2)
    assert error_of(ones, torch.ones(3)) == math.inf
    assert error_of(ones, ones.double()) == math.inf
    assert error_of(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert error_of(torch.tensor([True]), torch.tensor([True])) == 0.0


def test_check_names_every_output_beyond_tolerance():
    reference = (torch.ones(2), torch.ones(2), 3)
    assert check_outputs(reference, (torch.ones(2), torch.ones(2) * (1 + 1e-6), 3), "x")[0] == 0.0
    with pytest.raises(NumericsError, match=r"x: output 1: error 0\.5, tolerance 0\.0001; output 2: error inf"):
        check_outputs(reference, (torch.ones(2), torch.ones(2) * 1.5, 4), "x")
    with pytest.raises(NumericsError):
        check_outputs(reference, reference[:2], "x")


def test_half_precision_tolerances_are_wider():
    assert (
        TOLERANCES[torch.float64] < TOLERANCES[torch.float32] < TOLERANCES[torch.float16] < TOLERANCES[torch.bfloat16]
    )


def test_same_type_compares_shape_and_dtype():
    assert same_type(torch.ones(2, 3), torch.zeros(2, 3))
    assert not same_type(torch.ones(2, 3), torch.ones(2, 1))
    assert not same_type(torch.ones(2), torch.ones(2).double())
    assert not same_type((torch.ones(2),), (torch.ones(2), torch.ones(2)))

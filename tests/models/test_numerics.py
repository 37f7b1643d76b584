"""Test the comparisons of tensors up to rounding."""

from __future__ import annotations

import math

import pytest
import torch

from layersurgery.models.numerics import is_same_change, relative_error, tolerance


def test_the_largest_difference_is_relative_to_the_largest_value_of_its_row() -> None:
    expected = torch.tensor([[100.0, 1.0], [0.0, 2.0]])
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.tensor([[99.0, 1.0], [0.5, 2.0]]), expected) == 0.25
    assert relative_error(expected[0], expected) == math.inf
    assert relative_error(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])) == 0
    assert relative_error(torch.tensor([[0.0, 1e-9]]), torch.tensor([[0.0, 0.0]])) > 1


def test_nan_is_within_no_tolerance() -> None:
    expected = torch.ones(2, 3)
    nan = expected.clone()
    nan[1, 1] = torch.nan
    assert not relative_error(nan, expected) <= 1e9
    assert not is_same_change(nan, expected, torch.zeros(2, 3), 1e9)


def test_streams_are_compared_relative_to_the_change() -> None:
    before, change = torch.full((1, 4), 100.0), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    expected = before + change
    assert is_same_change(expected + 0.009 * change, expected, before, 1e-2)
    assert not is_same_change(expected + 0.02 * change, expected, before, 1e-2)
    # Rounding of the stream itself: one digit of bfloat16 is half of the change here.
    before, expected, actual = (x.bfloat16() for x in (before, expected, expected + 0.5))
    assert is_same_change(actual, expected, before, 1e-2)


def test_the_coarsest_dtype_counts() -> None:
    assert tolerance("readout", torch.float32) < tolerance("readout", torch.float16)
    assert tolerance("readout", torch.float32, torch.bfloat16) == tolerance("readout", torch.bfloat16)
    assert tolerance("fit", torch.float8_e4m3fn) == tolerance("fit", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tolerances_are_larger_than_the_last_digit(dtype: torch.dtype) -> None:
    for comparison in ("readout", "fit", "fold", "compile"):
        assert 3 * torch.finfo(dtype).eps < tolerance(comparison, dtype) < 0.1

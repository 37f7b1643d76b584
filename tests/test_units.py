"""Numbers and lists as people read them."""

from __future__ import annotations

import pytest

from layersurgery.units import format_list


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(0, 1, ""), (1, 1, "a"), (2, 1, "a and 1 more"), (2, 2, "a, b"), (2, 5, "a, b"), (5, 3, "a, b, c and 2 more")],
)
def test_a_list_says_how_many_are_left_out_unless_there_are_none(count: int, limit: int, expected: str) -> None:
    assert format_list("abcde"[:count], limit) == expected

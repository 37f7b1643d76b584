"""Check that ARCHITECTURES.md matches what the edits do."""

from __future__ import annotations

import pytest

from tests.support.generate_architectures import PAGE, row
from tests.support.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_the_row_is_true(name: str) -> None:
    assert row(name) in PAGE.read_text("utf-8").splitlines(), "run: python -m tests.support.generate_architectures"


def test_there_is_a_row_for_each() -> None:
    text = PAGE.read_text("utf-8")
    assert [
        line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ") and "type |" not in line
    ] == list(ZOO)
    assert len(ZOO) > 80

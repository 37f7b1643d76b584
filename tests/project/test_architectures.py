"""Check that ARCHITECTURES.md matches what the edits do."""

from __future__ import annotations

import pytest

from tests.support.generate_architectures import PAGE, row
from tests.support.unsupported import ALL_UNSUPPORTED
from tests.support.zoo import ZOO, rotate, slow

REFUSING = {name for name, _ in ALL_UNSUPPORTED}


@pytest.mark.parametrize("name", [name if name in REFUSING else slow(name) for name in ZOO])
def test_the_row_is_true(name: str) -> None:
    assert row(name) in PAGE.read_text("utf-8").splitlines(), "run: python -m tests.support.generate_architectures"


def test_there_is_a_row_for_each() -> None:
    text = PAGE.read_text("utf-8")
    assert [
        line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ") and "type |" not in line
    ] == list(ZOO)
    assert len(ZOO) > 80


@pytest.mark.parametrize("count", [1, 3])
def test_the_quick_tests_meet_each_architecture_and_each_edit(count: int) -> None:
    plans, refused = [f"plan {number}" for number in range(8)], [("llama", "plan 3"), ("gpt2", "plan 0")]
    pairs = rotate(plans, count=count, always=refused)
    assert [pair.values for pair in pairs] == [(name, plan) for name in ZOO for plan in plans]
    quick = {pair.values for pair in pairs if not pair.marks}
    assert set(refused) <= quick
    assert [sum((name, plan) in quick - set(refused) for plan in plans) for name in ZOO] == [count] * len(ZOO)
    assert all(sum((name, plan) in quick for name in ZOO) >= len(ZOO) * count // 8 - 1 for plan in plans)

"""Check that ARCHITECTURES.md matches what the edits do."""

from __future__ import annotations

import pytest
import transformers

from tests.support import multimodal_section
from tests.support.generate_architectures import PAGE, row, survey_row
from tests.support.multimodal import MULTIMODAL, NOT_BUILT, UNMEASURED
from tests.support.survey import EDITS, Case, types
from tests.support.unsupported import ALL_UNSUPPORTED
from tests.support.zoo import ZOO, rotate, slow

REFUSING = {name for name, _ in ALL_UNSUPPORTED}


@pytest.mark.parametrize("name", [name if name in REFUSING else slow(name) for name in ZOO])
def test_the_row_is_true(name: str) -> None:
    assert row(name) in PAGE.read_text("utf-8").splitlines(), "run: python -m tests.support.generate_architectures"


def test_there_is_a_row_for_each() -> None:
    tables = [
        [line.split(" | ")[0][2:] for line in part.splitlines() if line.startswith("| ") and "type |" not in line]
        for part in PAGE.read_text("utf-8").split("\n## ")
    ]
    assert tables[0] == list(ZOO)
    assert len(ZOO) > 80
    # Another version of transformers may have types that were not surveyed.
    if f"transformers {transformers.__version__} " in PAGE.read_text("utf-8"):
        assert tables[1] == [name for name in types() if name not in ZOO]


def test_a_row_of_the_survey_says_what_was_refused_and_why() -> None:
    cases = [Case("new", "", "", "built")]
    for plan in EDITS:
        reason = "no branch of block 2 (NewLayer) can be skipped: it mixes, so it stays" if "skip" in plan else ""
        cases += [Case("new", plan, way, "refused" if reason else "right", reason) for way in ("memory", "disk")]
    whole = f"{len(EDITS) - 2} of {len(EDITS)}"
    refused = "in memory and on disk *skip-attention 2, skip-mlp 2*: it mixes"
    assert survey_row(cases) == f"| new | {whole} | {whole} | {refused} |"
    assert survey_row([Case("new", "", "", "not built", "no weights")]) == "| new | | | not built: no weights |"


@pytest.mark.parametrize("name", [slow(name) for name in MULTIMODAL if name not in NOT_BUILT])
def test_the_line_of_a_type_that_reads_images_or_sound_is_true(name: str) -> None:
    assert multimodal_section.line(name) in PAGE.read_text("utf-8").splitlines()


def test_there_is_a_line_for_each_type_that_reads_images_or_sound() -> None:
    _, section = PAGE.read_text("utf-8").split(multimodal_section.HEADING)
    lines = [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ")]
    assert {line.partition(": ")[0]: "`" in line for line in lines} == {
        name: name not in UNMEASURED | NOT_BUILT for name in MULTIMODAL
    }, "run: python -m tests.support.generate_architectures"


@pytest.mark.parametrize("count", [1, 3])
def test_the_quick_tests_meet_each_architecture_and_each_edit(count: int) -> None:
    plans, refused = [f"plan {number}" for number in range(8)], [("llama", "plan 3"), ("gpt2", "plan 0")]
    pairs = rotate(plans, count=count, always=refused)
    assert [pair.values for pair in pairs] == [(name, plan) for name in ZOO for plan in plans]
    quick = {pair.values for pair in pairs if not pair.marks}
    assert set(refused) <= quick
    assert [sum((name, plan) in quick - set(refused) for plan in plans) for name in ZOO] == [count] * len(ZOO)
    assert all(sum((name, plan) in quick for name in ZOO) >= len(ZOO) * count // 8 - 1 for plan in plans)

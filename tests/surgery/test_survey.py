"""Every causal language model of transformers, edited in memory and on disk: right, or refused by name."""

from __future__ import annotations

import pytest

from tests.support.generate_architectures import PAGE, survey_row
from tests.support.survey import examine, types
from tests.support.zoo import ZOO

# What the survey found to be refused without need; the edit that showed it.
MENDED = [
    # Its norm has a gate with matrices, which was taken for an MLP.
    ("axk2", "skip-mlp 2"),
    # The last full-attention layer goes, and with it the frequencies that the rotary embedding kept for that kind.
    ("beam", "drop -1"),
    # A seed that is the position of the layer.
    ("big_bird", "swap 1 2"),
    # Decoders whose num_hidden_layers is that of the encoder that they do not have.
    ("bart-unequal", "drop 0"),
    ("prophetnet", "repeat 2:4"),
    ("blenderbot", "skip-attention 2"),
    # A second name of the depth.
    ("xlstm", "repeat 2:4"),
    # A factor that depends on the depth.
    ("minicpm3", "drop 0"),
]


@pytest.mark.parametrize(("name", "plan"), MENDED)
def test_an_edit_that_was_refused_without_need_is_right(name: str, plan: str) -> None:
    results = [(case.way, case.result, case.detail) for case in examine(name, [plan]) if case.plan]
    assert [result[:2] for result in results] == [("memory", "right"), ("disk", "right")], results


@pytest.mark.parametrize("name", ["dory", "inkling2_loop_text", "hrm_text"])
def test_a_looped_model_is_refused_by_name(name: str) -> None:
    cases = [case for case in examine(name, ["swap 1 2", "repeat 2:4"]) if case.plan]
    assert len(cases) == 4
    assert all(case.result == "refused" and case.detail.startswith(f"{name} runs its") for case in cases), cases


@pytest.mark.weekly
@pytest.mark.parametrize("name", [name for name in types() if name not in ZOO])
def test_every_type_is_right_or_refused(name: str) -> None:
    found = list(examine(name))
    cases = [case for case in found if case.plan]
    assert not [case for case in cases if case.result not in ("right", "refused")]
    assert all(len(case.detail) > 20 for case in cases if case.result == "refused")
    assert survey_row(found) in PAGE.read_text("utf-8").splitlines(), "run: tests.support.generate_architectures"

"""Test what is refused in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layersurgery as ls
from tests.support.zoo import tiny_model


def _operate(model: Any) -> None:
    with ls.operate(model, "drop 3"):
        pass


@pytest.mark.parametrize(
    "call",
    [
        ls.anatomy,
        ls.fold,
        _operate,
        lambda model: ls.operate_(model, "drop 3"),
        lambda model: ls.operate_(model, "drop 3", verify=False),
        lambda model: ls.save(model, "saved"),
    ],
    ids=["anatomy", "fold", "operate", "operate_", "operate_ without check", "save"],
)
def test_a_name_instead_of_a_model(call: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", Path("gpt2")):
        with pytest.raises(
            ls.PlanError,
            match=r"expected a loaded model, not 'gpt2'; load one: model, tokenizer = layersurgery.load\('gpt2'\)",
        ):
            call(name)
    with pytest.raises(ls.PlanError, match=r"not a tuple; load one: model, tokenizer = layersurgery.load\('smollm2"):
        call((tiny_model("llama"), None))
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_model_is_no_model() -> None:
    with pytest.raises(ls.UnsupportedEditError, match="ModuleList has no transformers config"):
        ls.anatomy(tiny_model("llama").model.layers)

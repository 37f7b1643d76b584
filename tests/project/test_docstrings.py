"""Every example in a docstring runs as it stands, on a small model under the real one's name."""

from __future__ import annotations

import doctest
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.demo_model import stand_in

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "layersurgery").rglob("*.py") if ">>>" in path.read_text("utf-8"))
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(path: Path) -> list[doctest.DocTest]:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    # No names but those that the example itself imports.
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, globs={})
    return [test for test in found if test.examples]


@pytest.fixture
def small(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in(monkeypatch, tmp_path_factory.getbasetemp() / "stand-in")
    monkeypatch.chdir(tmp_path)
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "layersurgery").with_suffix("")))
def test_examples_run(path: Path, small: None) -> None:
    tests = examples(path)
    assert tests
    for test in tests:
        said: list[str] = []
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append)
        assert result.failed == 0, "".join(said)
    assert "+SKIP" not in path.read_text("utf-8")

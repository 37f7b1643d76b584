"""Run every example in a docstring as it is written, on a small model under the real one's name."""

from __future__ import annotations

import doctest
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.demo_model import use_demo_model

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "layersurgery").rglob("*.py") if ">>>" in path.read_text("utf-8"))
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(path: Path) -> list[doctest.DocTest]:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    # An example may use only the names that it imports itself.
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, globs={})
    return [test for test in tests if test.examples]


@pytest.fixture
def small(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_demo_model(monkeypatch, tmp_path_factory.getbasetemp() / "demo-model")
    monkeypatch.chdir(tmp_path)
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "layersurgery").with_suffix("")))
def test_examples_run(path: Path, small: None) -> None:
    tests = examples(path)
    assert tests
    for test in tests:
        output: list[str] = []
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append)
        assert result.failed == 0, "".join(output)
    assert "+SKIP" not in path.read_text("utf-8")

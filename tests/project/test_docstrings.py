"""Run every example in a docstring as it is written, on a small model under the real one's name."""

from __future__ import annotations

import ast
import doctest
import importlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.demo_model import use_demo_model

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "layersurgery").rglob("*.py") if ">>>" in path.read_text("utf-8"))
SOURCES = sorted([*(ROOT / "layersurgery").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
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


def entries(docstring: str, section: str) -> list[str]:
    """Names that a section of a docstring explains."""
    lines = docstring.split("\n")
    start = next((number for number, line in enumerate(lines, 1) if line.strip() == f"{section}:"), len(lines))
    body = lines[start : next((number for number in range(start, len(lines)) if not lines[number].strip()), len(lines))]
    indent = min((len(line) - len(line.lstrip()) for line in body), default=0)
    return [match[1] for line in body if (match := re.match(rf" {{{indent}}}(\w+): ", line))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT).with_suffix("")))
def test_docstrings_name_what_is_there(path: Path) -> None:
    """A parameter or attribute that was renamed is renamed in its docstring, too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not (docstring := ast.get_docstring(node)):
            continue
        functions = (
            [node] if isinstance(node, ast.FunctionDef) else [n for n in node.body if isinstance(n, ast.FunctionDef)]
        )
        arguments = {
            argument.arg
            for function in functions
            for argument in ast.walk(function.args)
            if isinstance(argument, ast.arg)
        }
        assert set(entries(docstring, "Args")) <= arguments, f"{path}, line {node.lineno}: {node.name}"
        if isinstance(node, ast.ClassDef):
            fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            assigned = set(re.findall(r"self\.(\w+)", ast.unparse(node)))
            known = fields | assigned | {function.name for function in functions}
            assert set(entries(docstring, "Attributes")) <= known, f"{path}, line {node.lineno}: {node.name}"

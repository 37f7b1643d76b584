"""Text files name their encoding, because that of Windows is not UTF-8."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The position of the encoding among the arguments.
METHODS = {"read_text": 0, "write_text": 1}


def unnamed(source: str) -> Iterator[int]:
    """Yield the lines of the calls that read or write text without naming its encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            is_named = len(node.args) > METHODS[node.func.attr] or any(word.arg == "encoding" for word in node.keywords)
            if not is_named:
                yield node.lineno


def test_a_call_without_it_is_found() -> None:
    assert list(unnamed("path.read_text()\npath.read_text('utf-8')\npath.write_text('a')")) == [1, 3]


@pytest.mark.parametrize("directory", ["layersurgery", "cli", "benchmarks", "examples", "docs"])
def test_encodings_are_named(directory: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / directory).rglob("*.py")
        if (lines := list(unnamed(path.read_text("utf-8"))))
    }
    assert found == {}

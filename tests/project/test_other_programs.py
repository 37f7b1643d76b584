"""Run the Python of docs/other-programs.md, each block where its program is installed, on a small model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.project.test_readme import blocks
from tests.support.demo_model import use_demo_model

PAGE = Path(__file__).parents[2] / "docs" / "other-programs.md"
PYTHON = [text for language, text in blocks(PAGE) if language == "python"]
PROGRAMS = ("nnsight", "transformer_lens", "peft")


def test_each_program_has_a_block() -> None:
    assert all(any(program in text for text in PYTHON) for program in PROGRAMS)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_page(
    number: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in PROGRAMS:
        if re.search(rf"^(import|from) {program}\b", PYTHON[number], re.MULTILINE):
            pytest.importorskip(program, reason=f"needs {program}")
    use_demo_model(monkeypatch, tmp_path_factory.getbasetemp() / "demo-model")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "page.py"  # nnsight reads the source of a traced block
    script.write_text(PYTHON[number], "utf-8")
    runpy.run_path(str(script))

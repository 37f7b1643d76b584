"""Check what the pages claim: named tests exist, shown commands have those options, tables are what commands print."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

import layersurgery as ls
from benchmarks import paper_costs
from tests.support import generate_docs

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_are_there(page: Path) -> None:
    known = set(
        re.findall(r"def (test_\w+)", "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py")))
    )
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.findall(r"[A-Z]+_[A-Z_]+S?\n|TODO|FIXME", page.read_text(encoding="utf-8"))


def test_messages_quote_arguments_that_exist() -> None:
    """A quoted name is an argument of a public function, so that the command line can write it as its option."""
    functions = [getattr(ls, name) for name in ls.__all__] + [
        getattr(ls.analyses, name) for name in ls.analyses.__all__
    ]
    known = {name for each in functions if inspect.isfunction(each) for name in inspect.signature(each).parameters}
    known |= {name.lstrip("-").replace("-", "_") for name in re.findall(r"--[a-z-]+", generate_docs.commands())}
    quoted = set(re.findall(r"(?<!`)`([a-z_]+)`(?!`)", generate_docs.PAGES["errors.md"]().replace("\n- ``", "\n- ")))
    quoted -= {"analyze", "stages"}  # commands
    quoted -= {"quantization_config"}  # an argument of from_pretrained, which load passes on
    assert len(quoted) > 40
    assert quoted <= known, quoted - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_text_becomes_a_heading(page: Path) -> None:
    """Markdown takes a line that begins with # for a heading, also where it was meant as a number."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not re.findall(r"^#+[^# \n].*", text, re.M)


@pytest.mark.parametrize("page", generate_docs.PAGES)
def test_generated_pages_are_up_to_date(page: str) -> None:
    """Check that a generated page matches the docstrings and the commands' help; if not, generate it again."""
    assert (ROOT / "docs" / page).read_text("utf-8") == generate_docs.PAGES[page](), (
        f"docs/{page} differs from docstrings and help; run: uv run python -m tests.support.generate_docs {page}"
    )


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


@pytest.mark.slow
def test_the_table_of_costs() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    for row in paper_costs.rows():
        assert f"| {' | '.join(row)} |" in page, row


def test_the_script_for_slurm_is_one() -> None:
    script = ROOT / "examples" / "sweep.slurm"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert script.read_text().startswith("#!/bin/bash\n")


def test_the_options_that_the_pages_show_are_there() -> None:
    from layersurgery_cli.app import app
    from typer.main import get_command

    sweep = cast(Any, get_command(app)).commands["sweep"]
    known = {option for parameter in sweep.params for option in (*parameter.opts, *parameter.secondary_opts)}
    texts = [*(page.read_text() for page in PAGES), (ROOT / "examples" / "sweep.slurm").read_text()]
    shown = [
        line.partition("layersurgery_cli")[2] or line.partition("layersurgery ")[2]
        for text in texts
        for line in text.splitlines()
    ]
    words = [
        word
        for line in shown
        if line.lstrip().startswith("sweep ")
        for word in re.findall(r"(?<=\s)--?[a-z][\w-]*", line.partition("#")[0])
    ]
    assert words
    assert set(words) <= known

"""Run the pages' commands and Python as written, in their order, on small models under the real ones' names.

A command with a comment that says minutes, hours or GPU runs with `--tokens 128 --context 64` added. Blocks marked `sh`
and `python` run; `text` is output; `console`, `py` and `yaml` do not run.
"""

from __future__ import annotations

import logging
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from layersurgery_cli.app import app
from typer.main import get_command

from tests.cli.test_cli import run
from tests.support.demo_model import use_demo_model

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *(
        ROOT / "docs" / name
        for name in ("tutorial.md", "prune-and-heal.md", "results.md", "architectures.md", "came-from.md")
    ),
]
# These commands set up the project, which is already done where the tests run.
DONE = {"git clone", "cd", "source", "uv run pytest", "uv sync"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the words of each command, and whether it takes too long to run as written."""
    for line in text.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("  #")
        if not command.strip() or command.startswith("#"):
            continue
        command = command.strip().replace("pip install uv && ", "")
        if not command.startswith("uv run layersurgery") and any(command.startswith(words) for words in DONE):
            continue
        yield shlex.split(command.removeprefix("uv run ")), bool(re.search(r"minutes|hours?\b|GPU", comment))


def shortened(words: list[str]) -> list[str]:
    command = get_command(app)
    for word in words[1:3]:
        command = getattr(command, "commands", {}).get(word, command)
    known = {option for parameter in command.params for option in parameter.opts}
    return [*words, "--tokens", "128", "--context", "64"] if "--tokens" in known else words


def perform(page: Path, *, long: bool = False) -> None:
    """Run a page's commands and Python in the current directory."""
    names: dict[str, object] = {"__name__": "page"}
    for number, (language, text) in enumerate(blocks(page)):
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)
        if language != "sh":
            continue
        for words, takes_long in commands(text):
            assert words[0] == "layersurgery", words
            actual = shortened(words) if takes_long and not long else words
            started = time.process_time()
            result = run(*actual[1:])
            print(f"{time.process_time() - started:5.1f} s of CPU time: {shlex.join(actual)}")
            assert result.exit_code == 0, f"{page.name}: {shlex.join(actual)}\n{result.output}\n{result.stderr}"


@pytest.fixture
def quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(
    page: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    use_demo_model(monkeypatch, tmp_path_factory.getbasetemp() / "demo-model")
    monkeypatch.chdir(tmp_path)
    perform(page)


@pytest.mark.weekly
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says_on_the_real_model(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    use_demo_model(monkeypatch, tmp_path / "demo-model", real=True)
    monkeypatch.chdir(tmp_path)
    perform(page, long=page != README)


def test_the_first_thing_a_new_user_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the README's first command prints on the real model what the README shows."""
    setup = next(text for language, text in blocks(README) if language == "sh").splitlines()
    assert [line.split("  #")[0].strip() for line in setup] == [
        "pip install uv && uv run layersurgery demo",
        "uv run pytest",
    ]
    assert {"uv run pytest", "uv run pytest -m slow"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.exit_code == 0
    for line in [line for line in result.stdout.splitlines() if line.strip()][:3]:
        assert line.strip() in README.read_text("utf-8")


def test_it_stays_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) < 200

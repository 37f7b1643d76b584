"""The README's code blocks run as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pythia import make
from layersurgery.sources import cache_directory
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory, with the models that the README names in an offline hub cache, small."""
    directory = tmp_path_factory.mktemp("readme")
    make(directory / "hf" / "hub", width=256, depth=32, shard_bytes=20_000_000)
    return directory


def commands() -> list[str]:
    shell = "\n".join(text for language, text in BLOCKS if language == "sh").replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in shell.splitlines() if line.strip() and not line.startswith("#")]


def test_the_two_set_up_commands() -> None:
    assert commands()[:2] == ["pip install uv && uv run layersurgery demo", "uv run pytest"]
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text()


def environment(place: Path) -> dict[str, str]:
    tools = Path(sys.executable).parent
    cache = str(cache_directory())
    hub = {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "LAYERSURGERY_CACHE": cache}
    return {**os.environ, **hub, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def test_every_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need the hub's cache, or start with something else, in a shell; the others here, which spares ten imports of torch."""
    ours = [line for line in commands() if line.startswith(("layersurgery", "pip install uv &&"))]
    assert len(ours) > 8
    in_shell = [line for line in ours if "EleutherAI" in line or not line.startswith("layersurgery")]
    assert len(in_shell) == 3
    for line in in_shell:
        found = subprocess.run(
            ["bash", "-c", line.replace("pip install uv && uv run ", "")],
            cwd=place,
            env=environment(place),
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, f"{line}\n{found.stdout}\n{found.stderr}"
    monkeypatch.chdir(place)
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    for line in ours:
        if line in in_shell:
            continue
        program, *words = shlex.split(line)
        assert program == "layersurgery"
        result = run(*words)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.stderr}"


def test_every_python_block(place: Path) -> None:
    code = [text for language, text in BLOCKS if language == "python"]
    assert code
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_every_python_example(place: Path) -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert examples
    for example in examples:
        found = subprocess.run([sys.executable, example], cwd=place, env=environment(place), capture_output=True, text=True)
        assert found.returncode == 0, f"{example.name}\n{found.stderr}"
        assert found.stdout


def test_it_stays_short() -> None:
    assert len(README.splitlines()) < 200

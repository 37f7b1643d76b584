"""Sweeps of blocks of another checkpoint equal operating and comparing, and a run knows where its blocks are from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import layersurgery as ls
from layersurgery.checkpoints.block_sources import take_blocks
from layersurgery.metrics.reference import METRICS, measure
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from tests.checkpoints.test_zoo import reload
from tests.cli.test_cli import result_of, run
from tests.runs.test_distributed import files, start
from tests.support.reference import logits_of
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import DEPTH, ZOO, tiny_model, tokens
from tests.surgery.test_zoo import state

EDITS = [
    "replace-from:base",
    "take 1 from base; swap 1 4",
    "take 2 from base; scale-mlp 2 0.5",
    "take 3 from base; skip-attention 3",
]
NAMES = [
    pytest.param(name, marks=() if number % 20 == 8 else pytest.mark.slow)
    for number, name in enumerate(ZOO)
    if number % 8 == 0
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["depth-first", "layer-major"])
def test_a_sweep_is_operating_and_comparing(name: str, order: str) -> None:
    model, other, ids = tiny_model(name), tiny_model(name, seed=1), tokens(2, 10)
    logits = logits_of(model, ids)
    before, others = state(model), state(other)
    sources = {"base": other}
    wanted = []
    for edit in EDITS:
        made = variants(edit, DEPTH)
        try:
            Measurer(model, made, taken=take_blocks(model, [each.route for each in made], sources))
        except ls.UnsupportedEditError:
            continue
        wanted += made
    measurer = Measurer(model, wanted, taken=take_blocks(model, [each.route for each in wanted], sources), order=order)
    measured = measurer.measure(ids, torch.ones_like(ids))
    assert state(model) == before
    assert state(other) == others
    target = ids[:, 1:].flatten()
    assert len(measurer.variants) > DEPTH
    for row, variant in enumerate(measurer.variants[1:], 1):
        with ls.operate(model, variant.route, anatomy=measurer.runner.anatomy, sources=sources):
            q = logits_of(model, ids)
        meant = measure(logits[:, :-1].flatten(0, 1), q[:, :-1].flatten(0, 1), target)
        found = torch.from_numpy(measured.values[:, row])
        torch.testing.assert_close(found / 9, meant.view(len(METRICS), 2, 9).sum(-1).T / 9, rtol=0, atol=1e-5)
        assert found[:, METRICS.index("kl_nats")].min() > 1e-3


def test_a_family_leaves_out_blocks_that_differ_and_a_plan_is_refused() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", num_hidden_layers=4)
    frame = ls.sweep(model, "replace-from:base,drop", tokens(), sources={"base": other})
    assert list(frame[frame.edit == "replace-from"].layer) == [0, 1, 2, 3]
    with pytest.raises(ls.UnsupportedEditError, match="block 5 cannot be taken from base, which has 4 blocks"):
        ls.sweep(model, ["take 5 from base"], tokens(), sources={"base": other})
    with pytest.raises(ls.PlanError, match="takes the name of a source; write replace-from:base"):
        ls.sweep(model, "replace-from", tokens())


def test_two_sources_are_two_lines_and_compare_takes_one() -> None:
    model, other, third = (tiny_model("llama", seed=seed) for seed in range(3))
    frame = ls.sweep(model, "replace-from:a,replace-from:b", tokens(), sources={"a": other, "b": third})
    figure = frame.plot()
    assert figure is not None
    for name, source in {"a": other, "b": third}.items():
        row = frame[frame.plan == f"take 2 from {name}"].iloc[0]
        comparison = ls.compare(model, f"take 2 from {name}", tokens(), sources={name: source})
        assert row.kl_nats == pytest.approx(comparison.kl_nats, abs=1e-6)
    with pytest.raises(ls.PlanError, match="`sources` is for an edit of the first model"):
        ls.compare(model, other, tokens(), sources={"a": third})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "tiny")
    checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "story.txt").write_text("Once upon a time there were six layers.\n" * 30)
    return tmp_path


SWEEP = [
    "sweep",
    "tiny",
    "--edits",
    "replace-from:base",
    "--data",
    "story.txt",
    "-n",
    "200",
    "--context",
    "20",
    "--device",
    "cpu",
]


def test_the_command_line_takes_blocks(place: Path) -> None:
    value = result_of("take", "tiny", "--layer", 2, "--source", "base=other", "-o", "out")
    assert value["plan"] == "take 2 from base"
    assert value["sources"] == {"base": ["other", None]}
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with ls.operate(model, "take 2 from base", sources={"base": other}):
        assert torch.equal(logits_of(reload(place / "out"), tokens()), logits_of(model, tokens()))
    assert "name the other checkpoint: --source base=MODEL" in run("take", "tiny", "--layer", 2).output
    value = result_of(
        "edit", "tiny", "--plan", "take 1 from a; take 2 from b", "--source", "a=other", "--source", "b=other"
    )
    assert value["route"] == "0 1@a 2@b 3:6"
    value = result_of("compare", "tiny", "take 2 from base", "--source", "base=other", "--data", "story.txt", "-n", 20)
    assert value["kl_nats"] > 0


def test_a_run_knows_its_sources(place: Path) -> None:
    cost = result_of(*SWEEP, "--source", "base=other", "--estimate")
    model = tiny_model("llama")
    of_blocks = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    assert cost["taken"] == of_blocks
    assert cost["source"] >= cost["taken"]
    assert run(*SWEEP, "--source", "base=other", "-o", "out").exit_code == 0
    frame = ls.read_results("out")
    assert list(frame[frame.edit == "replace-from"].layer) == list(range(DEPTH))
    assert (frame.kl_nats[1:] > 1e-3).all()
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["arguments"]["sources"]["base"]["name"] == "other"
    found = run(*SWEEP, "--source", "base=tiny", "-o", "out")
    assert found.exit_code == 1
    assert "contains a sweep with other arguments: sources base name other there, tiny now" in " ".join(
        found.output.split()
    )
    found = run(*SWEEP, "-o", "none")
    assert found.exit_code == 2
    assert "no source has this name" in " ".join(found.output.split())


@pytest.mark.slow
def test_tasks_after_a_text_are_those_of_the_model_with_the_block(place: Path) -> None:
    pytest.importorskip("lm_eval")
    pairs = [("Once upon a time", " there were layers."), ("Twice", " upon a time.")]
    both: Any = {"tasks": ls.tasks.requests(pairs), "data": "story.txt", "tokens": 60, "context": 20}
    sources, plan = {"base": "other"}, "take 2 from base"
    frame = ls.sweep("tiny", [plan], directory="out", sources=sources, **both)
    ls.edit_checkpoint("tiny", plan, "edited", sources=sources)
    whole = ls.sweep("edited", ["drop 1"], **both)
    columns = [name for name in whole if str(name).startswith("task_") and "change" not in str(name)]
    assert columns
    for column in [*columns, "loss_nats"]:
        assert frame[column].iloc[1] == pytest.approx(whole[column].iloc[0], rel=1e-5, nan_ok=True), column


@pytest.mark.slow
def test_the_report_reconstructs_the_command(place: Path) -> None:
    ls.sweep("tiny", "replace-from:base", tokens(), layers="1:3", sources={"base": "other"}, directory="out")
    assert run("report", "out").exit_code == 0
    page = re.sub("</?span>", "", (place / "report.html").read_text())
    assert "--edits replace-from:base --source base=other" in page
    assert '"label":"replace from"' in page


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(place: Path) -> None:
    (place / "said").mkdir()
    given = [*SWEEP, "--device", "cpu", "-b", "2", "--source", "base=other", "-o"]
    ended = start(place, place / "said", 2, [*given, str(place / "two")])
    assert ended.codes == [0, 0], ended.err
    assert run(*given, "one").exit_code == 0
    assert files(place / "one") == files(place / "two")

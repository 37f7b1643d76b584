"""`layersurgery rank` and `prune`, as a person at a terminal uses them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

import layersurgery as ls
from tests.cli.test_analyze import words
from tests.cli.test_cli import result_of, run
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import DEPTH


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second block does next to nothing and whose fifth does much, and a text."""
    path = tmp_path_factory.mktemp("prune")
    checkpoint(path / "tiny", "llama")
    model = AutoModelForCausalLM.from_pretrained(path / "tiny")
    with torch.no_grad():
        for block, factor in ((1, 0.01), (3, 0.1), (4, 20.0)):
            for projection in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
                projection.weight.mul_(factor)
    model.save_pretrained(path / "tiny")
    (path / "story.txt").write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(60)))
    return path


def tokens_of(place: Path) -> list[list[int]]:
    ids = tiny_tokenizer()((place / "story.txt").read_text(), add_special_tokens=False)["input_ids"][:120]
    return [ids[start : start + 30] for start in range(0, 120, 30)]


def test_ranks_and_spans_are_those_of_python(place: Path, tmp_path: Path) -> None:
    value = result_of("rank", place / "tiny", *words(place), "-o", tmp_path / "out", "--spans", 3)
    meant = ls.rank(ls.load(place / "tiny").model, tokens_of(place), spans=3)
    found = ls.read_results(tmp_path / "out")
    numbers = meant.select_dtypes("number").columns
    pd.testing.assert_frame_equal(found[numbers], meant[numbers], check_exact=False, atol=1e-6)
    assert [row["layer"] for row in value["tables"]["rank"]] == found.layer.tolist()
    assert found.set_index("layer").kl_rank[1] == 1
    assert found.set_index("layer").kl_rank[4] == DEPTH
    spans = ls.read_results(tmp_path / "out", "spans")
    assert spans.span.max() == 3
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert {"rank.png", "rank.svg"} <= set(facts["figures"])
    assert Image.open(tmp_path / "out" / "rank.png").width > 1500
    seen = run("rank", place / "tiny", *words(place), "-o", tmp_path / "out", "--spans", 3)
    assert "Using the finished run in" in seen.stderr
    assert "Lowest KL when removed: layers 1, " in seen.stdout
    assert "Lowest block influence (ShortGPT): " in " ".join(seen.stdout.split())
    assert "…" not in seen.stdout
    other = run("rank", place / "tiny", *words(place), "-o", tmp_path / "out", "--spans", 2)
    assert other.exit_code == 1
    assert "spans 3 there, 2 now" in other.stderr


@pytest.mark.parametrize(("by", "greedy"), [("kl", False), ("kl", True), ("influence", True), ("angular", False)])
def test_the_checkpoint_is_the_model_without_those_layers(place: Path, tmp_path: Path, by: str, greedy: bool) -> None:
    asked = [*words(place), "--remove", 2, "--by", by, *(["--greedy"] if greedy else []), "-o", tmp_path / "out"]
    value = result_of("prune", place / "tiny", *asked)
    whole, tokens = ls.load(place / "tiny").model, tokens_of(place)
    meant = ls.prune(whole, tokens, remove=2, by=by, greedy=greedy)
    assert value["layers"] == list(meant.layers)
    if by != "angular":
        assert 1 in value["layers"]
        assert 4 not in value["layers"]
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.num_hidden_layers == DEPTH - 2
    found = ls.compare(whole, pruned, tokens)
    assert value["after"]["kl_nats"] == pytest.approx(found.kl_nats, abs=1e-6)
    assert value["after"]["agreement"] == pytest.approx(found.agreement)
    for model, numbers in ((whole, value["before"]), (pruned, value["after"])):
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(tokens)[:, 1:].flatten())
        assert numbers["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "layersurgery" in card
    results = tmp_path / "out-results"
    drawn = " ".join(path.read_text("utf-8") for path in results.rglob("*.svg"))
    assert "story.txt" in drawn
    for shown in (card, drawn):  # others read them, so they say nothing of this machine
        assert str(place) not in shown
        assert str(tmp_path) not in shown
    assert {file.name for file in results.iterdir()} == {"rank", "costs", *(["step-01", "step-02"] if greedy else [])}
    costs = ls.read_results(results / "costs")
    assert set(costs.criterion) == {"unedited", "kl", "influence", "angular", *(["greedy"] if greedy else [])}
    pd.testing.assert_frame_equal(
        costs.drop(columns="model"),
        meant.costs.drop(columns="model")[costs.columns.drop("model")],
        check_exact=False,
        atol=1e-6,
    )
    assert (results / "costs" / "costs.png").exists()


def test_what_a_person_sees(place: Path, tmp_path: Path) -> None:
    found = run("prune", place / "tiny", *words(place), "--remove", 1, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    assert "Removed layer 1 (criterion: KL, measured one layer at a time)" in found.stdout
    assert "Perplexity" in found.stdout
    assert f"measurements are in {tmp_path / 'out-results'}: costs/costs.png, costs/costs.svg, rank/" in found.stdout
    assert "nats, top-1 agreement " in found.stdout
    table = found.stdout.splitlines()[:5]
    assert table[0].split() == ["layers", "kl", "influence", "angular"]
    assert table[1].split() == ["removed", *["KL", "ppl."] * 3]
    assert [line.split()[0] for line in table[2:4]] == ["0", "1"]
    assert "…" not in found.stdout


def test_what_was_measured_is_used_again_and_nothing_is_lost(place: Path, tmp_path: Path) -> None:
    asked = ["prune", place / "tiny", *words(place), "--remove", 1, "--greedy", "-o", tmp_path / "out"]
    first = result_of(*asked)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out-results").rglob("*.parquet")}
    there = run(*asked)
    assert there.exit_code == 1
    assert "exists" in there.stderr
    again = result_of(*asked, "--overwrite")
    assert (again["layers"], again["after"]) == (first["layers"], first["after"])
    assert {file: file.stat().st_mtime_ns for file in files} == files
    # One more layer: what was measured for one is used, and only what is new is measured.
    more = result_of(
        "prune", place / "tiny", *words(place), "--remove", 2, "--greedy", "-o", tmp_path / "out", "--overwrite"
    )
    assert more["layers"][:1] == first["layers"]
    assert (tmp_path / "out-results" / "step-01" / "step.parquet").stat().st_mtime_ns == files[
        tmp_path / "out-results" / "step-01" / "step.parquet"
    ]


def test_stopped_it_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["prune", place / "tiny", *words(place), "--remove", 2, "--greedy", "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        from layersurgery.analyses import prune_run

        def stop(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(prune_run, "CostMeasurement", stop)
        assert run(*asked).exit_code == 130
    assert not (tmp_path / "out").exists()
    steps = [tmp_path / "out-results" / f"step-0{number}" / "step.parquet" for number in (1, 2)]
    written = [file.stat().st_mtime_ns for file in steps]
    assert result_of(*asked)["layers"]
    assert [file.stat().st_mtime_ns for file in steps] == written


def test_stopped_between_two_measurements_it_says_what_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("layersurgery.analyses.prune_run.read_results", stop)
    found = run("prune", place / "tiny", *words(place), "--remove", 1, "-o", tmp_path / "out")
    assert found.exit_code == 130
    assert f"results so far are in {tmp_path / 'out-results'}" in "".join(found.stderr.splitlines())


def test_the_cost_is_estimated_without_weights(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((place / "tiny" / "config.json").read_text("utf-8"), "utf-8")
    text = ["-n", 120, "--context", 30]
    meant = result_of("sweep", tmp_path, "--edits", "drop", *text, "--estimate")
    assert result_of("rank", tmp_path, *text, "--estimate")["flops"] == meant["flops"]
    shown = run("prune", tmp_path, *text, "--remove-branches", 2, "--keep", "0:2", "--greedy", "--estimate")
    assert shown.exit_code == 0, shown.stderr
    assert f"{2 * (DEPTH - 2)} edited models" in shown.stdout
    assert "; at most, since a race" in shown.stdout
    assert "After each removal, those that remain are measured again" in shown.stdout
    assert "at least" in run("prune", tmp_path, *text, "--remove", 2, "--no-race", "--estimate").stdout
    refused = run("prune", tmp_path, *text, "--remove", DEPTH, "--estimate")
    assert (refused.exit_code, f"give 1 to {DEPTH - 1}" in refused.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_order_of_the_text_is_spoken_of_only_where_a_race_can_end(place: Path, tmp_path: Path) -> None:
    """A race waits for 16 sequences; 120 tokens are 4 of 30 tokens, or 20 of 6."""
    asked = ("prune", place / "tiny", *words(place), "--remove", 1, "--greedy", "--overwrite", "-o", tmp_path / "out")
    note = "its order is random (--shuffle)"
    assert note not in run(*asked).stderr
    assert note in run(*asked, "--context", 6).stderr


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (["--remove", 0], 2, "should be greater than or equal to 1"),
        (["--remove", DEPTH], 2, f"cannot remove {DEPTH} of {DEPTH} layers; give 1 to {DEPTH - 1}"),
        (["--remove", 1, "--by", "size"], 2, "kl, influence"),
        ([], 2, "give one of --remove, --remove-attention, --remove-mlp, --remove-branches and --budget"),
        (["--remove", 1, "--remove-mlp", 1], 2, "found --remove and --remove-mlp"),
        (["--remove", 1, "--of", "mlp"], 2, "--of says what a budget removes; --remove says it by itself"),
        (["--remove", 1, "--by", "second-order"], 2, "it was tried and not kept"),
        (["--budget", "params=0%"], 2, "cannot read the budget 'params=0%'"),
        (["--remove", DEPTH - 1, "--keep", "-2:"], 2, "and keep 2 of them; give 1 to 4"),
        (["--remove-branches", 1, "--by", "influence", "--greedy"], 2, "a greedy choice of branches by influence"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_measured(
    place: Path, tmp_path: Path, asked: list[Any], code: int, said: str
) -> None:
    found = run("prune", place / "tiny", *words(place), *asked, "-o", tmp_path / "out")
    assert found.exit_code == code, found.stderr
    assert said in " ".join(found.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_choose_the_same(place: Path, tmp_path: Path) -> None:
    asked = ["prune", place / "tiny", *words(place), "--remove", 1, "--greedy", "--device", "cpu"]
    alone = result_of(*asked, "-o", tmp_path / "alone")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "layersurgery_cli",
    ]
    both = subprocess.run(
        [*launch, *map(str, asked), "-o", str(tmp_path / "both"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert both.returncode == 0, both.stderr
    found = json.loads(both.stdout[both.stdout.index("{") :])
    assert found["layers"] == alone["layers"]
    np.testing.assert_allclose(found["after"]["kl_nats"], alone["after"]["kl_nats"], rtol=1e-6)
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()


def test_branches_are_ranked_and_pruned_as_in_python(place: Path, tmp_path: Path) -> None:
    """The second block adds next to nothing, so its two branches are the first to go."""
    value = result_of("rank", place / "tiny", *words(place), "--of", "branches", "-o", tmp_path / "ranks")
    ranks = ls.read_results(tmp_path / "ranks").set_index(["layer", "part"]).kl_rank
    assert {ranks[1, "attention"], ranks[1, "mlp"]} == {1, 2}
    assert set(ls.read_results(tmp_path / "ranks", "parts").part) == {"block", "attention", "mlp"}
    assert "measured one branch at a time" in value["summary"]
    assert (tmp_path / "ranks" / "rank.png").exists()
    asked = ["prune", place / "tiny", *words(place), "--remove-branches", 3, "--keep", "0,-1"]
    shown = run(*asked, "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "measured one branch at a time" in text
    assert "in this checkpoint if a program skips the branches" in text
    assert "A skipped branch stays in the checkpoint, with output weights of zero; programs compute it" in text
    again = result_of(*asked, "-o", tmp_path / "out", "--overwrite")
    meant = ls.prune(ls.load(place / "tiny").model, tokens_of(place), remove_branches=3, keep=[0, -1])
    assert (again["layers"], again["parts"]) == ([*meant.layers], [part.name for part in meant.parts])
    assert again["plan"] == str(meant.plan)
    assert str(meant.plan).startswith("drop 1; skip-")
    saved = again["saved"]
    assert 0 < saved["parameters_saved"] < saved["parameters_saved_if_skipped"] < saved["parameters_of_blocks"]
    assert {file.name for file in (tmp_path / "out-results").iterdir()} == {"rank-branches", "costs"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == DEPTH - 1


@pytest.mark.slow
def test_a_budget_of_branches_and_kept_layers_of_a_search(place: Path, tmp_path: Path) -> None:
    budget = ["--budget", "kv-cache=30%", "--of", "attention", "--greedy"]
    shown = run("prune", place / "tiny", *words(place), *budget, "--results", tmp_path / "r", "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "Removed the attention of layers 1, " in text
    assert "cache per token 0 bytes (0.0 %) 256 bytes (33.3 %)" in text
    assert text.startswith("branches kl ")
    assert {file.name for file in (tmp_path / "r").iterdir()} == {"rank-attention", "step-01", "step-02", "costs"}
    asked = ["search", place / "tiny", *words(place), "--remove", 2, "--results", tmp_path / "search"]
    assert 1 in ls.Route.parse(result_of(*asked, "--keep", 1)["route"]).blocks  # it would be the first to go

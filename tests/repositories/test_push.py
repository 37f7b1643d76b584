"""Pushing and fetching, against a server on this machine that speaks the Hub's protocol.

The real Hub is not used. Large files go through the LFS protocol; xet, which the Hub prefers, is not exercised.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pandas as pd
import pytest
from huggingface_hub import constants, metadata_load

import layersurgery as ls
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.repositories.hub_errors import check_push
from tests.support.hub_double import Hub, Repository
from tests.support.tiny_checkpoint import checkpoint

TEXT = ["Once upon a time there was a model with layers."] * 8


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    return ls.edit_checkpoint(checkpoint(tmp_path / "tiny"), "drop 2", tmp_path / "pruned").path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    ls.sweep(checkpoint(path / "tiny"), ["swap", "drop"], TEXT, directory=path / "out", context=20)
    return path / "out"


def test_a_checkpoint_becomes_a_model_repository_with_all_its_bytes(hub: Hub, pruned: Path) -> None:
    pushed = ls.push(pruned, "me/pruned")
    repository = hub.repositories["models", "me/pruned"]
    assert repository.files == {path.name: path.read_bytes() for path in pruned.iterdir()}
    assert repository.private
    assert "model.safetensors" in repository.large
    assert pushed.files == {name: len(content) for name, content in repository.files.items()}
    assert (pushed.private, pushed.commit) == (True, repository.sha)
    assert pushed.url == f"{hub.url}/me/pruned"


def test_an_existing_repository_gets_one_commit_and_keeps_its_other_files(hub: Hub, pruned: Path) -> None:
    ls.push(pruned, "me/pruned")
    repository = hub.repositories["models", "me/pruned"]
    repository.files["NOTES.md"] = b"by hand"
    (pruned / "config.json").write_text((pruned / "config.json").read_text() + "\n")
    before = hub.requests.count("POST /api/models/me/pruned/commit/main")
    ls.push(pruned, "me/pruned", message="again")
    assert repository.files["NOTES.md"] == b"by hand"
    assert repository.files["config.json"] == (pruned / "config.json").read_bytes()
    assert repository.commits[1:] == ["again"]
    assert hub.requests.count("POST /api/models/me/pruned/commit/main") == before + 1


def test_weights_that_would_hide_the_new_ones_are_refused(hub: Hub, pruned: Path) -> None:
    ls.push(pruned, "me/pruned")
    hub.repositories["models", "me/pruned"].files["pytorch_model.bin"] = b"old"
    with pytest.raises(ls.OutputError, match=r"weights that this checkpoint does not replace \(pytorch_model.bin\)"):
        ls.push(pruned, "me/pruned")


def test_what_was_sent_before_an_upload_broke_off_is_not_sent_again(hub: Hub, sharded: Path) -> None:
    large = [path for path in sharded.iterdir() if path.stat().st_size > 4096]
    assert len(large) > 2
    hub.most_objects = 1
    with pytest.raises(ls.OutputError, match="Error while uploading .*: the upload broke off"):
        ls.push(sharded, "me/sharded")
    repository = hub.repositories["models", "me/sharded"]
    assert not repository.files  # nothing is seen of half an upload
    sent = len(hub.objects)
    assert sent
    hub.requests.clear()
    hub.most_objects = None
    ls.push(sharded, "me/sharded")
    assert sum(request.startswith("PUT") for request in hub.requests) == len(large) - sent
    assert set(repository.files) == {path.name for path in sharded.iterdir()}


def test_a_repository_that_everybody_can_read_must_be_asked_for(hub: Hub, pruned: Path) -> None:
    assert not ls.push(pruned, "me/open", public=True).private
    assert not hub.repositories["models", "me/open"].private
    with pytest.raises(ls.OutputError, match="me/open exists and is public"):
        ls.push(pruned, "me/open")
    ls.push(pruned, "me/closed")
    with pytest.warns(LayerSurgeryWarning, match="me/closed is private, and stays private"):
        assert ls.push(pruned, "me/closed", public=True).private


def test_results_come_back_as_they_were(hub: Hub, results: Path, tmp_path: Path) -> None:
    with pytest.warns(LayerSurgeryWarning, match="name the model by its path"):
        pushed = ls.push(results, "me/results")
    assert pushed.kind == "dataset"
    fetched = ls.fetch_results("me/results", tmp_path / "fetched")
    pd.testing.assert_frame_equal(ls.read_results(fetched), ls.read_results(results))
    for path in results.iterdir():
        if path.name != "run.json":
            assert (fetched / path.name).read_bytes() == path.read_bytes(), path
    assert ls.report(fetched, tmp_path / "again.html").runs == [fetched]
    assert str(results.parent) not in (fetched / "run.json").read_text()


def test_the_cards_tables_are_what_datasets_reads(hub: Hub, results: Path, tmp_path: Path) -> None:
    with pytest.warns(LayerSurgeryWarning):
        ls.push(results, "me/results")
    fetched = ls.fetch_results("me/results", tmp_path / "fetched")
    card = metadata_load(fetched / "README.md")
    names = [config["config_name"] for config in card["configs"]]
    assert names[0] == "results"
    assert card["configs"][0]["default"] is True
    for name in names:
        # The directory is read by the same card as the repository is.
        table = datasets.load_dataset(str(fetched), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert table.num_rows == len(pd.read_parquet(results / f"{name}.parquet"))
    assert 'load_dataset("me/results", "results"' in (fetched / "README.md").read_text()


def test_several_runs_are_pushed_together_and_nothing_beside_them(hub: Hub, results: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(results, tmp_path / "both" / name)
    (tmp_path / "both" / "letter.csv").write_text("private")
    (tmp_path / "both" / "first" / "keys.json").write_text("private")
    (tmp_path / "both" / "other").mkdir()
    (tmp_path / "both" / "other" / "picture.png").write_bytes(b"private")
    with pytest.warns(LayerSurgeryWarning):
        files = ls.push(tmp_path / "both", "me/both").files
    assert {name.partition("/")[0] for name in files} == {"first", "second", "report.html", "README.md"}
    assert "first/keys.json" not in files
    fetched = ls.fetch_results("me/both", tmp_path / "fetched")
    assert [config["config_name"] for config in metadata_load(fetched / "README.md")["configs"]][:2] == [
        "first-results", "second-results"
    ]  # fmt: skip
    assert ls.report(fetched, tmp_path / "page.html").runs == [fetched / "first", fetched / "second"]


def test_results_with_tasks_inside_come_back_whole(hub: Hub, tmp_path: Path) -> None:
    pairs = ls.tasks.requests([("Once upon", " a time"), ("a time there", " was")])
    model = checkpoint(tmp_path / "tiny")
    ls.sweep(model, "drop", TEXT, tasks=pairs, directory=tmp_path / "out", context=20)
    with pytest.warns(LayerSurgeryWarning):
        ls.push(tmp_path / "out", "me/tasks")
    fetched = ls.fetch_results("me/tasks", tmp_path / "fetched")
    expected = ls.read_results(tmp_path / "out", "requests")
    pd.testing.assert_frame_equal(ls.read_results(fetched, "requests"), expected)


def test_tables_whose_names_differ_in_signs_only_have_configurations_of_their_own(
    hub: Hub, results: Path, tmp_path: Path
) -> None:
    for name in ("lr 1", "lr_1"):
        shutil.copytree(results, tmp_path / "both" / name)
    with pytest.warns(LayerSurgeryWarning):
        ls.push(tmp_path / "both", "me/both")
    configs = metadata_load(ls.fetch_results("me/both", tmp_path / "fetched") / "README.md")["configs"]
    files = {config["config_name"]: config["data_files"] for config in configs}
    assert len(files) == len(configs)
    assert {files["lr_1-results"], files["lr_1-results-2"]} == {"lr 1/results.parquet", "lr_1/results.parquet"}


def test_a_dry_run_uses_no_network(hub: Hub, pruned: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert set(ls.push(pruned, "me/pruned", dry_run=True).files) == {path.name for path in pruned.iterdir()}
    files = ls.push(results, "me/results", dry_run=True).files
    assert {"results.parquet", "run.json", "report.html", "README.md"} <= set(files)
    assert not any(name.startswith("sums.parts") for name in files)
    assert not hub.requests


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"HF_TOKEN": "", "HF_TOKEN_PATH": "nowhere"}, "there is no token on this machine; run: hf auth login"),
        ({"HF_TOKEN": "hf_wrong"}, r"does not accept the token \(401\)"),
        ({"HF_TOKEN": "hf_read"}, "the token of me can only read"),
        ({"OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, setting: dict[str, str], words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", setting.get("HF_TOKEN", "hf_write"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", setting.get("HF_TOKEN_PATH", constants.HF_TOKEN_PATH))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "OFFLINE" in setting)
    monkeypatch.setattr(constants, "ENDPOINT", setting.get("ENDPOINT", hub.url))
    with pytest.raises(ls.OutputError, match=words):
        check_push("me/name")


def test_what_the_hub_refuses_is_said(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(ls.OutputError, match=r"the token may not do this \(403: .*namespace you"):
        ls.push(pruned, "you/pruned")
    hub.forbidden = True
    with pytest.raises(ls.OutputError, match=r"403: .*use a token that can write to me"):
        ls.push(pruned, "me/pruned")
    with pytest.raises(ls.SourceError, match="cannot fetch me/nothing: the Hub has no such repository"):
        ls.fetch_results("me/nothing", tmp_path / "out")
    hub.repositories["datasets", "me/texts"] = Repository(private=True, files={"texts.csv": b"text\nOnce"})
    with pytest.raises(ls.SourceError, match="me/texts is not a repository of results: it has no run.json"):
        ls.fetch_results("me/texts", tmp_path / "out")
    assert not any("texts.csv" in str(request) for request in hub.requests), "other datasets may be terabytes"
    assert not (tmp_path / "out").exists()


def test_other_directories_and_names_are_refused(pruned: Path, results: Path, tmp_path: Path) -> None:
    with pytest.raises(ls.PlanError, match="'pruned' is not the name of a repository"):
        ls.push(pruned, "pruned")
    with pytest.raises(ls.SourceError, match=r"is neither a checkpoint \(it has no config.json\) nor results"):
        ls.push(tmp_path, "me/name", dry_run=True)
    begun = tmp_path / "begun"
    begun.mkdir()
    facts = json.loads((results / "run.json").read_text()) | {"state": "begun"}
    (begun / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ls.SourceError, match="no finished run"):
        ls.push(begun, "me/name", dry_run=True)
    (pruned / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ls.OutputError, match="the metadata at the top of .* is not valid"):
        ls.push(pruned, "me/name", dry_run=True)
    with pytest.raises(ls.OutputError, match="exists already"):
        ls.fetch_results("me/name", results)


def test_results_that_are_too_many_for_a_page_are_pushed_without_one(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layersurgery.reports.report._MAX_BYTES", 1000)
    with pytest.warns(LayerSurgeryWarning, match="no report.html is uploaded: a page about 1 runs would have"):
        pushed = ls.push(results, "me/results", dry_run=True)
    assert "report.html" not in pushed.files
    assert "results.parquet" in pushed.files


def test_results_that_would_hide_the_new_ones_are_refused(hub: Hub, results: Path, tmp_path: Path) -> None:
    ls.push(results, "me/results")
    shutil.copytree(results, tmp_path / "several" / "first")
    before = dict(hub.repositories["datasets", "me/results"].files)
    with pytest.raises(ls.OutputError, match=r"has results that these do not replace \(run.json\)"):
        ls.push(tmp_path / "several", "me/results")
    assert hub.repositories["datasets", "me/results"].files == before
    ls.push(results, "me/results")  # the same run again
    hub.repositories["datasets", "me/results"].files["stages.parquet"] = b"of another run"
    with pytest.raises(ls.OutputError, match=r"has results that these do not replace \(stages.parquet\)"):
        ls.push(results, "me/results")


def test_results_inside_what_is_pushed_stay_on_this_machine(pruned: Path, results: Path, tmp_path: Path) -> None:
    run = shutil.copytree(results, tmp_path / "run")
    for directory in (pruned, run):
        before = set(ls.push(directory, "me/name", dry_run=True).files)
        shutil.copytree(results, directory / "measured")
        assert set(ls.push(directory, "me/name", dry_run=True).files) == before

"""`layersurgery sweep` and `layersurgery plot`, as a person at a terminal uses them."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import rich.console
from layersurgery_cli.terminal.charts import number_cell

import layersurgery as ls
from layersurgery.registry import METRICS
from layersurgery.sweeps.map_sentences import describe_maps
from tests.cli.test_cli import COMMAND, result_of, run
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import tiny_model, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(60)))
    return path


@pytest.fixture
def small(model: Path, story: Path, tmp_path: Path) -> list[Any]:
    return ["sweep", model, "--data", story, "-n", 120, "--context", 30, "-o", tmp_path / "out"]


def test_what_maps_show_is_said(small: list[Any], tmp_path: Path) -> None:
    value = result_of(*small, "--edits", "jump", "--layers", "2:4")
    said = describe_maps(ls.read_results(tmp_path / "out"))
    assert value["maps"] == said
    assert len(said) == 3
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"jump"}
    shown = " ".join(run(*small, "--edits", "jump", "--layers", "2:4").stdout.split())
    assert all(f"{sentence[0].upper()}{sentence[1:]}" in shown for sentence in said)


def test_a_small_kl_is_shown_as_a_power_of_ten() -> None:
    kl, agreement = METRICS[:2]
    assert [number_cell(value, kl) for value in (0.0, 4.2e-5, 0.0006, 1.5)] == ["0.000", "4e-05", "0.001", "1.500"]
    assert number_cell(1e-5, agreement) == "0.0 %"


def test_a_sweep_on_text_of_ones_own(small: list[Any], model: Path, story: Path, tmp_path: Path) -> None:
    value = result_of(*small)
    frame = ls.read_results(tmp_path / "out")
    assert value["path"] == str(tmp_path / "out")
    assert [row["plan"] for row in value["results"]] == list(frame.plan)
    assert value["results"][3]["kl_nats"] == pytest.approx(frame.kl_nats[3], abs=1e-12)
    assert value["summary"] == ls.summary_sentence(frame)
    ids = tiny_tokenizer()(story.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:120]
    loaded = ls.load(model).model
    meant = ls.sweep(loaded, "swap,drop", [ids[start : start + 30] for start in range(0, 120, 30)])
    numbers = meant.select_dtypes("number").columns
    pd.testing.assert_frame_equal(frame[numbers], meant[numbers], check_exact=False, atol=1e-6)
    assert value["text"]["tokens"] == 120
    assert value["schedule"] == {
        "order": "depth-first",
        "block_calls": 36,
        "block_calls_apart": 66,
        "bytes_read_a_batch": 0,
    }


def test_what_a_person_sees(small: list[Any], tmp_path: Path) -> None:
    found = run(*small, "--edits", "swap,drop,skip-mlp,swap-pairs")
    assert found.exit_code == 0
    for words in (
        "120 tokens in 4 sequences of 30",
        "parameters in float32 on cpu",
        "block calls per batch",
        "without sharing",
        "of memory for 4 sequences",
    ):
        assert words in found.stderr, words
    shown = found.stdout
    for words in (
        "Unedited: loss",
        "agree",
        "█",
        "skip-mlp agree",
        "predictions under swap",
        "Wrote",
        "results.parquet",
    ):
        assert words in shown, words
    header = next(line for line in shown.splitlines() if "skip-mlp" in line)
    assert header.split() == ["swap", "drop", "skip-mlp"]
    assert all(len(line) <= 100 for line in found.stdout.splitlines() if "█" in line)
    again = run(*small, "--edits", "swap,drop,skip-mlp,swap-pairs")
    assert again.exit_code == 0
    assert "Using the finished run in" in again.stderr
    assert again.stdout == found.stdout
    quiet = run(*small, "--edits", "swap,drop,skip-mlp,swap-pairs", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_tails_have_a_table_of_their_own(small: list[Any], model: Path, story: Path, tmp_path: Path) -> None:
    found = run(*small, "--edits", "drop", "--layers", "1:3", "--tails")
    assert found.exit_code == 0, found.stderr
    head, *rows = found.stdout.partition("Tails: ")[2].splitlines()[1:4]
    assert head.split()[:8] == ["plan", "KL", "median", "90", "%", "99", "%", "99.9"]
    frame = ls.read_results(tmp_path / "out")
    shown = {" ".join(row.split()[:2]): row.split()[2:8] for row in rows}
    columns = ["kl_nats", "kl_nats_median", "kl_nats_p90", "kl_nats_p99", "kl_nats_p99_9", "kl_nats_max"]
    for _, row in frame[frame.edit == "drop"].iterrows():
        assert shown[row.plan] == [f"{row[name]:.3f}" for name in columns]
    same = ("--data", story, "-n", 120, "--context", 30, "--tails")
    compared = json.loads(run("compare", model, "drop 2", *same, "--json").stdout)
    of_sweep = frame[frame.plan == "drop 2"].iloc[0]
    assert {name: compared[name] for name in columns} == pytest.approx(of_sweep[columns].to_dict(), abs=1e-5)


def test_plans_of_ones_own_and_rows_for_each_token(small: list[Any], tmp_path: Path) -> None:
    (tmp_path / "plans.txt").write_text("shallow: drop 3:5  # two\nrepeat 2; swap 0 1\n")
    value = result_of(*small, "--plans", tmp_path / "plans.txt", "--per-token")
    assert [(row["edit"], row["name"], row["plan"], row["layer"]) for row in value["results"]] == [
        ("none", "unedited", "", None),
        ("plan", "shallow", "drop 3:5", 3),
        ("plan", "repeat 2; swap 0 1", "repeat 2; swap 0 1", 2),
    ]
    each = pd.read_parquet(tmp_path / "out" / "tokens.parquet")
    assert len(each) == 3 * 4 * 29
    assert "".join(each[(each.row == 0) & (each.sequence == 0)].token) == "Once upon a time there were 0"
    assert (tmp_path / "out" / "plans.png").exists()
    both = result_of(
        *small, "--plans", tmp_path / "plans.txt", "--edits", "drop-span:3", "--layers", "1:5", "--overwrite"
    )
    assert [row["edit"] for row in both["results"]] == ["none", "drop-span", "drop-span", "plan", "plan"]
    assert not (tmp_path / "out" / "tokens.parquet").exists()


def test_changed_arguments_are_refused(small: list[Any], story: Path) -> None:
    assert run(*small, "--edits", "drop").exit_code == 0
    for more, words in {
        ("--edits", "swap"): "edits differ",
        ("--edits", "drop", "--dtype", "bfloat16"): "dtype float32 there, bfloat16 now",
        ("--edits", "drop", "--context", "20"): "--context 30 there, 20 now",
        ("--edits", "drop", "-b", "1"): "--batch-size nothing there, 1 now",
    }.items():
        found = run(*small, *more)
        assert found.exit_code == 1
        assert words in found.stderr
        assert "Replace it to start again (--overwrite)" in found.stderr
    before = story.read_text(encoding="utf-8")
    try:
        story.write_text(before.upper(), encoding="utf-8")
        found = run(*small, "--edits", "drop")
    finally:
        story.write_text(before, encoding="utf-8")
    assert found.exit_code == 1
    assert "text fingerprint" in found.stderr


def test_another_models_tokenizer(small: list[Any], model: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    bare = [*small[:1], tmp_path / "bare", *small[2:]]
    found = run(*bare)
    assert (found.exit_code, "has no tokenizer; name a model that has one (--tokenizer)" in found.stderr) == (
        1,
        True,
    )
    assert not (tmp_path / "out").exists()
    assert result_of(*bare, "--tokenizer", model)["text"]["tokens"] == 120
    tiny_model("llama", vocab_size=20).save_pretrained(tmp_path / "few")
    few = run("sweep", tmp_path / "few", *small[2:-1], tmp_path / "other", "--tokenizer", model)
    assert (few.exit_code, "the model's vocabulary has 20 tokens: this is another model's tokenizer" in few.stderr) == (
        1,
        True,
    )


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--edits", "swop"], 2, "unknown family of edits 'swop'; did you mean 'swap'"),
        (["--edits", "drop-span"], 2, "write drop-span:4"),
        (["--edits", "drop-span:6"], 2, "removes all 6 blocks; keep at least one"),
        (["--layers", "4:9"], 2, "the range 4:9 is out of range: the model has 6 blocks"),
        (["--layers", "4"], 2, "--layers takes one half-open range"),
        (["--tokens", "lots"], 2, "'lots' is not a number of tokens"),
        (["--context", "65"], 2, "context 65 is more than the model's 64 positions"),
        (["--context", "1"], 2, "Invalid value for '--context'"),
        (["--dtype", "float12"], 2, "float12"),
        (["--device", "warp"], 1, "device warp cannot be used"),
        (["--plans", "gone.txt"], 2, "cannot read the plans in gone.txt"),
        (["--data", "gone.txt"], 1, "gone.txt does not exist on this machine"),
        (["--data", "someone/nowhere"], 1, "cannot read the dataset someone/nowhere"),
        (["--tokenizer", "/nowhere"], 1, "/nowhere does not exist on this machine"),
        (["--revision", "main"], 1, "only Hub models have revisions"),
        (["--blocks", "model.nothing"], 1, "blocks='model.nothing' is not the path of a list"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_model_is_loaded(
    small: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], code: int, words: str
) -> None:
    if "--blocks" not in more:
        monkeypatch.setattr("layersurgery.checkpoints.loading.load", lambda *_, **__: pytest.fail("loaded"))
    found = run(*small, *more)
    assert found.exit_code == code
    assert words in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_not_there(small: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n')
    found = run(*small, "--data", tmp_path / "a.jsonl")
    assert (found.exit_code, "or 'conversation'; it has body" in " ".join(found.stderr.split())) == (1, True)
    found = run(*small, "--data", tmp_path / "a.jsonl", "--column", "body")
    assert found.exit_code == 0
    assert "the text is too short: it has 10 tokens of the 120 requested" in found.stderr


def test_drawing_several_sweeps_together(small: list[Any], model: Path, tmp_path: Path) -> None:
    assert run(*small).exit_code == 0
    other = checkpoint(tmp_path / "other", num_hidden_layers=9)
    assert run("sweep", other, *small[2:-1], tmp_path / "second").exit_code == 0
    value = result_of("plot", tmp_path / "out", tmp_path / "second", "-o", tmp_path / "drawn")
    assert value["figures"] == [str(tmp_path / "drawn" / f"robustness.{kind}") for kind in ("png", "svg")]
    svg = (tmp_path / "drawn" / "robustness.svg").read_text()
    assert ">tiny<" in svg
    assert ">other<" in svg
    found = run("plot", tmp_path / "drawn")
    assert (
        found.exit_code,
        "contains no results: give a directory that `layersurgery sweep`, `analyze` or `stages` wrote" in found.stderr,
    ) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_hand_it_says_how_to_go_on(
    model: Path, story: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    words = ["sweep", model, "--data", story, "-n", "2000", "--context", "20", "-b", "1", "-o", tmp_path / "out"]
    command = [*COMMAND, *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    journal = tmp_path / "out" / "sums.parts"
    for _ in range(2400):  # other tests run at the same time
        if process.poll() is not None or len(list(journal.glob("*.npz"))) > 1:
            break
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    if stop == signal.SIGTERM:
        return
    found = run(*words)
    assert found.exit_code == 0
    assert "Resuming from the results measured so far" in found.stderr
    done = ls.read_results(tmp_path / "out")
    assert run(*words[:-1], tmp_path / "whole").exit_code == 0
    pd.testing.assert_frame_equal(done, ls.read_results(tmp_path / "whole"), check_exact=True)


def test_json_is_all_there_is_on_stdout(small: list[Any]) -> None:
    found = subprocess.run([*COMMAND, *map(str, small), "--json", "--edits", "drop"], capture_output=True, text=True)
    assert found.returncode == 0
    assert json.loads(found.stdout)["finished"]
    assert "Loading" in found.stderr


@pytest.mark.parametrize(("terminal", "quiet", "tables"), [(True, False, 3), (False, False, 1), (True, True, 0)])
def test_the_table_of_a_running_sweep_is_made_only_when_it_is_shown(
    terminal: bool, quiet: bool, tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making it takes a tenth of a second, in which a GPU would wait."""
    from layersurgery_cli.terminal import progress as progress_module
    from layersurgery_cli.terminal.console import Console

    from layersurgery.runs.runner import Progress

    now, made = 0.0, 0
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now))
    console = Console(quiet=quiet)
    console.err = rich.console.Console(file=io.StringIO(), force_terminal=terminal, quiet=quiet)

    def table() -> pd.DataFrame:
        nonlocal made
        made += 1
        frame = pd.DataFrame({"edit": ["none", "drop"], "name": ["unedited", "drop 1"], "sequences": 8})
        metrics = {"kl_nats": [0.0, 1.0], "agreement": [1.0, 0.5]}
        ends = {f"{name}{end}": values for name, values in metrics.items() for end in ("_low", "_high")}
        return frame.assign(**metrics, **ends)

    text: Any = SimpleNamespace(tokens=100, ids=[0] * 100, noun="sequence")
    with progress_module.progress_bar(text, console) as on_progress:
        on_progress(Progress(0, 100))
        for batch in range(1, 32):  # 31 seconds
            now = float(batch)
            on_progress(Progress(batch, 100, table if batch in (1, 2, 30) else None))
    assert made == tables


def test_the_table_of_a_running_sweep_has_the_slowest_edit_first() -> None:
    from layersurgery_cli.terminal.live_table import live_table

    from layersurgery.sweeps.precision import Precision

    frame = ls.sweep(tiny_model("llama"), "drop", tokens(64, 12), until="kl=16%", batch_size=8)
    assert set(frame.precise[1:]) == {True, False}
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(live_table(frame, 4, Precision.parse("kl=16%")))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split() == ["edit", "KL", "agree", "sequences", "more"]
    slowest = ((frame.kl_nats_high - frame.kl_nats_low) / frame.kl_nats)[~frame.precise.fillna(True).astype(bool)]
    row = frame.loc[slowest.idxmax()]
    half = (row.kl_nats_high - row.kl_nats_low) / 2
    assert lines[1].startswith(f"{row['name']}  {row.kl_nats:.3f} ± {half:.3f}")
    assert f"~{math.ceil(64 * (half / row.kl_nats / 0.16) ** 2 - 64)}" in lines[1]
    assert lines[-1].strip() == "and 2 more"


def test_a_sweep_until_it_is_precise_goes_on_with_more(small: list[Any], tmp_path: Path) -> None:
    words = [*small, "--edits", "drop", "--tokens", "2400", "-b", "2", "-o", tmp_path / "out"]
    loose = run(*words, "--until", "kl=10%")
    assert loose.exit_code == 0, loose.stderr
    assert "edits are known as precisely as asked" in loose.stdout
    assert "% of the block calls that all the text takes" in loose.stdout
    first = ls.read_results(tmp_path / "out")
    assert run(*words, "--until", "kl=10%").exit_code == 0
    tight = run(*words, "--until", "kl=5%")
    assert tight.exit_code == 0
    assert "Resuming from the results measured so far" in tight.stderr
    second = ls.read_results(tmp_path / "out")
    assert second.sequences.sum() > first.sequences.sum()
    assert run(*words[:-1], tmp_path / "fresh", "--until", "kl=5%").exit_code == 0
    pd.testing.assert_frame_equal(second, ls.read_results(tmp_path / "fresh"), check_exact=True)
    everything = run(*words)
    assert everything.exit_code == 0
    assert run(*words[:-1], tmp_path / "whole").exit_code == 0
    pd.testing.assert_frame_equal(
        ls.read_results(tmp_path / "out"), ls.read_results(tmp_path / "whole"), check_exact=True
    )
    assert not (tmp_path / "out" / "sums.parts").exists()
    # What all text says is as precise as the text allows.
    assert "Using the finished run in" in run(*words, "--until", "kl=5%").stderr


def test_a_wrong_precision_is_a_usage_error(small: list[Any]) -> None:
    found = run(*small, "--until", "klo=1%")
    assert found.exit_code == 2
    assert "did you mean kl?" in found.stderr

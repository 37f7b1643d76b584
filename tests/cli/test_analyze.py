"""`layersurgery analyze`, `stages` and `plot` of what they wrote, as a person at a terminal uses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from layersurgery_cli.commands.measure import run_analysis
from layersurgery_cli.terminal.console import Console
from matplotlib.figure import Figure
from PIL import Image

import layersurgery as ls
from layersurgery.analyses.outcomes import AnalysisOutput
from layersurgery.analyses.signal_tables import make_measurer
from layersurgery.figures.signals import draw_columns
from layersurgery.figures.style import ModelTables
from layersurgery.registry import ANALYSES, Analysis, Column
from layersurgery.runs.drawing import model_tables
from layersurgery.runs.options import RunOptions
from layersurgery.runs.run_directory import ANALYSIS, Run, open_run
from layersurgery.runs.session import ModelSession
from layersurgery.runs.single_step import TablesAndFacts, run_once
from tests.cli.test_cli import result_of, run
from tests.runs.test_runs import StopError, text
from tests.support.measure_run import run_measurement
from tests.support.tiny_checkpoint import checkpoint, tiny_tokenizer
from tests.support.zoo import DEPTH, slow, tiny_model

TABLES = ["stages", "lens", "attention", "norms", "similarity", "drop", "neurons"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and, in "stages", what `stages` makes of them."""
    path = tmp_path_factory.mktemp("analyze")
    checkpoint(path / "tiny", "gpt2")
    (path / "story.txt").write_text("".join(f"Once upon a time there were {number} layers.\n" for number in range(60)))
    assert result_of("stages", path / "tiny", *words(path), "-o", path / "stages")["finished"]
    return path


def words(path: Path) -> list[Any]:
    return ["--data", path / "story.txt", "-n", 120, "--context", 30]


def test_the_stages_directory_holds_every_table(place: Path) -> None:
    loaded = ls.load(place / "tiny").model
    ids = tiny_tokenizer()((place / "story.txt").read_text(), add_special_tokens=False)["input_ids"][:120]
    tokens = [ids[start : start + 30] for start in range(0, 120, 30)]
    meant: dict[str, pd.DataFrame] = {
        **ls.analyses.measure(loaded, tokens, ["lens", "attention", "norms", "similarity", "drop"]),
        "neurons": ls.analyses.neurons(loaded),
        "stages": ls.analyses.stages(loaded, tokens),
    }
    for name in TABLES:
        found = ls.read_results(place / "stages", name)
        assert found.attrs["run"]["state"] == "finished"
        assert set(found.model) == {str(place / "tiny")}
        numbers = meant[name].select_dtypes("number").columns
        pd.testing.assert_frame_equal(found[numbers], meant[name][numbers], check_exact=False, atol=1e-6)
        csv = pd.read_csv(place / "stages" / f"{name}.csv")
        np.testing.assert_allclose(csv[numbers].astype(float), found[numbers].astype(float))
    first = ls.read_results(place / "stages")
    assert [limit["layer"] for limit in first.attrs["boundaries"]] == [
        limit["layer"] for limit in meant["stages"].attrs["boundaries"]
    ]
    assert ls.analyses.describe_stages(first) == ls.analyses.describe_stages(meant["stages"])
    scores = ls.read_results(place / "stages", "neuron_scores")
    assert len(scores) == ls.read_results(place / "stages", "neurons").neurons.sum()
    facts = json.loads((place / "stages" / "run.json").read_text())
    assert facts["arguments"]["analysis"] == "stages"
    assert facts["centred"] is True
    assert sorted([*facts["files"], *facts["figures"], "run.json"]) == sorted(
        file.name for file in (place / "stages").iterdir()
    )


def test_means_and_errors_can_be_had_again_from_the_sequences(place: Path) -> None:
    sequences = pd.read_parquet(place / "stages" / "sequences.parquet")
    norms = ls.read_results(place / "stages", "norms")
    mine = sequences[(sequences.signal == "norms") & (sequences.layer == 2) & (sequences.name == "mlp_norm")]
    assert len(mine) == 4
    assert mine["sum"].sum() / mine["count"].sum() == pytest.approx(norms.mlp_norm[2])
    lens = ls.read_results(place / "stages", "lens")
    mine = sequences[(sequences.signal == "lens") & (sequences.layer == 1) & (sequences.name == "kl_nats")]
    assert mine["sum"].sum() / mine["count"].sum() == pytest.approx(lens.lens_kl_nats[1])


@pytest.mark.parametrize("analysis", ["lens", "attention", "norms", "similarity", "neurons"])
def test_one_at_a_time_gives_the_same_table(place: Path, tmp_path: Path, analysis: str) -> None:
    given = [] if analysis == "neurons" else words(place)
    value = result_of("analyze", analysis, place / "tiny", *given, "-o", tmp_path / "out")
    found = ls.read_results(tmp_path / "out")
    together = ls.read_results(place / "stages", analysis)
    pd.testing.assert_frame_equal(found, together, atol=1e-9)
    assert len(value["tables"][analysis]) == len(found)
    assert value["skipped"] == {}
    for file in tmp_path.glob("out/*.png"):
        with Image.open(file) as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    assert (tmp_path / "out" / f"{analysis}.png").exists()


@pytest.mark.parametrize("analysis", ["cka", slow("cosine"), "stream"])
def test_what_is_measured_of_the_stream_is_written_drawn_and_said(place: Path, tmp_path: Path, analysis: str) -> None:
    out = tmp_path / "out"
    loaded = ls.load(place / "tiny").model
    ids = tiny_tokenizer()((place / "story.txt").read_text(), add_special_tokens=False)["input_ids"][:120]
    meant = getattr(ls.analyses, analysis)(loaded, [ids[start : start + 30] for start in range(0, 120, 30)])
    found = run("analyze", analysis, place / "tiny", *words(place), "--batch-size", 3, "-o", out)
    assert found.exit_code == 0
    frame = ls.read_results(out)
    pd.testing.assert_frame_equal(
        frame.drop(columns="model"), meant.drop(columns="model"), check_dtype=False, atol=1e-5, rtol=1e-4
    )
    rows = [line.split() for line in found.stdout.splitlines() if line[:5].strip().isdecimal()]
    assert [row[0] for row in rows] == [str(layer) for layer in range(DEPTH)]
    assert "highest" in found.stdout
    assert all(len(line) <= 110 for line in found.stdout.splitlines() if not line.startswith("Results are in"))
    with Image.open(out / f"{analysis}.png") as image:
        assert image.width > 600
    sequences = pd.read_parquet(out / "sequences.parquet")
    assert set(sequences.signal) == {analysis}
    if analysis == "cosine":
        mine = sequences[(sequences.layer == 1) & (sequences.part == "4")]
        assert mine["sum"].sum() / mine["count"].sum() == pytest.approx(
            frame.query("`from` == 1 and to == 4").cosine.item()
        )
    assert ("<th>from</th><th>to</th>" in frame._repr_html_()) == (analysis != "stream")
    words_in_page = ls.report([out], tmp_path / "page.html").path.read_text()
    assert ANALYSES[analysis].title in words_in_page or "a cell for each pair of depths" in words_in_page


@pytest.mark.parametrize("analysis", ["cka", slow("stream")])
def test_what_is_measured_of_the_stream_resumes_to_the_same_bytes(tmp_path: Path, analysis: str) -> None:
    def do(directory: Path, on_progress: Any = None) -> None:
        measurer = make_measurer(tiny_model("llama"), ANALYSES[analysis].signals, DEPTH)
        with open_run(directory, {"analysis": analysis}, kind=ANALYSIS) as run:
            run_measurement(
                run, measurer, text(), AnalysisOutput(analysis, measurer, "tiny"), batch_size=2, on_progress=on_progress
            )

    def stop(now: Any) -> None:
        if now.table is not None and now.sequences >= 4:
            raise StopError

    do(tmp_path / "whole")
    with pytest.raises(StopError):
        do(tmp_path / "run", stop)
    do(tmp_path / "run")
    kept = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "run.json"}
        for name in ("whole", "run")
    ]
    assert kept[0] == kept[1]
    assert f"{analysis}.parquet" in kept[0]


def run_sizes(session: ModelSession, directory: Path, *, analysis: str, overwrite: bool) -> Run:
    def make() -> TablesAndFacts:
        sizes = [sum(p.numel() for p in block.parameters()) for block in session.model.load().transformer.h]
        layers = range(len(sizes))
        depths = [layer / (len(sizes) - 1) for layer in layers]
        return {analysis: pd.DataFrame({"layer": layers, "relative_depth": depths, "size": sizes})}, {}

    return run_once(directory, session.arguments({"analysis": analysis}), session.reporter, make, overwrite=overwrite)


def draw_sizes(models: Sequence[ModelTables]) -> Figure:
    return draw_columns(models, "sizes")


def test_an_entry_in_the_registry_is_an_analysis(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Analysis(
        "sizes", "numbers of weights", "Count the weights of each block.", "weights",
        (Column("size", "number of weights", heading="weights", digits=0),), {"sizes": f"{__name__}:draw_sizes"},
        run=f"{__name__}:run_sizes",
    )  # fmt: skip
    monkeypatch.setitem(ANALYSES, "sizes", entry)
    out = tmp_path / "out"
    run_analysis("sizes", str(place / "tiny"), RunOptions(), out, False, Console())
    shown = capsys.readouterr().out
    assert "weights" in shown
    assert f"Results are in {out}: sizes.parquet, sizes.csv, sizes.png, sizes.svg" in shown.replace("\n", "")
    frame = ls.analyze("sizes", place / "tiny", directory=out)
    assert len(frame) == DEPTH
    assert "weights</th>" in frame._repr_html_()
    assert (
        "numbers of weights, over depth: number of weights" in ls.report([out], tmp_path / "page.html").path.read_text()
    )


def test_what_a_person_sees(place: Path) -> None:
    again = run("stages", place / "tiny", *words(place), "-o", place / "stages")
    assert again.exit_code == 0
    assert "Using the finished run in" in again.stderr
    for said in (
        "drop KL",
        "attn/MLP",
        "suppr. %",
        "boundaries between the four stages",
        "Results are in",
        "stages.parquet",
        "tokens/s",
    ):
        assert said in again.stdout, said
    rows = [line.split() for line in again.stdout.splitlines() if line[:5].strip().isdecimal()]
    assert [row[0] for row in rows] == [str(layer) for layer in range(DEPTH)]
    assert all(len(line) <= 110 for line in again.stdout.splitlines() if not line.startswith("Results are in"))


def test_what_is_missing_is_said_once(place: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "jamba", "jamba")
    found = run("analyze", "attention", tmp_path / "jamba", *words(place), "-o", tmp_path / "out")
    assert found.exit_code == 0
    assert "Skipped: attention of block 0 and 3 more: JambaMambaMixer attends to no tokens by softmax" in found.stdout
    assert found.stdout.count("Skipped") == 1
    line = next(line for line in found.stdout.splitlines() if line.startswith("    0"))
    assert line.split() == ["0", "-", "-"]


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_stopped_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, stopped: int) -> None:
    def do(directory: Path, on_progress: Any = None) -> None:
        measurer = make_measurer(tiny_model("llama"), ANALYSES["stages"].signals, DEPTH)
        with open_run(directory, {"analysis": "stages"}, kind=ANALYSIS) as run:
            run_measurement(
                run, measurer, text(), AnalysisOutput("stages", measurer, "tiny"), batch_size=2, on_progress=on_progress
            )

    def stop(now: Any) -> None:
        if now.table is not None and now.sequences >= 2 * stopped:
            raise StopError

    do(tmp_path / "whole")
    with pytest.raises(StopError):
        do(tmp_path / "run", stop)
    do(tmp_path / "run")
    kept = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "run.json"}
        for name in ("whole", "run")
    ]
    assert kept[0] == kept[1]


def test_neurons_are_looked_at_once_where_the_end_was_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layersurgery.analyses import outcomes

    calls = []
    look = ls.analyses.neuron_scores
    monkeypatch.setattr(outcomes, "neuron_scores", lambda *given, **named: (calls.append(1), look(*given, **named))[1])  # type: ignore[func-returns-value]
    measurer = make_measurer(tiny_model("llama"), ANALYSES["stages"].signals, DEPTH)

    def do(**options: Any) -> None:
        with open_run(tmp_path / "run", {"analysis": "stages"}, kind=ANALYSIS) as run:
            run_measurement(run, measurer, text(), AnalysisOutput("stages", measurer, "tiny"), batch_size=4, **options)

    with monkeypatch.context() as patch:
        patch.setattr(outcomes, "sums_table", lambda _tables: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            do()
    do()
    assert len(calls) == 1


def test_other_arguments_and_other_kinds_are_refused(place: Path) -> None:
    other = run("stages", place / "tiny", *words(place), "--seed", 7, "-o", place / "stages")
    assert other.exit_code == 1
    assert "contains an analysis with other arguments: --seed 0 there, 7 now" in other.stderr
    sweep = run("sweep", place / "tiny", *words(place), "-o", place / "stages")
    assert sweep.exit_code == 1
    assert "contains something other than a sweep" in sweep.stderr
    lens = run("analyze", "lens", place / "tiny", *words(place), "-o", place / "stages")
    assert lens.exit_code == 1
    assert "analysis stages there, lens now" in lens.stderr
    with pytest.raises(ls.SourceError, match="contains no table 'probe'; it contains stages, lens, attention"):
        ls.read_results(place / "stages", "probe")
    nothing = run("analyze", "neurons", place / "nowhere")
    assert nothing.exit_code == 1
    assert "Traceback" not in nothing.stderr


def test_a_model_without_neurons(tmp_path: Path, place: Path) -> None:
    checkpoint(tmp_path / "mamba", "mamba")
    found = run("analyze", "neurons", tmp_path / "mamba", "-o", tmp_path / "out")
    assert found.exit_code == 1
    assert "MambaForCausalLM has no neurons to score: the block has no mlp" in found.stderr
    value = result_of("stages", tmp_path / "mamba", *words(place), "-o", tmp_path / "stages")
    assert value["skipped"]["neurons"].startswith("MambaForCausalLM has no neurons")
    assert "neurons" not in value["tables"]


@pytest.mark.slow
def test_several_models_are_drawn_together(place: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "llama")
    result_of("stages", tmp_path / "llama", *words(place), "-o", tmp_path / "other")
    result_of("sweep", tmp_path / "llama", *words(place), "--edits", "drop", "-o", tmp_path / "sweep")
    value = result_of("plot", place / "stages", tmp_path / "other", tmp_path / "sweep", "-o", tmp_path / "figures")
    names = {Path(file).name for file in value["figures"]}
    drawn = ("attention", "lens", "neurons", "norms", "robustness", "similarity", "stages")
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    picture = (tmp_path / "figures" / "lens.svg").read_text()
    assert "tiny" in picture
    assert "llama" in picture


def test_a_model_of_one_block(tmp_path: Path, place: Path) -> None:
    checkpoint(tmp_path / "one", "gpt2", n_layer=1)
    value = result_of("stages", tmp_path / "one", *words(place), "-o", tmp_path / "stages")
    assert value["tables"]["similarity"] == []
    assert value["skipped"]["similarity"] == "the model has only one block, so there is no neighbor to swap it with"
    assert len(value["tables"]["lens"]) == 1


def test_captions_and_labels_say_which_run_it_was(place: Path, tmp_path: Path) -> None:
    result_of("analyze", "lens", place / "tiny", *words(place), "-o", tmp_path / "lens")
    facts = ls.read_results(tmp_path / "lens").attrs["run"]
    one = model_tables(tmp_path / "lens", facts)
    assert one.caption == "120 tokens of story.txt in 4 sequences"
    shutil.copytree(tmp_path / "lens", tmp_path / "again")
    result_of("plot", tmp_path / "lens", tmp_path / "again", tmp_path / "lens", "-o", tmp_path / "figures")
    picture = (tmp_path / "figures" / "lens.svg").read_text()
    assert "tiny (lens)" in picture
    assert "tiny (again)" in picture
    (tmp_path / "again" / "run.json").write_text('{"kind": "other", "state": "finished"}')
    found = run("plot", tmp_path / "again", "-o", tmp_path / "figures")
    assert found.exit_code == 1
    assert "contains no results" in found.stderr


def test_too_short_for_five_tokens_before(place: Path, tmp_path: Path) -> None:
    value = result_of(
        "analyze",
        "attention",
        place / "tiny",
        "--data",
        place / "story.txt",
        "-n",
        40,
        "--context",
        4,
        "-o",
        tmp_path / "out",
    )
    assert value["skipped"] == {
        "attention_prev5": "no token has five tokens before it; sequences need at least six tokens"
    }

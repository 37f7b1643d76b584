"""Sweeps that leave their results in a directory: stopped anywhere, they end with the same digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import layersurgery as ls
from layersurgery.figures.sweeps import Sweep, draw
from layersurgery.metrics.reference import METRICS, TOKEN_TAILS
from layersurgery.plans.variants import variants
from layersurgery.registry import TAILS
from layersurgery.runs.journal import Journal
from layersurgery.runs.per_token import PARTS
from layersurgery.runs.run_directory import JOURNAL, open_run
from layersurgery.runs.runner import SweepOutput
from layersurgery.runs.text import TokenizedText
from layersurgery.runtime.block_runner import BlockRunner
from layersurgery.sweeps.measurer import Measurer
from tests.support.measure_run import run_measurement
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import DEPTH, tiny_model, tokens

ARGUMENTS = {"model": {"name": "tiny"}, "text": {"data": "made up"}, "per_token": True}


def text(sequences: int = 7) -> TokenizedText:
    ids = tokens(sequences, 10)
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    return TokenizedText(ids, mask, "f")


def figures(frame: pd.DataFrame, directory: Path) -> list[Path]:
    """Draw without the figure of the tails, which has its own test."""
    return draw([Sweep.of(frame.drop(columns=[one.name for one in TAILS]), "made up")], directory)


def do(directory: Path, *, per_token: bool = True, batch_size: int | None = 2, **options: Any) -> pd.DataFrame:
    measurer = Measurer(tiny_model("llama"), variants("swap,drop", DEPTH), tails=True)
    with open_run(directory, ARGUMENTS) as run:
        return run_measurement(
            run, measurer, text(), SweepOutput(measurer.variants, "tiny"), per_token=per_token, batch_size=batch_size,
            tokenizer=tiny_tokenizer(), draw=figures, **options
        )  # fmt: skip


def files(directory: Path) -> dict[str, bytes]:
    """Everything but run.json, which tells the time."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "run.json"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    do(directory)
    return directory


def test_what_it_leaves(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "results.csv", "results.parquet", "robustness.png", "robustness.svg", "run.json", "sequences.parquet",
        "tokens.parquet",
    ]  # fmt: skip
    frame = ls.read_results(undisturbed)
    assert frame.attrs["run"]["state"] == "finished"
    measured = ls.sweep(
        tiny_model("llama"), "swap,drop", text().ids, attention_mask=text().mask, batch_size=2, tails=True
    )
    pd.testing.assert_frame_equal(frame, measured.assign(model="tiny"), check_exact=True)
    csv = pd.read_csv(
        undisturbed / "results.csv", keep_default_na=False, na_values={"layer": [""], "relative_depth": [""]}
    )
    for name in frame.columns:
        assert list(csv[name].dropna()) == list(frame[name].dropna()), name
    run = json.loads((undisturbed / "run.json").read_text())
    assert run["text"] == {"fingerprint": "f", "tokens": 66, "sequences": 7, "length": 10, "notes": [], "read": {}}
    assert run["schedule"] == {
        "order": "depth-first",
        "block_calls": 36,
        "block_calls_apart": 66,
        "bytes_read_a_batch": 0,
    }
    assert (run["batch_size"], run["non_finite"]) == (2, {})
    assert run["model"]["parameters"] == sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert run["seconds"] > 0


def test_means_can_be_had_again_from_the_sequences_and_from_the_tokens(undisturbed: Path) -> None:
    frame = ls.read_results(undisturbed)
    sequences = pd.read_parquet(undisturbed / "sequences.parquet")
    each = pd.read_parquet(undisturbed / "tokens.parquet")
    assert len(each) == len(frame) * frame.tokens[0]
    for row in range(len(frame)):
        for metric in METRICS:
            part = sequences[sequences.row == row]
            assert part[f"{metric}_sum"].sum() / part.tokens.sum() == pytest.approx(frame[metric][row], abs=1e-12)
            assert each[each.row == row][metric].mean() == pytest.approx(frame[metric][row], abs=1e-6)
        part = sequences[sequences.row == row]
        mean = part.probability_change_squared_sum.sum() / part.tokens.sum()
        assert frame.probability_change_rms[row] ** 2 == pytest.approx(mean, abs=1e-12)
        assert frame.top5_overlap[row] == pytest.approx(each[each.row == row].top5_overlap.mean(), abs=1e-6)
        assert frame.kl_nats_max[row] == part.kl_nats_max.max()


def test_rows_for_each_token(undisturbed: Path) -> None:
    each = pd.read_parquet(undisturbed / "tokens.parquet")
    assert list(each.columns) == [
        "row", "edit", "plan", "name", "sequence", "position", "token_id", "token", "next_token_id", *METRICS,
        *TOKEN_TAILS,
    ]  # fmt: skip
    one = each[each.plan == "drop 3"]
    assert list(zip(one.sequence, one.position, strict=True)) == [
        (sequence, position) for sequence in range(7) for position in range(5 if sequence == 2 else 9)
    ]
    ids = text().ids
    assert all(ids[row.sequence, row.position] == row.token_id for row in one.itertuples())
    assert all(ids[row.sequence, row.position + 1] == row.next_token_id for row in one.itertuples())
    assert list(one.token[:3]) == [tiny_tokenizer().decode([int(token)]) for token in ids[0, :3]]
    alone = ls.compare(tiny_model("llama"), "drop 3", ids[4:5])
    assert one[one.sequence == 4].kl_nats.mean() == pytest.approx(alone.kl_nats, abs=1e-6)


class StopError(Exception):
    """Stands for anything that ends a run."""


@pytest.mark.parametrize("batches", [1, 2, 3, 4])
def test_stopped_after_any_batch_it_goes_on(undisturbed: Path, tmp_path: Path, batches: int) -> None:
    seen = 0

    def stop(now: Any) -> None:
        nonlocal seen
        seen += now.table is not None
        if seen == batches:
            raise StopError

    with pytest.raises(StopError):
        do(tmp_path / "run", on_progress=stop)
    with pytest.raises(ls.SourceError, match="has not finished; run the same command again"):
        ls.read_results(tmp_path / "run")
    measured: list[float] = []
    do(tmp_path / "run", on_progress=lambda now: measured.append(now.sequences))
    assert measured[0] == min(7, 2 * batches)
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_damaged_batch_is_measured_again(undisturbed: Path, tmp_path: Path) -> None:
    def stop(now: Any) -> None:
        if now.sequences >= 6:
            raise StopError

    with pytest.raises(StopError):
        do(tmp_path / "run", on_progress=stop)
    journal = tmp_path / "run" / JOURNAL
    batch = journal / "000001.npz"
    damaged = bytearray(batch.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    batch.write_bytes(damaged)
    assert sorted(Journal(journal, 12, tails=True).results) == [0]
    do(tmp_path / "run")
    assert files(tmp_path / "run") == files(undisturbed)


@pytest.mark.parametrize("rest", [None, 100])
def test_a_batch_whose_rows_of_tokens_are_lost_is_measured_again(
    undisturbed: Path, tmp_path: Path, rest: int | None
) -> None:
    def stop(now: Any) -> None:
        if now.sequences >= 4:
            raise StopError

    with pytest.raises(StopError):
        do(tmp_path / "run", on_progress=stop)
    rows = tmp_path / "run" / PARTS / "000000.parquet"
    rows.unlink() if rest is None else rows.write_bytes(rows.read_bytes()[:rest])
    do(tmp_path / "run")
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_batch_size_found_by_trying_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measurer, "suggest", lambda *_, **__: 3)

    def stop(now: Any) -> None:
        if now.table is not None:
            raise StopError

    do(tmp_path / "whole", batch_size=None, per_token=False)
    with pytest.raises(StopError):
        do(tmp_path / "run", batch_size=None, per_token=False, on_progress=stop)
    monkeypatch.setattr(Measurer, "suggest", lambda *_: 5)
    do(tmp_path / "run", batch_size=None, per_token=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["batch_size"] == 3
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def begin(directory: Path, arguments: dict[str, Any], **options: Any) -> None:
    """A run that has measured something, and was stopped."""
    with open_run(directory, arguments, **options) as run:
        run.start()
        Journal(directory / JOURNAL, 2)
    (directory / JOURNAL / "000000.npz").touch()


def test_other_arguments_are_refused_by_name(tmp_path: Path) -> None:
    begin(tmp_path / "run", ARGUMENTS)
    other = {"model": {"name": "huge"}, "text": {"data": "made up", "seed": 3}, "per_token": True}
    with (
        pytest.raises(
            ls.OutputError, match=r"model name tiny there, huge now; `seed` nothing there, 3 now. Replace it"
        ),
        open_run(tmp_path / "run", other),
    ):
        pass
    assert (tmp_path / "run" / JOURNAL).exists()
    with open_run(tmp_path / "run", other, overwrite=True) as run:
        assert not run.started
        assert run.arguments == other
        assert (tmp_path / "run" / JOURNAL).exists(), "an earlier run stays until the new one is ready"
        run.start()
        assert not (tmp_path / "run" / JOURNAL).exists()
        Journal(tmp_path / "run" / JOURNAL, 2)
    with open_run(tmp_path / "run", ARGUMENTS) as run:  # nothing was measured, so there is nothing to lose
        assert not run.started
    (tmp_path / "run" / JOURNAL / "000000.npz").touch()
    with pytest.raises(ls.OutputError, match="seed"), open_run(tmp_path / "run", ARGUMENTS):
        pass


def test_an_interruption_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measurer.measure_batch
    calls = []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(Measurer, "measure_batch", stop)
    said = ("no batch was measured yet, so the same command starts again", "run the same command again to resume")
    for words in said:
        with pytest.raises(KeyboardInterrupt, match=words):
            ls.sweep(tiny_model("llama"), "drop", tokens(), directory=tmp_path / "run", batch_size=1)
    assert len(ls.sweep(tiny_model("llama"), "drop", tokens(), directory=tmp_path / "run", batch_size=1)) == DEPTH + 1


def test_a_run_that_an_earlier_version_began_is_not_resumed(undisturbed: Path, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", ARGUMENTS) as run:
        run.start()
    shutil.rmtree(tmp_path / "run" / JOURNAL, ignore_errors=True)
    (tmp_path / "run" / "progress.journal").write_bytes(b"lsj1")
    with (
        pytest.raises(
            ls.OutputError, match=r"contains a sweep that an earlier version of layersurgery began.*`overwrite`"
        ),
        open_run(tmp_path / "run", ARGUMENTS),
    ):
        pass
    with open_run(tmp_path / "run", ARGUMENTS, overwrite=True) as run:
        run.start()
    assert not (tmp_path / "run" / "progress.journal").exists()
    do(tmp_path / "run")
    (tmp_path / "run" / "progress.journal").touch()  # it was killed before it had cleared up
    with open_run(tmp_path / "run", ARGUMENTS) as run:
        assert run.finished
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_run_that_has_measured_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    with pytest.raises(StopError), open_run(tmp_path / "run", ARGUMENTS):
        raise StopError
    assert not (tmp_path / "run").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(StopError), open_run(tmp_path / "there", ARGUMENTS):
        raise StopError
    assert list((tmp_path / "there").iterdir()) == []
    with open_run(tmp_path / "killed", ARGUMENTS) as run:
        run.start()
    with open_run(tmp_path / "killed", {"other": 1}) as run:
        assert run.arguments == {"other": 1}


def test_a_run_killed_before_it_had_cleared_up_is_finished(undisturbed: Path, tmp_path: Path) -> None:
    do(tmp_path / "run")
    Journal(tmp_path / "run" / JOURNAL, 12, tails=True)
    (tmp_path / "run" / "tokens.parts").mkdir()
    with open_run(tmp_path / "run", ARGUMENTS) as run:
        assert run.finished
    assert files(tmp_path / "run") == files(undisturbed)


def test_what_goes_wrong_in_a_batch_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measurer.measure

    def fail(self: Measurer, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        if torch.equal(ids[0], tokens(7, 10)[4]):
            raise ls.MeasurementError("NaN or infinite logits")
        return measure(self, ids, *args, **options)

    monkeypatch.setattr(Measurer, "measure", fail)
    with pytest.raises(ls.MeasurementError, match="batch 2: NaN or infinite logits"):
        do(tmp_path / "run", per_token=False)
    assert len(Journal(tmp_path / "run" / JOURNAL, 12, tails=True).results) == 2


def test_memory_that_runs_out_costs_no_batch(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = BlockRunner.run, 0

    def crowded(self: BlockRunner, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 75:  # in the third batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, *args)

    monkeypatch.setattr(BlockRunner, "run", crowded)
    with pytest.warns(UserWarning, match="memory ran out with 2 sequences at once; continuing with 1"):
        frame = do(tmp_path / "run")
    meant = ls.read_results(undisturbed).to_pandas()
    pd.testing.assert_frame_equal(frame, meant[list(frame)], check_exact=False, atol=1e-6)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["batch_size"], facts["sequences_at_once"]) == (2, 1)
    one, other = (pd.read_parquet(place / "tokens.parquet") for place in (tmp_path / "run", undisturbed))
    pd.testing.assert_frame_equal(one, other, check_exact=False, atol=1e-4)


def test_what_else_is_in_a_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with (
        pytest.raises(ls.OutputError, match="contains something other than a sweep"),
        open_run(tmp_path / "thesis", {}),
    ):
        pass
    with pytest.raises(ls.OutputError, match="is not a directory"), open_run(tmp_path / "thesis" / "chapter.tex", {}):
        pass
    begin(tmp_path / "run", {})
    (tmp_path / "run" / "mine.txt").touch()
    with open_run(tmp_path / "run", {"a": 1}, overwrite=True):
        pass
    assert (tmp_path / "run" / "mine.txt").exists()
    with pytest.raises(ls.SourceError, match="contains no results"):
        ls.read_results(tmp_path / "thesis")


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_programs_have_a_run_json_too(tmp_path: Path, overwrite: bool) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "tokens.parts").mkdir(parents=True)
    for name, content in {"run.json": '{"experiment": "mine"}', "results.csv": "a,b", "tokens.parts/x": "x"}.items():
        (theirs / name).write_text(content)
    with (
        pytest.raises(ls.OutputError, match="contains something other than a sweep"),
        open_run(theirs, {}, overwrite=overwrite),
    ):
        pass
    assert sorted(path.name for path in theirs.rglob("*")) == ["results.csv", "run.json", "tokens.parts", "x"]


def test_results_stay_until_a_new_run_is_ready(undisturbed: Path, tmp_path: Path) -> None:
    do(tmp_path / "run")
    with pytest.raises(StopError), open_run(tmp_path / "run", {"other": 1}, overwrite=True):
        raise StopError
    assert files(tmp_path / "run") == files(undisturbed)


def test_a_figure_that_fails_does_not_cost_the_numbers(tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no ink")

    measurer = Measurer(tiny_model("llama"), variants("drop", DEPTH))
    with open_run(tmp_path / "run", {}) as run:
        run_measurement(run, measurer, text(), SweepOutput(measurer.variants, "tiny"), batch_size=2, draw=fail)
    assert ls.read_results(tmp_path / "run").attrs["run"]["figure_error"] == "ValueError: no ink"


def test_two_processes_do_not_write_one_directory(tmp_path: Path) -> None:
    code = "import sys, pathlib; from layersurgery.runs.run_directory import open_run"
    code += "\nwith open_run(pathlib.Path(sys.argv[1]), {}): pass"
    with open_run(tmp_path / "run", {}):
        other = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True)
        assert other.returncode
        assert "another process is writing to" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "run"]).returncode == 0


def test_a_full_disk_loses_nothing(undisturbed: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        getattr(os, "geteuid", lambda: 1)()  # Windows has none
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small file system here")
    try:
        with pytest.raises(ls.OutputError, match="cannot write .*No space left on device"):
            do(small / "run")
        assert subprocess.run(["mount", "-o", "remount,size=4m", small]).returncode == 0
        do(small / "run")
        assert files(small / "run") == files(undisturbed)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_row_that_is_no_number_is_named_with_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measurer.measure

    def spoiled(self: Measurer, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        measured = measure(self, ids, *args, **options)
        if torch.equal(ids[0], tokens(7, 10)[4]):
            measured.values[1, 3] = float("nan")
        return measured

    monkeypatch.setattr(Measurer, "measure", spoiled)
    do(tmp_path / "run", per_token=False)
    frame = ls.read_results(tmp_path / "run")
    assert frame.attrs["run"]["non_finite"] == {"swap 2 3": [2]}
    assert frame.loc[3, list(METRICS)].isna().all()
    assert frame.drop(index=3)[list(METRICS)].notna().all(axis=None)


# One process imports torch; its children do the work, and are killed for good.
_RUN = """
import os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
import tests.runs.test_runs as t
for seed in range(5):
    rng, kills = random.Random(seed), 0
    while True:
        child = os.fork()
        if not child:
            t.do(pathlib.Path(sys.argv[1]) / str(seed))
            os._exit(0)
        if kills < 6:
            time.sleep(rng.uniform(0.01, 0.8))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    print(kills, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_ends_with_the_same_files(undisturbed: Path, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _RUN, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    kills = list(map(int, found.stdout.split()))
    assert len(kills) == 5
    assert sum(kills) >= 10
    for seed in range(5):
        assert files(tmp_path / str(seed)) == files(undisturbed)


def test_parts_are_joined_with_bounded_memory(undisturbed: Path) -> None:
    with pq.ParquetFile(undisturbed / "tokens.parquet") as file:
        assert file.num_row_groups >= 4


def test_killed_while_it_writes_its_first_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.partial").write_text('{"kind": "layer')
    do(tmp_path / "run")
    assert not (tmp_path / "run" / ".run.json.partial").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".other.partial").touch()
    with pytest.raises(ls.OutputError, match="contains something other than a sweep"):
        do(tmp_path / "other")


def test_killed_while_it_replaces_another_run_it_stays_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layersurgery.runs import run_directory

    do(tmp_path / "run")
    for step in ("clear_progress", "_remove_results"):
        with monkeypatch.context() as patch:
            patch.setattr(run_directory, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with open_run(tmp_path / "run", {"other": step}, overwrite=True) as run, pytest.raises(KeyboardInterrupt):
                run.start()
        assert (tmp_path / "run" / "run.json").exists()
        with open_run(tmp_path / "run", {"other": step}, overwrite=True) as run:
            assert not run.finished
            assert not run.started

"""How much later blocks change equals the dense way, on any schedule, in any parts, and across interruptions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.figures.sweeps import Sweep, sweep_figures
from layersurgery.plans.variants import variants
from layersurgery.sweeps.measurer import Measurer
from layersurgery.sweeps.propagation import Propagation, propagation_bytes, schedule_for_propagation
from layersurgery.sweeps.propagation_results import propagation_rows, propagation_sentence, propagation_table
from layersurgery.sweeps.schedule import RunBlock, layer_major, schedule
from layersurgery.sweeps.sweep import collect_sums
from tests.cli.test_cli import result_of, run
from tests.runtime.test_offload import dispatched, on_disk
from tests.support.dense import BRANCH_MODULES, hooked, model_of
from tests.support.tiny_checkpoint import checkpoint
from tests.support.zoo import DEPTH, slow, tiny_model, tokens
from tests.surgery.test_zoo import state

EDITS = ["drop", "skip-attention", "skip-mlp", "swap", {"again": "repeat 2:4", "far": "swap 1 4; skip-mlp 3"}]
QUICK = [pytest.param(name, [EDITS[turn % len(EDITS)]], id=name) for turn, name in enumerate(BRANCH_MODULES)]
ALL = [pytest.param(name, EDITS, id=f"{name}-all", marks=pytest.mark.slow) for name in BRANCH_MODULES]
KEYS = ["plan", "position", "part"]


def table_of(model: Any, edits: Any, ids: torch.Tensor, **options: Any) -> pd.DataFrame:
    return pd.DataFrame(ls.sweep(model, edits, ids, propagation=True, **options).attrs["propagation"])


@torch.no_grad()
def added(model: Any, name: str, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Return what attention and MLP at each position of a float64 model add, (sequences, length, width)."""
    with hooked(model, name) as found:
        model(ids, use_cache=False)
    return {key: value.view(*ids.shape, -1) for key, value in found.items()}


@pytest.mark.parametrize(("name", "edits"), [*QUICK, *ALL])
def test_changes_are_what_hooks_see_in_edited_models(name: str, edits: list[Any]) -> None:
    model, ids = model_of(name), tokens(3, 11)
    before = state(model)
    table = table_of(model, edits, ids, batch_size=2)
    assert state(model) == before
    dense = model_of(name).double()
    dense.set_experts_implementation("eager")  # the fused kernel of experts takes no float64
    unedited = added(dense, name, ids)
    compared = 0
    for variant in variants(edits, DEPTH):
        rows = table[table.plan == variant.plan]
        later = [
            (position, visit)
            for position, visit in enumerate(variant.route)
            if variant.route[: position + 1] != ls.Route.identity(position + 1) and visit.whole
        ]
        places = [(position, visit.block) for position, visit in later for _ in range(2)]
        assert list(zip(rows.position, rows["to"], strict=True)) == places
        try:
            with ls.operate(dense, variant.route):
                edited = added(dense, name, ids)
        except ls.UnsupportedEditError:  # no config can express the route; a sweep needs none
            continue
        for row in rows.itertuples():
            own = unedited[row.part, row.to]
            change = (edited[row.part, row.position] - own).norm(dim=-1) / own.norm(dim=-1)
            means = change.mean(-1).double()
            assert row.change_mean == pytest.approx(float(means.mean()), rel=2e-4), (row.plan, row.to, row.part)
            assert row.change_mean_sem == pytest.approx(float(means.std()) / 3**0.5, rel=1e-2, abs=1e-6)
            assert row.change_max == pytest.approx(float(change.max()), rel=5e-4)
            assert (row.tokens, row.sequences) == (33, 3)
            compared += 1
    assert compared > 0
    assert (table["from"] == table.plan.str.extract(r"(\d+)")[0].astype(int)).all()


@pytest.mark.parametrize("name", ["gpt2", slow("gemma2"), slow("mixtral"), slow("falcon_h1")])
def test_no_schedule_and_no_split_of_the_text_changes_a_digit(name: str) -> None:
    """And measuring it neither runs another block nor changes another result."""
    model, ids = tiny_model(name), tokens(4, 9)
    edits = ["drop,skip-mlp", "swap 1 2; skip-attention 4", "repeat 1:3"]
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    measured = {}
    for order in ("depth-first", "layer-major", None):
        measurer = Measurer(model, variants(edits, DEPTH), order=order, propagation=True)
        plain = Measurer(model, variants(edits, DEPTH), order=measurer.schedule.name)
        result, meant = measurer.measure(ids, mask), plain.measure(ids, mask)
        assert result.calls == meant.calls
        np.testing.assert_array_equal(result.values, meant.values)
        measured[order] = result.observed
    measurer.max_sequences = 1  # as after memory ran out
    np.testing.assert_allclose(measurer.measure(ids, mask).observed, result.observed, rtol=1e-5)
    np.testing.assert_array_equal(measured["depth-first"], measured["layer-major"])
    np.testing.assert_array_equal(measured["depth-first"], measured[None])


@pytest.mark.parametrize("name", ["llama", "bloom", slow("gemma2"), slow("gpt2")])
@pytest.mark.parametrize("left", [False, True])
def test_padding_counts_for_nothing(name: str, left: bool) -> None:
    model, ids = tiny_model(name), tokens(2, 9)
    padding = torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat([padding, ids] if left else [ids, padding], 1)
    mask = torch.cat([padding, torch.ones_like(ids)] if left else [torch.ones_like(ids), padding], 1)
    alone = table_of(model, "drop,skip-mlp", ids)
    found = table_of(model, "drop,skip-mlp", padded, attention_mask=mask)
    pd.testing.assert_frame_equal(found, alone, rtol=1e-4, atol=1e-6)
    assert (found.tokens == 18).all()


@pytest.mark.parametrize(
    ("make", "kept"),
    [(schedule, DEPTH - 1), (layer_major, 1), (schedule_for_propagation, 1)],
)
def test_contributions_are_forgotten_after_their_last_use(
    make: Callable[..., Any], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = variants("drop", DEPTH)
    plan = make([variant.route for variant in chosen], DEPTH)
    assert propagation_bytes(plan, 8) == 4 * 8 * (2 * kept + 3)
    sizes = []
    run = Propagation.run

    def counted(self: Propagation, step: RunBlock, *given: Any) -> torch.Tensor:
        sizes.append(len(self._current_batch().unedited))
        after = run(self, step, *given)
        last.append(len(self._current_batch().unedited))
        return after

    last: list[int] = []
    monkeypatch.setattr(Propagation, "run", counted)
    measurer = Measurer(tiny_model("llama"), chosen, order=plan.name, propagation=True)
    measurer.measure(tokens(2, 9), torch.ones(2, 9, dtype=torch.long))
    assert max(sizes) == kept
    assert last[-1] == 0
    memory = measurer.memory_use(2, 9)
    plain = Measurer(tiny_model("llama"), chosen, order=plan.name).memory_use(2, 9)
    assert memory.streams - plain.streams == (2 * kept + 3) * 2 * 9 * 32 * 4


def test_a_branch_that_cannot_be_compared_is_named() -> None:
    with pytest.warns(LayerSurgeryWarning, match="propagation to mlp of blocks 1, 2, 3, 4, 5 is not measured: the"):
        table = table_of(tiny_model("mamba"), "drop", tokens(2, 9))
    assert set(table.part) == {"attention"}
    hybrid = Measurer(tiny_model("nemotron_h"), variants("drop 0", DEPTH), propagation=True)
    assert hybrid.propagation is not None
    assert hybrid.propagation.skipped == {
        "propagation to attention of blocks 2, 5": "the block has no attention",
        "propagation to mlp of blocks 1, 3, 4": "the block has no mlp",
    }
    refused = (
        "propagation to attention of blocks .* cannot be measured, nor any other: .*both mix tokens.*; leave `prop"
    )
    with pytest.raises(ls.UnsupportedEditError, match=refused):
        Measurer(tiny_model("rwkv"), variants("drop 2", DEPTH), propagation=True)


def test_a_contribution_of_size_zero_has_no_relative_change() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.zero_()
    with pytest.warns(
        LayerSurgeryWarning, match="not finite: propagation of 'drop 0' to mlp of block 4, propagation of"
    ):
        table = table_of(model, "drop", tokens(2, 9))
    undefined = (table["to"] == 4) & (table.part == "mlp")
    assert undefined.sum() == 4
    assert table.change_mean.isna().equals(undefined)


def test_what_excludes_it_is_refused() -> None:
    model, ids = tiny_model("llama"), tokens(2, 9)
    for options, message in (
        ({"until": "kl=10%"}, "`propagation` needs all text for every edit; leave `until` out"),
        ({"compile": True}, "`compile` hides what the parts of a block add; leave `compile` or `propagation` out"),
    ):
        with pytest.raises(ls.PlanError, match=f"^{message}$"):
            ls.sweep(model, "drop", ids, propagation=True, **options)
    with pytest.raises(ls.PlanError, match="none of these edits runs a whole block after its first change"):
        ls.sweep(model, "drop -1", ids, propagation=True)
    with pytest.raises(ls.PlanError, match="`propagation` is for sweep; norms does not take it"):
        ls.analyses.norms(model, ids, propagation=True)
    with pytest.raises(ls.PlanError, match="`propagation` is for sweep; compare does not take it"):
        ls.compare(model, "drop 2", ids, propagation=True)


@pytest.mark.parametrize("edits", ["drop,swap", "skip-attention,skip-mlp"])
def test_offloaded_blocks_are_compared_as_blocks_in_memory(edits: str, tmp_path: Path) -> None:
    """A view with a skipped branch is made anew for each call of an offloaded block, and not observed."""
    plain, offloaded = dispatched(tmp_path, "llama", {"": "disk"})
    ids = tokens(2, 9)
    found = table_of(offloaded, edits, ids)
    assert on_disk(offloaded)
    pd.testing.assert_frame_equal(found, table_of(plain, edits, ids), rtol=1e-5)


def test_reading_fewer_predictions_changes_nothing() -> None:
    model, ids = tiny_model("llama"), tokens(3, 9)
    pd.testing.assert_frame_equal(table_of(model, "drop", ids, read="1/4"), table_of(model, "drop", ids))


def test_frames_made_from_the_results_share_the_rows_of_changes(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), tokens(2, 8)
    in_memory, written = (
        ls.sweep(model, "drop", ids, propagation=True, directory=directory) for directory in (None, tmp_path)
    )
    for frame in (in_memory, written):
        # pandas copies attrs deeply with every frame that it derives; a copy of 40,000 rows takes more than a second.
        assert frame[frame.edit == "drop"].attrs["propagation"] is frame.attrs["propagation"]


def test_half_precision_gives_the_same_within_its_rounding() -> None:
    model: Any = tiny_model("llama").to(torch.bfloat16)
    table = table_of(model, "skip-attention 1", tokens(2, 9))
    full = table_of(model.float(), "skip-attention 1", tokens(2, 9))
    np.testing.assert_allclose(table.change_mean, full.change_mean, rtol=0.05)


def test_the_command_says_how_far_edits_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersurgery.runs.drawing.draw_sweep", lambda *_given: [])
    (tmp_path / "story.txt").write_text("Once upon a time there were six layers. " * 9)
    words = [checkpoint(tmp_path / "tiny"), "--edits", "drop", "--data", tmp_path / "story.txt", "-n", 60]
    words += ["--context", 12, "--propagation", "--device", "cpu", "-o", tmp_path / "out"]
    value = result_of("sweep", *words)
    assert value["propagation"].startswith("edits of the first half of the layers change what later layers add by ")
    shown = " ".join(run("sweep", *words).stdout.split())  # finished: it prints the results again
    assert value["propagation"][1:] in shown
    assert "propagation.parquet, propagation.csv" in shown


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".parquet", ".csv")}


def test_a_run_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes, is read as a table, has its figure, and leaves no file when another run replaces it."""
    monkeypatch.setattr("layersurgery.runs.drawing.draw_sweep", lambda *_given: [])  # it takes seconds
    model, ids = tiny_model("llama"), tokens(6, 9)
    options: dict[str, Any] = {"batch_size": 2, "propagation": True}
    frame = ls.sweep(model, "drop,skip-mlp", ids, directory=tmp_path / "one", **options)
    table = ls.read_results(tmp_path / "one", "propagation")
    assert {"propagation.parquet", "propagation.csv"} <= files(tmp_path / "one").keys()
    memory = ls.sweep(model, "drop,skip-mlp", ids, **options)
    assert frame.attrs["propagation"] == memory.attrs["propagation"]
    pd.testing.assert_frame_equal(
        table.to_pandas()[list(memory.attrs["propagation"][0])], propagation_table(memory.attrs["propagation"]),
        check_flags=False,
    )  # fmt: skip
    titles = [
        f"{edit}:\nmean change of later {part}, relative to its size"
        for edit in ("drop", "skip MLP")
        for part in ("attention", "MLP")
    ]
    for figure in (table.figure(), sweep_figures([Sweep.of(frame, "text")])["propagation"]):
        assert [axis.get_title("left") for axis in figure.axes if axis.get_title("left")] == titles
        image = np.asarray(figure.axes[0].get_images()[0].get_array())
        first = table[(table["from"] == 0) & (table["to"] == 1) & (table.part == "attention") & (table.edit == "drop")]
        assert image[0, 0] == first.change_mean.iloc[0]

    def stop(done: int, _total: int) -> None:
        if done >= 3:  # in the second batch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ls.sweep(model, "drop,skip-mlp", ids, directory=tmp_path / "two", progress=stop, **options)
    assert len(list((tmp_path / "two" / "sums.parts").iterdir())) == 1
    with pytest.raises(ls.OutputError, match="with other arguments: `propagation` True there, nothing now"):
        ls.sweep(model, "drop,skip-mlp", ids, directory=tmp_path / "two", batch_size=2)
    ls.sweep(model, "drop,skip-mlp", ids, directory=tmp_path / "two", **options)
    assert files(tmp_path / "two") == files(tmp_path / "one")

    page = ls.report(tmp_path / "one", tmp_path).path.read_text("utf-8")
    sentence = propagation_sentence(frame.attrs["propagation"])
    assert re.fullmatch(
        r"edits of the first half of the layers change what later layers add by \d+ % \(drop\), \d+ % \(skip MLP\), "
        r"those of the second half by \d+ % \(drop\), \d+ % \(skip MLP\) \(medians\)",
        sentence,
    )
    assert sentence[1:] in page
    plain = ls.sweep(model, "drop,skip-mlp", ids, directory=tmp_path / "two", batch_size=2, overwrite=True)
    assert not [name for name in files(tmp_path / "two") if name.startswith("propagation")]
    assert "propagation" not in plain.attrs


def test_the_sentence_gives_medians_of_both_halves() -> None:
    measurer = Measurer(tiny_model("gpt2"), variants("drop", DEPTH), propagation=True)
    ids = tokens(2, 9)
    sums = collect_sums(measurer, ids, torch.ones_like(ids), None, None)
    assert measurer.propagation is not None
    rows = propagation_rows(measurer.variants, measurer.propagation, sums, "tiny")
    values = [[row["change_mean"] for row in rows if (row["from"] < 3) == first] for first in (True, False)]
    first, second = (100 * float(np.median(half)) for half in values)
    assert f"by {first:.0f} % (drop), those of the second half by {second:.0f} % (drop)" in propagation_sentence(rows)
    assert propagation_sentence([]) == ""

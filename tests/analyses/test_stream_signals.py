"""Check that what is measured of the stream over depth matches hidden states, hooks and dense float64 matrices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import layersurgery as ls
from layersurgery.analyses.descriptions import describe
from layersurgery.analyses.signal_tables import make_measurer
from layersurgery.analyses.stream_signals import describe_map
from layersurgery.figures.analyses import signal_figures
from layersurgery.figures.style import ModelTables
from layersurgery.sweeps.quantities import STREAM_SIGNALS
from layersurgery.sweeps.sweep import collect_sums
from tests.metrics.test_stream_similarity import dense_hsic
from tests.runtime.test_offload import dispatched
from tests.support.dense import BRANCH_MODULES, LAYER_NORM, blocks_of, contributions, model_of
from tests.support.zoo import DEPTH, ZOO, slow, tiny_model, tokens

SIGNALS = list(STREAM_SIGNALS)
PARALLEL = {"gpt_neox", "phi", "falcon", "cohere"}
QUICK = ("gpt2", "gpt_neox", "gemma2", "bloom", "granite")
PAIRS = [(one, two) for one in range(DEPTH + 1) for two in range(one, DEPTH + 1)]


@torch.no_grad()
def states_of(model: Any, ids: torch.Tensor, *, of_model: bool = True) -> list[torch.Tensor]:
    """Return the stream before each block and after the last one, float64.

    Args:
        model: the model.
        ids: tokens.
        of_model: take the streams before blocks from the model's own hidden states. The last one of these is normalized
            in most models, and in RWKV the first one is that after block 0.
    """
    before: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: before.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
        for block in blocks_of(model)
    ]
    handles.append(
        blocks_of(model)[-1].register_forward_hook(
            lambda _m, _a, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    try:
        hidden = model(ids, use_cache=False, output_hidden_states=of_model).hidden_states
    finally:
        for handle in handles:
            handle.remove()
    return [state.double() for state in (*(hidden[:DEPTH] if of_model else before), last[0])]


def check_maps(tables: dict[str, pd.DataFrame], states: list[torch.Tensor]) -> None:
    """Compare the maps with means over sequences and tokens of the definitions."""
    for name in ("cka", "cosine"):
        assert list(zip(tables[name]["from"], tables[name]["to"], strict=True)) == PAIRS
    for name, skip in (("cka", 0), ("cka_without_first", 1)):
        hsic = {
            (one, two): np.mean([dense_hsic(x[skip:], y[skip:]) for x, y in zip(states[one], states[two], strict=True)])
            for one, two in PAIRS
        }
        for (one, two), found in zip(PAIRS, tables["cka"][name], strict=True):
            meant = hsic[one, two] / np.sqrt(hsic[one, one] * hsic[two, two])
            assert found == pytest.approx(meant, abs=1e-5), (one, two)
        same = tables["cka"].query("`from` == to")
        assert (same[name] == 1).all()
        assert (same[f"{name}_sem"].dropna() == 0).all()  # NaN for one sequence
    for (one, two), found in zip(PAIRS, tables["cosine"].cosine, strict=True):
        cosine = torch.nn.functional.cosine_similarity(states[one], states[two], dim=-1).mean()
        assert found == pytest.approx(float(cosine), abs=1e-5), (one, two)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in BRANCH_MODULES])
def test_every_value_is_what_the_dense_way_gives(name: str) -> None:
    model, ids = model_of(name), tokens(3, 11)
    tables = ls.analyses.measure(model, ids, SIGNALS, batch_size=2)
    states = states_of(model, ids)
    if name in LAYER_NORM:
        states = [state - state.mean(-1, keepdim=True) for state in states]
    check_maps(tables, states)

    own, table = contributions(model, name, ids), tables["stream"]
    for layer, before in enumerate(states[:-1]):
        found = table.loc[layer]
        assert found.stream_norm == pytest.approx(float(before.norm(dim=-1).mean()), rel=1e-5)
        assert found.first_token_norm == pytest.approx(float(before[:, 0].norm(dim=-1).mean()), rel=1e-5)
        variances = [float(states[state].var(-1, correction=0).mean()) for state in (layer, layer + 1)]
        assert found.stream_variance == pytest.approx(variances[0], rel=1e-5)
        assert found.variance_growth == pytest.approx(variances[1] / variances[0], rel=1e-5)
        added_to = {"attention": before, "mlp": before if name in PARALLEL else before + own["attention", layer]}
        for branch, stream in added_to.items():
            added = own[branch, layer]
            meant = float((added.norm(dim=-1) / stream.norm(dim=-1)).mean())
            assert found[f"{branch}_to_stream"] == pytest.approx(meant, rel=1e-4), (layer, branch)
            cosine = torch.nn.functional.cosine_similarity(added, stream, dim=-1).mean()
            assert found[f"{branch}_cosine"] == pytest.approx(float(cosine), abs=1e-4), (layer, branch)


@pytest.mark.parametrize("name", [name if name in ("rwkv", "jamba") else slow(name) for name in ZOO])
def test_the_states_are_those_of_every_architecture(name: str) -> None:
    model, ids = tiny_model(name), tokens(2, 9)
    states = states_of(model, ids, of_model=False)
    measurer = make_measurer(model, ["cka"], DEPTH)
    assert measurer.observer is not None
    if measurer.observer.reads_are_mean_free:
        states = [state - state.mean(-1, keepdim=True) for state in states]
    check_maps(ls.analyses.measure(model, ids, ["cka", "cosine"]), states)


@pytest.mark.parametrize("name", ["gpt2", slow("llama"), slow("bloom"), slow("gemma2"), "gpt_oss"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_counts_for_nothing(name: str, left: bool) -> None:
    """A padded sequence, one of padding alone and one with too few tokens leave the numbers of the sequence itself."""
    model, ids = tiny_model(name), tokens(1, 9)
    padding, nothing = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 13, dtype=torch.long)
    padded = torch.cat([padding, ids] if left else [ids, padding], 1)
    mask = torch.cat([padding, torch.ones_like(ids)] if left else [torch.ones_like(ids), padding], 1)
    meant = ls.analyses.measure(model, ids, SIGNALS)
    found = ls.analyses.measure(model, torch.cat([nothing, padded]), SIGNALS, attention_mask=torch.cat([nothing, mask]))
    for signal in SIGNALS:
        columns = meant[signal].select_dtypes("float").columns
        np.testing.assert_allclose(found[signal][columns], meant[signal][columns], atol=1e-5, rtol=1e-4)
        assert meant[signal].filter(like="_sem").isna().all(axis=None)  # of one sequence
        assert (set(found[signal].tokens), set(found[signal].sequences)) == ({9}, {1})


def test_short_sequences_have_no_cka_and_are_named() -> None:
    model, ids, mask = tiny_model("llama"), tokens(4, 8), torch.ones(4, 8, dtype=torch.long)
    mask[1, 3:] = mask[2, 4:] = 0
    with pytest.warns(UserWarning, match="cka of 1 sequence was skipped: HSIC needs at least four tokens"):
        tables = ls.analyses.measure(model, ids, SIGNALS, attention_mask=mask)
    assert "cka_without_first of 2 sequences" in tables["cka"].attrs["skipped"]
    assert (set(tables["cka"].tokens), set(tables["cka"].sequences)) == ({20}, {3})
    assert (set(tables["cosine"].tokens), set(tables["cosine"].sequences)) == ({23}, {4})
    with pytest.warns(UserWarning, match="cka_without_first of 1 sequence"):
        meant = ls.analyses.cka(model, ids[[0, 2, 3]], attention_mask=mask[[0, 2, 3]])
    columns = ["cka", "cka_sem", "cka_without_first", "cka_without_first_sem"]
    np.testing.assert_allclose(tables["cka"][columns], meant[columns], atol=1e-6)
    with pytest.warns(UserWarning, match="cka of 2 sequences"):
        nothing = ls.analyses.cka(model, ids[:2, :3])
    assert nothing[columns].isna().all(axis=None)
    assert set(nothing.tokens) == {0}
    assert describe_map(nothing) == ""


def test_a_mask_may_have_holes() -> None:
    model, ids, mask = tiny_model("mamba"), tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    tables = ls.analyses.measure(model, ids, ["cka", "cosine"], attention_mask=mask)
    observed = make_measurer(model, ["cka"], DEPTH).runner
    with observed.inference_mode():
        record = observed.record({"input_ids": ids, "attention_mask": mask, "use_cache": False}, range(DEPTH + 1))
    check_maps(tables, [record.states[state][:, mask[0] == 1].double() for state in range(DEPTH + 1)])


@pytest.mark.parametrize("name", ["opt", slow("llama"), slow("phi"), slow("jamba")])
def test_any_split_into_batches_gives_the_same_sums(name: str) -> None:
    ids, mask = tokens(5, 10), torch.ones(5, 10, dtype=torch.long)
    mask[3, 6:] = 0
    measurer = make_measurer(tiny_model(name), SIGNALS, DEPTH)
    at_once = collect_sums(measurer, ids, mask, 5, None)
    for size in (1, 2):
        split = collect_sums(measurer, ids, mask, size, None)
        np.testing.assert_allclose(split.observed, at_once.observed, rtol=2e-5, atol=2e-5)


def test_measured_together_they_are_those_measured_apart() -> None:
    model, ids = tiny_model("gpt_neox"), tokens(3, 10)
    every = ["lens", "norms", "similarity", *SIGNALS]
    together = ls.analyses.measure(model, ids, every)
    for signal in SIGNALS:
        pd.testing.assert_frame_equal(ls.analyses.measure(model, ids, [signal])[signal], together[signal])
    norms = ls.analyses.measure(model, ids, ["norms"])["norms"]
    pd.testing.assert_frame_equal(together["norms"], norms)


def test_a_branch_that_is_missing_is_named_and_the_stream_is_measured() -> None:
    with pytest.warns(UserWarning, match="mlp contribution of block 0 was skipped: the block has no mlp"):
        table = ls.analyses.stream(tiny_model("mamba"), tokens(2, 8))
    assert table.mlp_to_stream.isna().all()
    assert table.attention_to_stream.notna().all()
    with pytest.warns(UserWarning, match="attention contribution of block 0 was skipped: .* both mix tokens"):
        table = ls.analyses.stream(tiny_model("rwkv"), tokens(2, 8))
    assert table.attention_cosine.isna().all()
    assert table[["stream_norm", "variance_growth"]].notna().all(axis=None)


@pytest.mark.parametrize("name", ["llama", slow("opt"), slow("gpt_oss")])
def test_weights_may_be_kept_on_disk(name: str, tmp_path: Path) -> None:
    plain, away = dispatched(tmp_path, name, {"": "disk"})
    ids = tokens(2, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meant, found = (ls.analyses.measure(model, ids, SIGNALS) for model in (plain, away))
    for signal in SIGNALS:
        pd.testing.assert_frame_equal(found[signal], meant[signal])


def test_half_precision() -> None:
    model, ids = tiny_model("llama"), tokens(3, 12)
    full = ls.analyses.measure(model, ids, SIGNALS)
    half = ls.analyses.measure(model.to(torch.bfloat16), ids, SIGNALS)
    for signal in SIGNALS:
        columns = [column for column in full[signal].select_dtypes("float") if not column.endswith("_sem")]
        np.testing.assert_allclose(half[signal][columns], full[signal][columns], rtol=3e-2, atol=2e-2)


def test_the_states_of_a_batch_are_counted_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain, mapped = (make_measurer(model, signals, DEPTH) for signals in (["lens"], ["lens", "cka"]))
    kept = (DEPTH + 1) * 3 * 16 * mapped.runner.width * 4
    assert mapped.memory_use(3, 16).streams - plain.memory_use(3, 16).streams == kept
    monkeypatch.setattr("layersurgery.sweeps.memory.free_memory", lambda _: 1 << 21)
    assert mapped.suggest(16) < plain.suggest(16)


def maps(depth: int, *names: str) -> pd.DataFrame:
    states = range(depth + 1)
    pairs = [(one, two) for one in states for two in states[one:]]
    frame = pd.DataFrame(pairs, columns=["from", "to"])
    value = 1 - (frame["to"] - frame["from"]) / (depth + 1)
    return frame.assign(**dict.fromkeys(names or ("cka", "cka_without_first"), value))


def test_words_name_the_block_that_changes_most_and_the_longest_span() -> None:
    frame = maps(3).assign(cka=[1, 0.2, 0.1, 0.1, 1, 0.95, 0.85, 1, 0.92, 1])
    assert describe("cka", {"cka": frame}) == (
        "CKA of the streams: before and after a block, lowest for block 0 (0.2) and highest for block 1 (0.95); "
        "longest span of blocks over which it stays at least 0.9: 1:2; before and after all blocks: 0.1. "
        "CKA without the first token of each sequence: before and after a block, lowest for block 0 "
        "(0.75) and highest for block 0 (0.75); before and after all blocks: 0.25."
    )
    assert describe("cosine", {"cosine": maps(1, "cosine")}) == (
        "Cosine of the streams: 0.5 before and after the only block."
    )


@pytest.mark.parametrize("depth", [1, 6, slow(80)])
def test_figures_are_maps_of_every_pair(depth: int) -> None:
    missing = maps(depth)
    missing.loc[1, "cka"] = np.nan
    models = [ModelTables({"cka": frame}, name, "no text") for frame, name in ((maps(depth), "a$"), (missing, "b$"))]
    for drawn in (models[:1], models):
        figure: Figure = signal_figures(drawn)["cka"]
        meant = 1 - abs(np.subtract.outer(range(depth + 1), range(depth + 1))) / (depth + 1)
        for axis in figure.axes[: 2 * len(drawn)]:
            cells = drawn_cells(axis)
            np.testing.assert_allclose(cells[~np.isnan(cells)], meant[~np.isnan(cells)])
    assert [axis.get_title(loc="left").partition(":")[0] for axis in figure.axes[:4]] == ["a$", "a$", "b$", "b$"]
    assert [int(np.isnan(drawn_cells(axis)).sum()) for axis in figure.axes[:4]] == [0, 0, 2, 0]


def drawn_cells(axis: Axes) -> np.ndarray:
    (image,) = axis.get_images()
    return np.ma.filled(np.ma.asarray(image.get_array()), np.nan)

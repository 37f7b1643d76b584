"""Every table of the public API goes through what pandas' users do with tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import layersurgery as ls
from layersurgery.analyses import neuron_probes
from tests.analyses import test_probe, test_subjoiners, test_word_senses
from tests.support.demo_model import make_tokenizer
from tests.support.tiny_checkpoint import tiny_tokenizer
from tests.support.zoo import tiny_model, tokens

SIGNALS = ["lens", "attention", "norms", "similarity", "cka", "cosine", "stream", "drop"]
WRITTEN = ["stages", "boundaries", "rank", "spans", "heads", "results"]
WINDOWS = {
    "probe": ("probes", "single_neurons", "top_k", "effects"),
    "subjoiners": ("heads", "attention", "examples"),
}
NAMES = [
    "sweep",
    "rank",
    "spans",
    "costs",
    "search",
    "tried",
    "stages",
    "neurons",
    "neuron_scores",
    "wic",
    *SIGNALS,
    *(f"{analysis}.{table}" for analysis, names in WINDOWS.items() for table in names),
    *(f"read {table}" for table in WRITTEN),
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    model, ids = tiny_model("llama"), tokens(3, 12)
    rank, search = ls.rank(model, ids), ls.search(model, ids, remove=2, beam=2)
    found = {
        "sweep": ls.sweep(model, "drop", ids),
        "rank": rank,
        "spans": ls.analyses.spans(rank),
        "costs": ls.prune(model, ids, remove=2, greedy=True).costs,
        "search": search.results,
        "tried": search.tried,
        "stages": ls.analyses.stages(model, ids),
        "neurons": ls.analyses.neurons(model),
        "neuron_scores": ls.analyses.neuron_scores(model),
        "wic": ls.analyses.wic(test_word_senses.knowing(), make_tokenizer(), test_word_senses.toy_rows(each=8)),
        **ls.analyses.measure(model, ids, SIGNALS),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuron_probes, "NEURONS", 4)
        patch.setattr(neuron_probes, "SHUFFLES", 2)
        windows: dict[str, Any] = {
            "probe": ls.analyses.probe(
                test_probe.knowing(), tiny_tokenizer(), [test_probe.story()], regex="^x$", samples=40
            ),
            "subjoiners": ls.analyses.subjoiners(
                test_subjoiners.joiner(), tiny_tokenizer(), [test_subjoiners.story()], samples=20
            ),
        }
    found |= {
        f"{analysis}.{table}": getattr(windows[analysis], table)
        for analysis, names in WINDOWS.items()
        for table in names
    }
    path = tmp_path_factory.mktemp("runs")
    ls.sweep(model, "drop", ids, directory=path / "sweep")
    ls.rank(model, ids, directory=path / "rank")
    ls.analyses.stages(model, ids, directory=path / "stages")
    ls.analyze("heads", model, ids, directory=path / "heads")
    homes = {"spans": "rank", "boundaries": "stages", "results": "sweep"}
    return found | {f"read {table}": ls.read_results(path / homes.get(table, table), table) for table in WRITTEN}


@pytest.mark.parametrize("name", NAMES)
def test_pandas_can_handle_it(tables: dict[str, pd.DataFrame], name: str, tmp_path: Path) -> None:
    frame = tables[name]
    assert json.loads(json.dumps(frame.attrs, allow_nan=False)) == frame.attrs

    number = next(column for column in frame.select_dtypes("number") if frame[column].notna().all())
    assert frame.nsmallest(2, number)[number].tolist() == sorted(frame[number])[:2]

    other = frame.copy()
    other.attrs = {**copy.deepcopy(frame.attrs), "skipped": {"a block": "of another run"}}
    for pair in ([frame, frame], [frame, other]):
        assert len(pd.concat(pair)) == 2 * len(frame)
        assert len(pair[0].merge(pair[1].head(2), left_index=True, right_index=True, suffixes=("", "_other"))) == 2

    frame.to_parquet(tmp_path / "table.parquet")
    back = pd.read_parquet(tmp_path / "table.parquet")
    again = copy.deepcopy(frame)
    for same in (back, again):
        pd.testing.assert_frame_equal(pd.DataFrame(same), pd.DataFrame(frame))
        assert same.attrs == frame.attrs


def test_no_table_is_left_out(tables: dict[str, pd.DataFrame]) -> None:
    assert list(tables) == NAMES
    public = set(ls.analyses.__all__) - {
        "describe_stages",
        "measure",
        "Probe",
        "Pruning",
        "Search",
        "Subjoiners",
        "prune",
    }
    assert public <= {name.partition(".")[0] for name in NAMES}


def test_spans_are_those_of_the_ranking(tables: dict[str, pd.DataFrame]) -> None:
    pd.testing.assert_frame_equal(
        ls.analyses.spans(tables["read rank"]), pd.DataFrame(tables["read spans"]), check_like=True
    )
    pd.testing.assert_frame_equal(
        tables["spans"].drop(columns="model"), ls.analyses.spans(tables["read rank"]).drop(columns="model")
    )
    with pytest.raises(ls.MeasurementError, match="this table has no spans: give the table that rank"):
        ls.analyses.spans(tables["lens"])

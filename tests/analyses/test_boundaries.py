"""Boundaries between stages are found where they were planted, and not found where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import layersurgery as ls
from layersurgery.analyses import stage_boundaries
from layersurgery.analyses.stage_boundaries import boundaries, stage_of
from layersurgery.registry import STAGES
from tests.support.zoo import DEPTH, tiny_model, tokens

L = 24
DETOKENIZED, BENT, OVERTAKEN = 3, 12, 20


def planted(**changed: Any) -> dict[str, Any]:
    """Signals of a model with four stages, as the paper draws them."""
    layers = np.arange(L, dtype=float)
    signals = {
        "drop_kl_nats": np.where(layers < DETOKENIZED, 6.0, 0.1),
        "attention_prev5": np.where(layers < DETOKENIZED, 0.8, 0.3),
        "lens_kl_nats": np.where(layers < BENT, 10 - 0.05 * layers, 9.45 - 0.8 * (layers - BENT + 1)),
        "lens_entropy_bits": np.where(layers < BENT, 4.0, 4 - 0.1 * (layers - BENT)),
        "prediction": np.where(layers < BENT, 2.0, np.where(layers < OVERTAKEN, 60.0, 30.0)),
        "suppression": np.where(layers < OVERTAKEN, 1.0, 150.0),
        "neurons": np.full(L, 1000.0),
    }
    return signals | changed


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_boundaries, "RESAMPLES", 200)


def noisy(size: float) -> Any:
    def draw(rng: np.random.Generator) -> dict[str, Any]:
        return {
            name: values * (1 + size * rng.normal(size=L)) if name.endswith(("nats", "bits", "prev5")) else values
            for name, values in planted().items()
        }

    return draw


def test_planted_stages_are_found_with_their_intervals() -> None:
    found = boundaries(planted(), noisy(0.01))
    assert [boundary.layer for boundary in found] == [DETOKENIZED, BENT, OVERTAKEN]
    for boundary in found:
        assert boundary.low is not None
        assert boundary.low <= boundary.layer <= boundary.high  # type: ignore[operator]
        assert boundary.high - boundary.low <= 2  # type: ignore[operator]
        assert boundary.share == 1
    assert stage_of(found, L) == [STAGES[0]] * 3 + [STAGES[1]] * 9 + [STAGES[2]] * 8 + [STAGES[3]] * 4
    assert boundaries(planted(), noisy(0.01)) == found


def test_noise_widens_intervals_and_in_the_end_nothing_is_found() -> None:
    assert boundaries(planted(), noisy(0.6))[1].layer is None
    worst = boundaries(planted(), noisy(0.6))[1]
    assert worst.share is not None
    assert worst.share < 0.9
    assert "but only in" in worst.why
    assert worst.why.endswith("% of resamples")


@pytest.mark.parametrize(
    ("changed", "place", "why"),
    [
        (
            {"attention_prev5": np.full(L, 0.3)},
            0,
            "attention to the previous five tokens is not clearly higher at the start",
        ),
        ({"drop_kl_nats": np.full(L, 0.1)}, 0, "drop KL is not clearly higher at the start"),
        ({"attention_prev5": np.full(L, np.nan)}, 0, "is not available for every layer"),
        (
            {"attention_prev5": np.where((np.arange(L) < 3) | (np.arange(L) // 3 == 2), 0.8, 0.3)},
            0,
            "but is high again at layers 6, 7, 8",
        ),
        ({"lens_kl_nats": np.linspace(10, 0, L)}, 1, "lens KL has no lasting fall"),
        ({"lens_kl_nats": np.linspace(0, 10, L)}, 1, "lens KL has no lasting fall"),
        ({"suppression": np.zeros(L)}, 2, "suppression neurons do not outnumber prediction neurons in the last two"),
        ({"suppression": planted()["prediction"] + (np.arange(L) >= OVERTAKEN)}, 2, "which may be chance"),
        ({"prediction": np.full(L, np.nan)}, 2, "neuron counts are not available"),
    ],
)
def test_what_signals_do_not_support_is_not_found(changed: dict[str, Any], place: int, why: str) -> None:
    found = boundaries(planted(**changed))
    assert found[place].layer is None
    assert why in found[place].why
    assert found[place].low is found[place].share is None
    others = [DETOKENIZED, BENT, OVERTAKEN]
    assert [boundary.layer for number, boundary in enumerate(found) if number != place] == [
        layer for number, layer in enumerate(others) if number != place
    ]


def test_one_spike_does_not_count_as_a_level() -> None:
    values = planted()["drop_kl_nats"]
    values[8] = 5
    assert boundaries(planted(drop_kl_nats=values))[0].layer == DETOKENIZED


@pytest.mark.parametrize("factor", [0, 0.05, 3, 20, 1000])
@pytest.mark.parametrize(
    ("name", "place"),
    [("drop_kl_nats", 0), ("attention_prev5", 0), ("lens_kl_nats", 1), ("prediction", 2), ("suppression", 2)],
)
def test_one_outlying_layer_moves_a_boundary_only_next_to_it(name: str, place: int, factor: float) -> None:
    boundary = [DETOKENIZED, BENT, OVERTAKEN][place]
    moved = {}
    for layer in range(L):
        values = planted()[name].copy()
        values[layer] *= factor
        found = boundaries(planted(**{name: values}))[place].layer
        if found != boundary:
            moved[layer] = found
    # The lines are exact without the layer. Next to a step, the values are also those of a step at another layer.
    assert not moved or name != "lens_kl_nats"
    assert all(found is not None and abs(found - boundary) <= 2 for found in moved.values())
    assert all(-1 <= layer - boundary <= 1 for layer in moved)


@pytest.mark.parametrize("factor", [0, 0.05, 3, 20])
def test_one_outlying_layer_does_not_turn_the_entropy(factor: float) -> None:
    layers = np.arange(L)
    for entropy in (2 + np.where(layers <= 18, layers / 4, 4.5 - (layers - 18) / 2), 1 + np.abs(layers - 17) / 4):
        boundary = boundaries(planted(suppression=np.zeros(L), lens_entropy_bits=entropy))[2].layer
        assert boundary is not None
        for layer in range(L):
            values = entropy.copy()
            values[layer] *= factor
            found = boundaries(planted(suppression=np.zeros(L), lens_entropy_bits=values))[2].layer
            assert found is not None
            assert abs(found - boundary) <= (abs(layer - boundary) <= 3)


@pytest.mark.parametrize("factor", [0, 0.05, 20, 1000])
def test_flat_signals_with_one_outlying_layer_have_no_boundary(factor: float) -> None:
    levels = {
        "drop_kl_nats": 0.5, "attention_prev5": 0.3, "lens_kl_nats": 8, "lens_entropy_bits": 3, "prediction": 30,
        "suppression": 30,
    }  # fmt: skip
    flat = planted(**{name: np.full(L, float(level)) for name, level in levels.items()})
    assert [boundary.layer for boundary in boundaries(flat)] == [None] * 3
    for name in levels:
        for layer in range(L):
            values = flat[name].copy()
            values[layer] *= factor
            assert [boundary.layer for boundary in boundaries(flat | {name: values})] == [None] * 3, (name, layer)


def test_noise_on_flat_signals_has_no_bend() -> None:
    rng = np.random.default_rng(0)
    found = [boundaries(planted(lens_kl_nats=10 + rng.normal(size=L)))[1].layer for _ in range(100)]
    assert found.count(None) >= 97


def test_the_most_common_kind_of_layer_decides_where_kinds_differ() -> None:
    kinds = [("sliding attention", "full attention")[layer % 5 > 2] for layer in range(L)]
    is_full = np.array(kinds) == "full attention"
    drop_kl = np.where(is_full, 8, planted()["drop_kl_nats"])
    attention = np.where(is_full, 0.05, planted()["attention_prev5"])
    signals = planted(drop_kl_nats=drop_kl, attention_prev5=attention)
    assert "high again at layers 8, 9" in boundaries(signals)[0].why
    found = boundaries(signals, kinds=kinds)[0]
    assert found.layer == 5  # layers 3 and 4 are of the other kind
    assert "drop KL (15 of 24 layers: sliding attention) falls from 6 nats towards 0.1 nats by layer 5" in found.why
    alternating = ["sliding attention", "full attention"] * (L // 2)
    level = np.where(np.arange(L) < 5, 6.0, 0.1)
    signals = planted(drop_kl_nats=level * np.tile([1, 40], L // 2))
    found = boundaries(signals | {"attention_prev5": level}, kinds=alternating)[0]
    assert found.layer == 6  # the first layer of this kind after the step
    # Attention is compared where it is measured: linear attention has none.
    linear = ["linear attention" if layer % 3 else "full attention" for layer in range(L)]
    some = np.where(np.array(linear) == "full attention", level, np.nan)
    found = boundaries(planted(drop_kl_nats=level, attention_prev5=some), kinds=linear)[0]
    assert "attention to the previous five tokens (8 of 24 layers: full attention) falls" in found.why
    assert found.layer == 6


def test_entropy_may_give_the_last_boundary_where_neurons_do_not() -> None:
    layers = np.arange(L)
    found = boundaries(
        planted(suppression=np.zeros(L), lens_entropy_bits=np.where(layers <= 18, layers / 4, 4.5 - (layers - 18) / 2))
    )
    assert (found[2].layer, found[2].by) == (19, "lens_entropy_bits")
    rising = boundaries(planted(suppression=np.zeros(L), lens_entropy_bits=np.abs(layers - 17) / 4))
    assert (rising[2].layer, rising[2].why.rpartition("; ")[2]) == (
        18,
        "lens entropy turns after layer 17 and rises by 1.2 bits",
    )
    steady = boundaries(planted(suppression=np.zeros(L), lens_entropy_bits=layers / 4))
    assert steady[2].layer is None
    assert "lens entropy has no turning point inside the second half" in steady[2].why


def test_entropy_that_is_missing_is_not_a_model_of_too_few_layers() -> None:
    neurons = {"prediction": np.zeros(3), "suppression": np.zeros(3), "neurons": np.full(3, 100.0)}
    signals = ("drop_kl_nats", "attention_prev5", "lens_kl_nats", "lens_entropy_bits")
    short = boundaries({name: np.array([3.0, 2.0, 1.0]) for name in signals} | neurons)
    assert short[2].layer is None
    assert short[2].why.endswith("; the model has too few layers for lens entropy to turn inside the second half")
    entropy = planted()["lens_entropy_bits"]
    entropy[7] = np.nan
    missing = boundaries(planted(suppression=np.zeros(L), lens_entropy_bits=entropy))
    assert missing[2].layer is None
    assert missing[2].why.endswith("; lens entropy is not available for every layer")


def test_stages_come_in_their_order() -> None:
    late = np.where(np.arange(L) < 11, 6.0, 0.1)
    lens_kl = np.maximum(0, np.where(np.arange(L) < 6, 10, 10 - 0.5 * (np.arange(L) - 5.0)))
    found = boundaries(planted(drop_kl_nats=late, attention_prev5=late / 6, lens_kl_nats=lens_kl))
    assert found[0].layer == 11
    assert found[1].layer is None
    assert "not after the end of the previous stage" in found[1].why
    assert stage_of(found, L)[12] == "feature engineering or prediction ensembling"


def test_the_table_of_a_model() -> None:
    model, ids = tiny_model("gpt2"), tokens(4, 14)
    frame = ls.analyses.stages(model, ids)
    parts = ls.analyses.measure(model, ids, ["lens", "attention", "norms", "drop"])
    assert list(frame.lens_kl_nats) == list(parts["lens"].lens_kl_nats)
    assert list(frame.attention_prev5_sem) == list(parts["attention"].attention_prev5_sem)
    assert list(frame.attention_to_mlp_ratio) == list(parts["norms"].attention_to_mlp_ratio)
    assert list(frame.drop_kl_nats) == list(parts["drop"].kl_nats[1:])
    assert list(frame.prediction_percent) == list(ls.analyses.neurons(model).prediction_percent)
    stage_boundaries = frame.attrs["boundaries"]
    assert [boundary["ends"] for boundary in stage_boundaries] == list(STAGES[:3])
    assert len(frame.stage) == DEPTH
    words = ls.analyses.describe_stages(frame)
    for boundary in stage_boundaries:
        assert boundary["why"] in words
    assert all(boundary["share"] is not None for boundary in stage_boundaries)
    alone = ls.analyses.stages(model, ids[:1])
    assert all(boundary["share"] is None for boundary in alone.attrs["boundaries"])


def test_a_model_without_neurons_has_stages_all_the_same() -> None:
    with pytest.warns(UserWarning, match="neurons were skipped: MambaForCausalLM"):
        frame = ls.analyses.stages(tiny_model("mamba"), tokens(3, 12))
    assert frame.prediction_percent.isna().all()
    assert "neuron counts are not available for every layer" in ls.analyses.describe_stages(frame)

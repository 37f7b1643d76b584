"""What the tables of analyses show, in words."""

from __future__ import annotations

import numpy as np
import pandas as pd

from layersurgery.analyses.descriptions import describe, describe_costs, describe_curves, describe_ranks
from layersurgery.registry import CRITERIA, column


def ranks(layers: int = 12) -> pd.DataFrame:
    frame = pd.DataFrame({"layer": range(layers), "kl_nats": np.arange(layers, 0, -1) / 10})
    return frame.assign(block_influence=frame.kl_nats**2, angular_distance=1 - frame.kl_nats / 2)


def test_ranks_name_the_cheapest_layers_and_how_far_the_scores_agree() -> None:
    words = describe_ranks(ranks())
    assert words.startswith(
        "Lowest KL when removed: layers 11, 10, 9, 8 (0.1 to 0.4 nats), measured one layer at a time."
    )
    # A score in the same order agrees entirely, one in the opposite order not at all.
    assert "layers 11, 10, 9, 8 (4 of 4 in common; rank correlation with KL 1.00)" in words
    assert "layers 0, 1, 2, 3 (0 of 4 in common; rank correlation with KL -1.00)" in words
    assert "Spans" not in words
    spans = pd.DataFrame(
        {"layer": [0, 1, 2, 0, 1], "span": [1, 1, 1, 2, 2], "angular_distance": [0.3, 0.1, 0.2, 0.5, 0.6]}
    )
    assert describe("rank", {"rank": ranks(3), "spans": spans}).endswith("angular distance: 1:2, 0:2.")


def test_layers_that_could_not_be_measured_are_not_the_cheapest() -> None:
    frame = ranks(6)
    frame.loc[[5, 4], "kl_nats"] = np.nan
    assert describe_ranks(frame).startswith("Lowest KL when removed: layers 3, 2 (0.3 to 0.4 nats)")
    assert describe_ranks(frame.assign(kl_nats=np.nan)) == "No layer could be removed and measured."
    assert "correlation" not in describe_ranks(frame.assign(block_influence=0.5, angular_distance=0.5))


def costs() -> pd.DataFrame:
    rows = [("unedited", 0, "", 20.0, 0.0, 1.0)]
    rows += [("kl", 1, "drop 5", 21.0, 0.1, 0.9), ("influence", 1, "drop 5", 21.0, 0.1, 0.9)]
    rows += [("kl", 2, "drop 4 5", 40.0, 0.5, 0.7), ("influence", 2, "drop 3 5", 30.0, 0.25, 0.8)]
    frame = pd.DataFrame(rows, columns=["criterion", "removed", "plan", "perplexity", "kl_nats", "agreement"])
    return frame.assign(depth=6)


def test_costs_are_those_of_the_best_criterion() -> None:
    one, two, others = describe_costs(costs()).split(". ", 2)
    assert one == (
        "Without 1 of 6 layers (drop 5; every criterion): perplexity 20 before, 21 after, KL 0.1 nats, "
        "top-1 agreement 90 %"
    )
    assert two.startswith(
        f"Without 2 of 6 layers (drop 3 5; criterion: {CRITERIA['influence']}): perplexity 20 before, 30"
    )
    assert others == f"KL by the other criteria: {CRITERIA['kl']} (0.5 nats)."
    unmeasured = costs().assign(kl_nats=[0.0, *[np.nan] * 4])
    assert describe_costs(unmeasured) == "No model without some of its layers could be measured."


def test_curves_name_the_ends_in_the_units_of_the_registry() -> None:
    frame = pd.DataFrame({"layer": [0, 1, 2], "lens_agreement": [0.25, 1.0, 0.5], "attention_norm": [2.0, 2.0, 2.0]})
    label = column("lens_agreement").label
    assert describe_curves(frame) == (
        "Norm of the attention's contribution: 2 in every layer. "
        f"{label[0].upper()}{label[1:]}: highest in layer 1 (100 %), lowest in layer 0 (25 %)."
    )
    parts = pd.DataFrame({"layer": [0, 0, 1, 1], "part": ["mlp", "block"] * 2, "self": [9.0, 0.5, -9.0, 0.25]})
    assert "highest in layer 0 (0.5), lowest in layer 1 (0.25)" in describe("similarity", {"similarity": parts})


def test_what_cannot_be_described_has_no_words() -> None:
    assert (
        describe("rank", {}) == describe("unknown", {"unknown": ranks()}) == describe("lens", {"lens": ranks(0)}) == ""
    )
    nothing = pd.DataFrame({"layer": [0, 1], "lens_kl_nats": [np.nan, np.nan]})
    assert describe("lens", {"lens": nothing}) == ""

"""A sweep equals operate, forward and dense float64 metrics, for every family of edits and architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layersurgery as ls
from layersurgery.metrics.reference import METRICS, measure
from layersurgery.plans.families import FAMILIES
from layersurgery.plans.variants import Variant, family, variants
from layersurgery.sweeps.measurer import Measurer
from tests.support.reference import logits_along, logits_of
from tests.support.zoo import DEPTH, ZOO, tiny_model, tokens
from tests.surgery.test_zoo import state

EDITS = [
    "swap",
    "drop",
    "skip-attention",
    "skip-mlp",
    "drop-span:4",
    {"mine": "repeat 2:4; swap 0 5", "skips": "skip-mlp 1; drop 3"},
    "drop-spans",
    "repeat-spans:3",
    "jump",
    "replace",
    "swap-pairs",
    "copy:1",
    "exit",
    "reverse-middle",
    "shuffle:2",
    "centre",
    "scale:0.5",
    "scale-attention:-1",
    "scale-mlp:2",
    {"heads": "heads-off 0 of 2; swap 1 2"},
    "parallel-pairs",
    {"parallel": "average 1:4; parallel 4 5; repeat 0"},
    {"later": "drop 2 from 1; scale-mlp 3 0.5 from 4"},
    {"neurons": "neurons-off 0:3 of 2; repeat 2"},
]
# Families of which a sweep leaves some edits out, and why.
LEFT_OUT = {
    ("rwkv", "swap"): "block 0 holds the norm of the embedding",
    ("rwkv", "drop"): "block 0 holds the norm of the embedding",
    ("nemotron_h", "skip-attention"): "has no attention",
    ("nemotron_h", "skip-mlp"): "has no mlp",
    ("nemotron_h", "scale-attention:-1"): "it has none",
    ("nemotron_h", "scale-mlp:2"): "it has none",
}


def wanted(model: Any, edits: list[Any]) -> list[Variant]:
    """Everything of the families that this architecture can do at all, and plans of one's own if it can do them."""
    blocks = ls.anatomy(model)
    found: list[Variant] = []
    for edit in edits:
        of_edit = made(edit, None if edits == EDITS else 2)
        try:
            Measurer(model, of_edit, anatomy=blocks)
        except ls.UnsupportedEditError:
            continue
        found += of_edit
    return found


def made(edit: Any, max_span: int | None) -> list[Variant]:
    """The edits of a family, or the plans; `max_span` bounds the families that take it."""
    is_bounded = isinstance(edit, str) and FAMILIES[edit.partition(":")[0]].bounded
    return variants(edit, DEPTH, max_span=max_span if is_bounded else None)


# Drops, which every architecture can do in part, and another family in turn; the slow tests measure all in one sweep.
OTHERS = [edit for edit in EDITS if edit != "drop"]
TWO = [pytest.param(name, ["drop", OTHERS[turn % len(OTHERS)]], id=name) for turn, name in enumerate(ZOO)]
ALL = [pytest.param(name, EDITS, id=f"{name}-all", marks=pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize(("name", "edits"), [*TWO, *ALL])
def test_a_sweep_is_operating_and_comparing(name: str, edits: list[Any]) -> None:
    model, ids = tiny_model(name), tokens(2, 10)
    logits = logits_of(model, ids)  # some note in their modules that they ran
    before = state(model)
    measurer = Measurer(model, wanted(model, edits))
    measured = measurer.measure(ids, torch.ones_like(ids))
    assert state(model) == before
    assert measured.counts == [9, 9]
    assert measured.calls == measurer.schedule.calls
    assert measured.states_at_peak == measurer.schedule.states_at_peak
    p, target = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    compared = 0
    for row, variant in enumerate(measurer.variants):
        try:
            with ls.operate(model, variant.route, anatomy=measurer.runner.anatomy):
                q = logits_of(model, ids)
        except ls.UnsupportedEditError:  # no config can say it; the sweep has no need of one
            if not all(visit.whole for visit in variant.route):
                continue
            q = logits_along(model, variant.route, ids)
        meant = measure(p, q[:, :-1].flatten(0, 1), target).view(len(METRICS), 2, 9).sum(-1).T
        found = torch.from_numpy(measured.values[:, row])
        torch.testing.assert_close(found / 9, meant / 9, rtol=0, atol=1e-5, msg=f"{variant.plan}: {found} {meant}")
        for metric in ("agreement", "accuracy"):
            assert torch.equal(found[:, METRICS.index(metric)], meant[:, METRICS.index(metric)]), variant.plan
        compared += 1
    assert compared > (DEPTH if edits == EDITS else 0)
    skipped = {kind: LEFT_OUT[name, kind] for kind in edits if isinstance(kind, str) and (name, kind) in LEFT_OUT}
    for kind, reason in skipped.items():
        plans = {variant.plan for variant in family(kind, DEPTH)}
        reasons = [text for plan, text in measurer.skipped.items() if plan in plans]
        assert reasons
        assert all(reason in text for text in reasons)
    assert bool(measurer.skipped) == bool(skipped)

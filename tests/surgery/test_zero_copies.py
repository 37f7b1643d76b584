"""Copies with zero output projections: the model computes the same, is deeper, and the copies can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layersurgery as ls
from tests.checkpoints.test_zoo import reload
from tests.support.dense import blocks_of
from tests.support.reference import logits_of
from tests.support.unsupported import UNSUPPORTED_COPIES, UNSUPPORTED_COPIES_ON_DISK
from tests.support.zoo import DEPTH, rotate, tiny_model, tokens
from tests.surgery.test_zoo import state

PLANS = ["insert-copy 2 after 3", "insert-copy 3 after 3"]


@pytest.mark.parametrize(("name", "plan"), rotate(PLANS))
def test_the_function_stays_in_memory_and_on_disk(name: str, plan: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    logits = logits_of(model, tokens())
    model.save_pretrained(tmp_path / "source")
    before = state(model)
    if words := UNSUPPORTED_COPIES.get(name):
        with pytest.raises(ls.UnsupportedEditError, match=words), ls.operate(model, plan):
            pytest.fail("operated")
        with pytest.raises(ls.UnsupportedEditError, match=words):
            ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
        return
    with ls.operate(model, plan):
        assert torch.equal(logits_of(model, tokens()), logits)
        assert len(blocks_of(model)) > DEPTH
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert state(model) == before
    if words := UNSUPPORTED_COPIES_ON_DISK.get(name):
        with pytest.raises(ls.UnsupportedEditError, match=words):
            ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
        return
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    loaded = reload(tmp_path / "out")
    assert torch.equal(logits_of(loaded, tokens()), logits)
    reloaded = loaded.state_dict()
    assert all(torch.equal(value, reloaded[name]) for name, value in inside.items() if name in reloaded)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_copy_learns_and_the_original_does_not(name: str) -> None:
    model = tiny_model(name)
    logits = logits_of(model, tokens())
    ls.operate_(model, "insert-copy 2 after 2")
    blocks: Any = blocks_of(model)
    others = [block for number, block in enumerate(blocks) if number != 3]
    before = [parameter.detach().clone() for block in others for parameter in block.parameters()]
    model.requires_grad_(False)
    blocks[3].requires_grad_(True)
    optimizer = torch.optim.SGD(blocks[3].parameters(), lr=0.01)
    for _ in range(2):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert not torch.equal(logits_of(model, tokens()), logits)
    after = [parameter for block in others for parameter in block.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_sweep_sees_no_difference() -> None:
    model = tiny_model("gemma2")
    frame = ls.sweep(model, ["insert-copy 2 after 2", "insert-copy 0:2 before 4; drop 1"], tokens())
    row = frame[frame.plan == "insert-copy 2 after 2"].iloc[0]
    assert row.kl_nats == pytest.approx(0, abs=1e-9)
    assert row.agreement == 1
    assert row.loss_nats == frame.loss_nats.iloc[0]


def test_generation_with_a_cache_is_the_same() -> None:
    model = tiny_model("llama")
    expected = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    with ls.operate(model, "insert-copy 1:3 after 4"):
        found = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    assert torch.equal(found, expected)

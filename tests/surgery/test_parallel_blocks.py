"""Parallel and averaged blocks: in memory what a loop by hand computes, with a cache, and refused where files are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import layersurgery as ls
from layersurgery.plans.plan import Plan
from tests.support.dense import blocks_of
from tests.support.reference import logits_along, logits_of
from tests.support.unsupported import WRONG_WITH_CACHE
from tests.support.zoo import DEPTH, rotate, tiny_model, tokens
from tests.surgery.test_zoo import generated, state

EDITS = ["parallel 2 3", "average 1:4", "parallel 1:3; average 3:6", "parallel 0:6"]
WORDS = "parallel or averaged blocks, which no checkpoint can express"


@pytest.fixture
def model(name: str) -> Any:
    model = tiny_model(name)
    logits_of(model, tokens())  # some note in their modules that they ran
    return model


@pytest.mark.parametrize(("name", "plan"), rotate(EDITS))
def test_memory_is_a_loop_by_hand_and_undo_is_exact(model: Any, name: str, plan: str) -> None:
    before, logits = state(model), logits_of(model, tokens())
    with ls.operate(model, plan):
        found = logits_of(model, tokens())
    assert torch.equal(found, logits_along(model, Plan.parse(plan).route(DEPTH), tokens()))
    assert not torch.equal(found, logits)
    assert state(model) == before
    assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize(("name", "plan"), rotate(EDITS))
def test_generation_with_a_cache(model: Any, name: str, plan: str) -> None:
    if name in WRONG_WITH_CACHE:
        return
    with ls.operate(model, plan):
        (ids, logits), (meant_ids, meant_logits) = (generated(model, use_cache=use) for use in (True, False))
    assert torch.equal(ids, meant_ids)
    torch.testing.assert_close(logits, meant_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_trains_and_is_copied_and_no_checkpoint_is_written(model: Any, tmp_path: Path) -> None:
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ls.UnsupportedEditError, match=WORDS):
        ls.operate_(model, "parallel 2 3")
    assert not any("Parallel" in kind.__name__ for block in blocks_of(model) for kind in type(block).__mro__)
    ls.operate_(model, "parallel 2 3", verify=False)
    assert [name for name, _ in model.named_parameters()] == names
    meant = logits_of(model, tokens())
    assert torch.equal(logits_of(copy.deepcopy(model), tokens()), meant)
    for save in (lambda out: ls.save(model, out), model.save_pretrained, lambda _out: model.state_dict()):
        with pytest.raises(ls.UnsupportedEditError, match=WORDS):
            save(tmp_path / "out")
        assert not [*tmp_path.glob("out/*.safetensors")]
    with pytest.raises(ls.UnsupportedEditError, match="edited again"), ls.operate(model, "drop 2"):
        pytest.fail("operated")
    with pytest.raises(ls.UnsupportedEditError, match="edited again"):
        ls.sweep(model, "drop", tokens())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_are_those_of_the_sum(model: Any) -> None:
    ids, blocks, given = tokens(), blocks_of(model), {}

    def keep_input(_module: Any, args: Any) -> None:
        given["second"] = args[0]

    def exchange_input(_module: Any, args: Any) -> Any:
        given["third"] = args[0]
        return (given["second"], *args[1:])

    def add_to_stream(_module: Any, _args: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        summed = given["third"] + (own - given["second"])
        return (summed, *output[1:]) if isinstance(output, tuple) else summed

    handles = [
        blocks[2].register_forward_pre_hook(keep_input),
        blocks[3].register_forward_pre_hook(exchange_input),
        blocks[3].register_forward_hook(add_to_stream),
    ]
    model(ids, labels=ids).loss.backward()
    meant = [parameter.grad.clone() for parameter in model.parameters()]
    for handle in handles:
        handle.remove()
    for checkpointing in (False, True):
        model.zero_grad()
        with ls.operate(model, "parallel 2 3"):
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable()
            model(ids, labels=ids).loss.backward()
            hidden = model(ids, output_hidden_states=True).hidden_states
        assert len(hidden) == DEPTH + 1
        for parameter, gradient in zip(model.parameters(), meant, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama"])
def test_a_part_of_a_block_and_offloaded_weights(model: Any) -> None:
    from accelerate import cpu_offload

    for text in ("0:2 2[/4] 3 4 5[parallel]", "0:2 2[/3] 3[parallel][/2] 2[parallel] 5 4"):
        route = ls.Route.parse(text)
        along = logits_along(model, route, tokens())
        with ls.operate(model, route):
            assert torch.equal(logits_of(model, tokens()), along)
    with ls.operate(model, route):
        meant = logits_of(model, tokens())
    cpu_offload(model)
    with ls.operate(model, route):
        assert torch.equal(logits_of(model, tokens()), meant)
    plan = "parallel 2 3"
    with pytest.raises(ls.UnsupportedEditError, match="cannot be measured layer by layer"):
        ls.sweep(model, [plan], tokens())


@pytest.mark.parametrize("name", ["llama"])
def test_files_refuse(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ls.UnsupportedEditError, match="parallel blocks and averages cannot be expressed"):
        ls.edit_checkpoint(tmp_path / "source", "average 2:4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama"])
def test_branches_that_are_skipped_in_a_group(model: Any) -> None:
    with ls.operate(model, "skip-mlp 3"):
        meant = logits_along(model, Plan.parse("parallel 2 3").route(DEPTH), tokens())
    with ls.operate(model, "skip-mlp 3; parallel 2 3"):
        assert torch.equal(logits_of(model, tokens()), meant)

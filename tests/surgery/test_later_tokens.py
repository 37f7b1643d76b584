"""Edits that leave the first tokens as they are: what a hook computes, with a cache, and refused where files are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import layersurgery as ls
from tests.support.dense import BRANCH_MODULES, blocks_of
from tests.support.reference import logits_of
from tests.support.unsupported import LATER_EDITS, NO_POSITIONS, UNSUPPORTED_LATER, WRONG_WITH_CACHE
from tests.support.zoo import rotate, tiny_model, tokens
from tests.surgery.test_zoo import generated, state

WORDS = "changed at some tokens only, which no checkpoint can express"


@pytest.fixture
def model(name: str) -> Any:
    model = tiny_model(name)
    logits_of(model, tokens())  # some note in their modules that they ran
    return model


def refused(name: str, plan: str) -> str | None:
    return UNSUPPORTED_LATER.get((name, plan))


@pytest.mark.parametrize(("name", "plan"), rotate(LATER_EDITS))
def test_first_tokens_stay_later_ones_change_and_undo_is_exact(model: Any, name: str, plan: str) -> None:
    before, logits = state(model), logits_of(model, tokens())
    start = int(plan.rpartition(" ")[2])
    if words := refused(name, plan):
        with pytest.raises(ls.UnsupportedEditError, match=words), ls.operate(model, plan):
            pytest.fail("operated")
    else:
        with ls.operate(model, plan):
            found = logits_of(model, tokens())
        torch.testing.assert_close(found[:, :start], logits[:, :start], rtol=1e-4, atol=1e-5)
        changed = (found - logits).abs().amax(-1).amax(0)
        assert changed[start] > 1e-4
        with ls.operate(model, plan.replace(f"from {start}", "from 12")):
            assert torch.equal(logits_of(model, tokens()), logits)
    assert state(model) == before
    assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize(("name", "plan"), rotate(LATER_EDITS))
def test_generation_with_a_cache(model: Any, name: str, plan: str) -> None:
    if name in WRONG_WITH_CACHE or refused(name, plan):
        return
    with ls.operate(model, plan):
        meant_ids, meant_logits = generated(model, use_cache=False)
        if name in NO_POSITIONS:
            with pytest.raises(ls.UnsupportedEditError, match="its part of the cache has no length"):
                generated(model, use_cache=True)
            return
        ids, logits = generated(model, use_cache=True)
    assert torch.equal(ids, meant_ids)
    torch.testing.assert_close(logits, meant_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BRANCH_MODULES)
@pytest.mark.parametrize("factor", [0.0, -0.7])
@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_a_branch_is_one_whose_output_a_hook_mixes_by_position(
    model: Any, name: str, branch: str, factor: float
) -> None:
    handles = []
    for path, pick in BRANCH_MODULES[name][["attention", "mlp"].index(branch)]:

        def mix(_m: Any, args: Any, kwargs: Any, output: Any, pick: Any = pick) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            added = first if name == "granite" else pick(args, kwargs, output)
            stream = first - added if added is not first else torch.zeros_like(first)
            mixed = first.clone().view(*tokens().shape, -1)
            mixed[:, 3:] = (stream + factor * added).view(mixed.shape)[:, 3:]
            mixed = mixed.view(first.shape)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        handles.append(blocks_of(model)[2].get_submodule(path).register_forward_hook(mix, with_kwargs=True))
    meant = logits_of(model, tokens())
    for handle in handles:
        handle.remove()
    with ls.operate(model, f"scale-{branch} 2 {factor} from 3"):
        found = logits_of(model, tokens())
    if name in ("bloom", "mpt"):  # what the module adds is a difference, which a hook rounds again
        torch.testing.assert_close(found, meant, rtol=0, atol=2e-6)
    else:
        assert torch.equal(found, meant)
    assert (found - logits_of(model, tokens())).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "falcon_h1", "rwkv"])
def test_a_dropped_block_is_a_hook_that_keeps_its_first_output(model: Any) -> None:
    def keep_first(_module: Any, args: Any, output: Any) -> Any:
        after = output[0] if isinstance(output, tuple) else output
        mixed = torch.cat([after[:, :2], args[0][:, 2:]], 1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = blocks_of(model)[3].register_forward_hook(keep_first)
    meant = logits_of(model, tokens())
    handle.remove()
    with ls.operate(model, "drop 3 from 2"):
        assert torch.equal(logits_of(model, tokens()), meant)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_at_the_left_and_chunks_of_a_text(model: Any) -> None:
    ids = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=ids.dtype), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ls.operate(model, "drop 2 from 2; skip-mlp 4 from 3"), torch.no_grad():
        meant = model(ids).logits
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(found, meant, rtol=0, atol=1e-5)
        cache = model(ids[:, :2], use_cache=True).past_key_values
        chunks = [model(ids[:, 2:5], past_key_values=cache).logits, model(ids[:, 5:], past_key_values=cache).logits]
        torch.testing.assert_close(torch.cat(chunks, 1), meant[:, 2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama"])
def test_it_trains_and_is_copied_and_no_checkpoint_is_written(model: Any, tmp_path: Path) -> None:
    plan = "drop 2 from 1; repeat 4; skip-mlp 5 from 2; parallel 0 1; scale-attention 1 0.5 from 3"
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ls.UnsupportedEditError, match="a change of some tokens only cannot be expressed"):
        ls.edit_checkpoint(tmp_path / "source", "drop 2 from 1", tmp_path / "out")
    with pytest.raises(ls.UnsupportedEditError, match=WORDS):
        ls.operate_(model, "drop 2 from 1")
    with ls.operate(model, plan):
        expected = logits_of(model, tokens())
    found = ls.sweep(model, [plan], tokens())
    ls.operate_(model, plan, verify=False)
    meant = logits_of(model, tokens())
    assert torch.equal(meant, expected)
    assert len(found) == 2
    assert torch.equal(logits_of(copy.deepcopy(model), tokens()), meant)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    for save in (lambda out: ls.save(model, out), model.save_pretrained, lambda _out: model.state_dict()):
        with pytest.raises(ls.UnsupportedEditError, match="no checkpoint can express"):
            save(tmp_path / "out")
        assert not [*tmp_path.glob("out/*.safetensors")]


def test_an_adapter_in_the_place_of_a_changed_module_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("opt")
    ls.operate_(model, "skip-mlp 2 from 1", verify=False)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["fc2"]))
    with pytest.raises(ls.UnsupportedEditError, match="a Linear has replaced fc2 since the edit"):
        adapted(tokens())
    first: Any = get_peft_model(tiny_model("opt"), LoraConfig(target_modules=["fc2"], init_lora_weights=False))
    with ls.operate(first, "skip-mlp 2 from 1"):
        first(tokens())  # all of the adapted module's output is changed

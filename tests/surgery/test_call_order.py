"""An edit of a list of blocks counts only if the model calls the whole list once, in order."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DoryConfig, LlamaConfig

import layersurgery as ls
from layersurgery.models import block_probe
from layersurgery.surgery import call_order
from tests.support.zoo import ZOO, tiny_model, tokens

SIZES = {"num_hidden_layers": 6, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128}


class LoopedBlocks(nn.ModuleList):
    """Hold a list of which a forward runs the middle third several times, as a model's own code may do."""

    loops: int

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        blocks = list(self)
        return [*blocks[:2], *blocks[2:4] * self.loops, *blocks[-2:]]


def looped(loops: int) -> Any:
    """Build a llama that runs its middle blocks several times, and splits its list at fixed numbers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    blocks = LoopedBlocks(model.model.layers)
    blocks.loops = loops
    model.model.layers = blocks
    return model


@pytest.mark.parametrize("plan", ["swap 1 2", "drop 3", "repeat 3", "reverse 0:2"])
def test_a_looped_model_is_refused_by_name_and_unchanged(plan: str) -> None:
    model = looped(2)
    config, blocks, before = model.config.to_dict(), list(model.model.layers), model(tokens()).logits
    refusal = r"LlamaForCausalLM does not call the \d blocks of its list once"
    with pytest.raises(ls.UnsupportedEditError, match=refusal), ls.operate(model, plan):
        pass
    with pytest.raises(ls.UnsupportedEditError, match="a forward calls 0 1 2 3 2 3"):
        ls.operate_(model, plan)
    assert model.config.to_dict() == config
    assert list(model.model.layers) == blocks
    assert torch.equal(model(tokens()).logits, before)


def test_a_list_that_is_split_at_fixed_numbers_keeps_its_length() -> None:
    """Call all blocks in order with one loop, but not the whole of a longer or shorter list."""
    model = looped(1)
    with ls.operate(model, "swap 1 4"):
        pass
    for plan in ("drop 3", "repeat 3"):
        with pytest.raises(ls.UnsupportedEditError, match="does not call the [57] blocks"), ls.operate(model, plan):
            pass


def test_published_looped_models_are_refused_everywhere(tmp_path: Path) -> None:
    sizes = {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "n_recurrent_loops": 2}
    model = AutoModelForCausalLM.from_config(DoryConfig(**SIZES, **sizes))
    model.save_pretrained(tmp_path / "dory")
    with pytest.raises(ls.UnsupportedEditError, match="dory runs its middle blocks several times"):
        ls.operate_(model, "swap 1 2")
    with pytest.raises(ls.UnsupportedEditError, match="dory runs its middle blocks several times"):
        ls.edit_checkpoint(tmp_path / "dory", "swap 1 2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_verify_the_caller_is_believed() -> None:
    with ls.operate(looped(2), "repeat 3", verify=False) as model:
        assert len(model.model.layers) == 7


def test_a_depth_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probed = tiny_model("llama"), 0
    probe = block_probe.probe_forward

    def count(model: nn.Module) -> None:
        nonlocal probed
        probed += 1
        probe(model)

    monkeypatch.setattr(call_order, "probe_forward", count)
    for plan, times in (("swap 1 2", 1), ("reverse 1:4", 1), ("drop 2", 2), ("drop 3", 2), ("repeat 1", 3)):
        with ls.operate(model, plan):
            pass
        assert probed == times, plan


def run_block(forward: Any, ran: list[str], name: str, *args: Any, **kwargs: Any) -> Any:
    ran.append(name)
    return forward(*args, **kwargs)


@pytest.mark.parametrize("name", [*ZOO])
def test_the_check_runs_no_block(name: str) -> None:
    """Blocks may be many gigabytes, or on the disk."""
    model = tiny_model(name)
    blocks = model.get_submodule(ls.anatomy(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    ran: list[str] = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(f"hook of {number}"))
        block.forward = partial(run_block, block.forward, ran, f"block {number}")
    call_order._CHECKED.pop(blocks, None)
    call_order.check_call_order(model, blocks)
    assert ran == []

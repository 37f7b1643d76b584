"""Check that no block moves in a model with a PEFT prefix, which holds keys and values by position."""

from __future__ import annotations

import pytest
import torch

import layersurgery as ls
from tests.support.reference import logits_of
from tests.support.zoo import tiny_model, tokens


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "CartridgeConfig"])
def test_a_prefix_is_refused_by_name_and_the_base_is_edited(kind: str) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, kind):
        pytest.skip(f"this version of PEFT has no {kind}")
    base = tiny_model("llama", num_key_value_heads=4)
    with ls.operate(base, "swap 0 1"):
        meant = logits_of(base, tokens())
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    before = model(tokens()).logits
    for plan in ("swap 0 1", "drop 2", "drop -1", "repeat 2"):
        for edit in (ls.operate_, lambda *given: ls.operate(*given).__enter__()):
            with pytest.raises(ls.UnsupportedEditError, match="_TUNING gives each layer|CARTRIDGE gives each layer"):
                edit(model, plan)
    assert torch.equal(model(tokens()).logits, before)
    with ls.operate(model.get_base_model(), "swap 0 1") as edited:
        assert torch.equal(logits_of(edited, tokens()), meant)

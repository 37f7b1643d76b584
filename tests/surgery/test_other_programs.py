"""Wrappers of other programs: refused by name with the order that works, and the model is restored in any case.

The stand-ins do to a model what nnsight 0.8 and TransformerLens 4.3 do, so that this is tested without them; the same
tests with the programs themselves run where they are installed.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import types
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import layersurgery as ls
from tests.support.demo_model import make_tokenizer
from tests.support.zoo import DEPTH, tiny_model, tokens

CALLS: dict[str, Any] = {
    "operate": lambda model: ls.operate(model, "drop 3").__enter__(),
    "operate_": lambda model: ls.operate_(model, "drop 3"),
    "save": lambda model: ls.save(model, "never-written"),
    "anatomy": ls.anatomy,
    "sweep": lambda model: ls.sweep(model, "drop", tokens()),
    "compare": lambda model: ls.compare(model, "drop 3", tokens()),
    "fold": ls.fold,
}


class _Trace:
    """As nnsight's: a callable before the forward of each module, which only knows its wrapper by a weak reference."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        assert module is not None
        return type(module).forward(module, *args, **kwargs)


class _LanguageModel:
    """As nnsight's wrapper, which is not a module."""

    __module__ = "nnsight.modeling.language"

    def __init__(self, model: nn.Module) -> None:
        self.me = self  # a cycle, as its tree of modules has
        for module in model.modules():
            state = vars(module).setdefault(
                "__nnsight__", types.SimpleNamespace(routes=[], original=type(module).forward)
            )
            state.routes.append((weakref.ref(self), "", ()))
            vars(module)["forward"] = _Trace(module)


class _Bridge(nn.Module):
    """As a bridge of TransformerLens, which puts modules of its own, and a new list, in the place of the model's."""

    __module__ = "transformer_lens.model_bridge.transformer_bridge"

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.config._attn_implementation = "eager"
        model.lm_head._parameters.pop("bias")
        for block in model.model.layers:
            block.mlp.up_proj = _BridgedModule(block.mlp.up_proj)
        model.model.layers = nn.ModuleList(_BridgedModule(block) for block in model.model.layers)
        self.model = model


class _BridgedModule(nn.Module):
    __module__ = "transformer_lens.model_bridge.generalized_components.base"

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def _nnsight(program: str) -> Any:
    if program == "stand-in":
        return _LanguageModel
    nnsight = pytest.importorskip("nnsight", reason="needs nnsight")
    return lambda model: nnsight.LanguageModel(model, tokenizer=make_tokenizer())


def _bridge(program: str, tmp_path: Path) -> Any:
    if program == "stand-in":
        return _Bridge
    pytest.importorskip("transformer_lens", reason="needs TransformerLens")
    from transformer_lens.model_bridge import TransformerBridge

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    return lambda model: TransformerBridge.boot_transformers("any", hf_model=model, tokenizer=tokenizer, device="cpu")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens()).logits
    return logits


@pytest.fixture(params=["stand-in", "installed"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-in":
        for package in ("nnsight", "transformer_lens"):
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    return str(request.param)


@pytest.mark.parametrize("call", CALLS)
def test_what_other_programs_make_is_refused_with_the_order_that_works(call: str, program: str, tmp_path: Path) -> None:
    wrapper = _nnsight(program)(tiny_model("llama"))
    with pytest.raises(ls.PlanError, match=r"LanguageModel of nnsight.*edit the transformers model first"):
        CALLS[call](wrapper)
    model = tiny_model("llama")
    bridge = _bridge(program, tmp_path)(model)
    with pytest.raises(ls.PlanError, match=r"of TransformerLens.*load it with transformers, edit it, and then"):
        CALLS[call](bridge)
    with pytest.raises(ls.UnsupportedEditError, match=r"those of this LlamaForCausalLM; load it with transformers"):
        CALLS[call](model)


def test_a_model_that_nnsight_has_wrapped_is_edited_once_the_wrapper_is_gone(program: str) -> None:
    wrap, model = _nnsight(program), tiny_model("llama")
    before = _logits(model)
    wrapper = wrap(model)
    with pytest.raises(ls.UnsupportedEditError, match=r"has numbered its blocks; delete it \(del\), edit"):
        ls.operate_(model, "drop 3")
    assert torch.equal(_logits(model), before)
    del wrapper
    plain = tiny_model("llama")
    for plan in ("drop 3; repeat 1", "skip-attention 2"):  # views of blocks in which a callable of nnsight remains
        with ls.operate(plain, plan), ls.operate(model, plan):
            assert torch.equal(_logits(model), _logits(plain))
    assert torch.equal(_logits(model), before)


def test_a_wrapper_of_nnsight_made_inside(program: str) -> None:
    wrap, model = _nnsight(program), tiny_model("llama")
    before = _logits(model)
    with (
        pytest.warns(ls.errors.LayerSurgeryWarning, match="made inside operate still exists"),
        ls.operate(model, "repeat 2"),
    ):
        wrapper = wrap(model)
    assert torch.equal(_logits(model), before)
    with pytest.raises(ls.UnsupportedEditError, match="delete it"), ls.operate(model, "drop 3"):
        pass
    del wrapper
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ls.errors.LayerSurgeryWarning)
        for plan in ("drop 3", "repeat 2"):
            with ls.operate(model, plan):
                wrapper = wrap(model)
                del wrapper
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("plan", ["drop 3", "repeat 2", "skip-mlp 1"])
def test_a_bridge_made_inside_leaves_the_model_as_it_was(plan: str, program: str, tmp_path: Path) -> None:
    make, model = _bridge(program, tmp_path), tiny_model("llama")
    before, classes = _logits(model), [(name, type(module)) for name, module in model.named_modules()]
    attention = model.config._attn_implementation
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises(ls.UndoError, match=r"TransformerBridge was made .* The model is restored"),
        ls.operate(model, plan),
    ):
        make(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == classes
    assert (len(model.model.layers), model.config.num_hidden_layers) == (DEPTH, DEPTH)
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(_logits(model), before)
    with ls.operate(model, plan):
        pass


def test_edit_first_then_wrap(program: str, tmp_path: Path) -> None:
    """Compare what the programs then show of each layer with what the edited model computes there."""
    if program == "stand-in":
        pytest.skip("stand-ins show nothing")
    nnsight = pytest.importorskip("nnsight", reason="needs nnsight")
    model = ls.operate_(tiny_model("llama"), "drop 3; repeat 1; swap 0 2")
    with torch.no_grad():
        out = model(input_ids=tokens(), output_hidden_states=True)
    wrapper = nnsight.LanguageModel(model, tokenizer=make_tokenizer())
    for position in range(len(model.model.layers) - 1):
        with torch.no_grad(), wrapper.trace(tokens()):
            stream = wrapper.model.layers[position].output.save()
        assert torch.equal(stream, out.hidden_states[position + 1])
    del wrapper
    bridge = _bridge(program, tmp_path)(model)
    assert bridge.cfg.n_layers == DEPTH
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens())
    assert torch.allclose(logits, out.logits, atol=1e-5)
    for position in range(DEPTH - 1):
        assert torch.allclose(cache[f"blocks.{position}.hook_out"], out.hidden_states[position + 1], atol=1e-5)


def test_nnsight_does_not_hide_save() -> None:
    """Ask for names that are imported late: nnsight gives every object an attribute `save`."""
    pytest.importorskip("nnsight", reason="needs nnsight")
    code = (
        "import nnsight, layersurgery as ls; print(ls.save.__module__)\n"
        "from layersurgery import save; print(save.__module__)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["layersurgery.surgery.save"] * 2


def test_a_data_descriptor_comes_before_what_others_add_to_every_object() -> None:
    assert isinstance(vars(type(ls))["save"], property)

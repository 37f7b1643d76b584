"""Operating on a live model, and undoing it."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import sys
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaModel

import layersurgery as ls
from layersurgery.checkpoints.loading import Loaded
from layersurgery.errors import LayerSurgeryWarning
from layersurgery.models.skipped_branch import SkippedBranch
from layersurgery.plans.route import Route
from layersurgery.plans.visit import Visit
from tests.support.reference import logits_along, logits_of
from tests.support.zoo import DEPTH, tiny_model, tokens


@pytest.fixture
def model() -> Any:
    torch._dynamo.reset()  # compiled code outlives a test, and there is a limit to how much of it there may be
    return tiny_model("llama")


def numbers(model: Any) -> list[int]:
    return [block.self_attn.layer_idx for block in model.model.layers]


# What stands where


def test_blocks_are_the_very_same_objects(model: Any) -> None:
    blocks = list(model.model.layers)
    with ls.operate(model, "swap 1 2; drop 4") as edited:
        assert edited is model
        assert [blocks.index(block) for block in model.model.layers] == [0, 2, 1, 3, 5]
        assert numbers(model) == [0, 1, 2, 3, 4]
        assert model.config.num_hidden_layers == 5
    assert all(one is other for one, other in zip(model.model.layers, blocks, strict=True))
    assert numbers(model) == list(range(DEPTH))
    assert model.config.num_hidden_layers == DEPTH


def test_a_repeat_is_a_view_with_its_own_number(model: Any) -> None:
    with ls.operate(model, "repeat 2 x3"):
        first, second, third = list(model.model.layers)[2:5]
        assert first is not second
        assert second is not third
        assert [block.self_attn.layer_idx for block in (first, second, third)] == [2, 3, 4]
        for one, other in zip(first.parameters(), third.parameters(), strict=True):
            assert one is other
        assert sum(1 for _ in model.parameters()) == len({id(p) for p in model.parameters()})
    assert model.model.layers[3] is not third


def test_a_block_that_repeats_at_its_own_place_keeps_it(model: Any) -> None:
    block = model.model.layers[3]
    with ls.operate(model, Route([3, 0, 1, 3])):
        assert model.model.layers[3] is block
        assert model.model.layers[0] is not block


def test_a_skipped_branch_is_not_computed(model: Any) -> None:
    class Forbidden(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("computed")

    anatomy = ls.anatomy(model)
    with ls.operate(model, "skip-mlp 2; skip-attention 3", anatomy=anatomy):
        assert isinstance(model.model.layers[2].mlp, SkippedBranch)
        assert "in the place of LlamaMLP" in repr(model)
        for branch in (model.model.layers[2].mlp, model.model.layers[3].self_attn):
            for name in list(branch._modules):
                branch._modules[name] = Forbidden()
        logits_of(model, tokens())


def test_no_tensor_is_allocated(model: Any) -> None:
    anatomy = ls.anatomy(model)
    plan = "skip-mlp 1; skip-attention 4; repeat 2:4; swap 0 5"
    with ls.operate(model, plan, anatomy=anatomy):  # checks in a forward that this depth is run in order
        pass
    with Operations() as seen, ls.operate(model, plan, anatomy=anatomy):
        pass
    assert seen.names == []
    with Operations() as seen:
        model(tokens())
    assert len(seen.names) > 50


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Names of all operations on tensors; a tensor is made by one or not at all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# Routes and plans


def test_a_route_or_a_text_or_a_plan(model: Any) -> None:
    found = []
    for plan in (
        "drop 2",
        ls.drop(2),
        Route([0, 1, 3, 4, 5]),
        Route([0, 1, Visit(2, attention=False, mlp=False), 3, 4, 5]),
    ):
        with ls.operate(model, plan):
            found.append(logits_of(model, tokens()))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("swap 1 9", "block 9 is out of range"),
        (Route([0, 7]), "visits block 7, and the model has 6 blocks"),
        (Route([Visit(0, attention=False, mlp=False)]), "leaves no block"),
        ("swop 1 2", "did you mean 'swap'"),
        ([0, 1], r"a Route, not \[0, 1\]"),
    ],
)
def test_a_plan_that_does_not_fit(model: Any, plan: Any, words: str) -> None:
    with pytest.raises(ls.PlanError, match=words), ls.operate(model, plan):
        pass
    with pytest.raises(ls.PlanError, match=words):
        ls.operate_(model, plan)


visits = st.builds(Visit, st.integers(0, DEPTH - 1), st.booleans(), st.booleans())


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "bloom"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_route_of_whole_blocks_is_the_reference(name: str, data: st.DataObject) -> None:
    model = _kept(name)
    route = Route(data.draw(st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=9)))
    before = logits_of(model, tokens())
    with ls.operate(model, route):
        found = logits_of(model, tokens())
    assert torch.equal(found, logits_along(model, route, tokens()))
    assert torch.equal(logits_of(model, tokens()), before)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "qwen3_moe"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_route_generates_alike_with_and_without_a_cache(name: str, data: st.DataObject) -> None:
    model = _kept(name)
    route = Route(data.draw(st.lists(visits, min_size=1, max_size=9)))
    if not route.canonical:
        return
    with ls.operate(model, route):
        with_cache, without = (
            model.generate(
                tokens(), max_new_tokens=6, use_cache=cache, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            for cache in (True, False)
        )
    assert torch.equal(with_cache, without)


@settings(max_examples=15)
@given(data=st.data())
def test_operating_inside_operate_composes(data: st.DataObject) -> None:
    model = _kept("llama")
    outer = Route(data.draw(st.lists(st.integers(0, DEPTH - 1), min_size=2, max_size=7)))
    inner = Route(data.draw(st.lists(st.integers(0, len(outer) - 1), min_size=1, max_size=7)))
    before = logits_of(model, tokens())
    with ls.operate(model, outer):
        between = logits_of(model, tokens())
        with ls.operate(model, inner):
            found = logits_of(model, tokens())
        assert torch.equal(logits_of(model, tokens()), between)
    with ls.operate(model, Route(outer[visit.block] for visit in inner)):
        assert torch.equal(logits_of(model, tokens()), found)
    assert torch.equal(logits_of(model, tokens()), before)


@settings(max_examples=15)
@given(data=st.data())
def test_edits_of_different_blocks_commute(data: st.DataObject) -> None:
    model = _kept("olmo2")
    a, b, c, d = data.draw(st.permutations(range(DEPTH)))[:4]
    edits = {
        "swap": lambda x, y: ls.swap(x, y),
        "drop": lambda x, y: ls.drop(x),
        "skip_attention": lambda x, y: ls.skip_attention(x),
        "skip_mlp": lambda x, y: ls.skip_mlp(x),
        "repeat": lambda x, y: ls.repeat(x),
    }
    one = edits[data.draw(st.sampled_from(sorted(edits)))](a, b)
    other = edits[data.draw(st.sampled_from(sorted(edits)))](c, d)
    found = []
    for plan in (one + other, other + one):
        with ls.operate(model, plan):
            found.append(logits_of(model, tokens()))
    assert torch.equal(*found)


_MODELS: dict[str, Any] = {}


def _kept(name: str) -> Any:
    if name not in _MODELS:
        _MODELS[name] = tiny_model(name)
    return _MODELS[name]


# Undoing


def test_undo_after_an_exception(model: Any) -> None:
    before = logits_of(model, tokens())
    with pytest.raises(ZeroDivisionError), ls.operate(model, "repeat 1:3; skip-mlp 4"):
        1 / model.generate(tokens(), max_new_tokens=3, pad_token_id=0).dim().__sub__(2)
    assert torch.equal(logits_of(model, tokens()), before)
    assert numbers(model) == list(range(DEPTH))


def test_an_edit_by_other_code_is_reported_and_kept(model: Any) -> None:
    mine = model.model.layers[0]
    with (
        pytest.raises(ls.UndoError, match="the list at model.layers contains other modules"),
        ls.operate(model, "drop 3"),
    ):
        model.model.layers[1] = mine
    assert model.model.layers[1] is mine
    assert len(model.model.layers) == model.config.num_hidden_layers == DEPTH - 1


def test_a_list_replaced_by_other_code(model: Any) -> None:
    with pytest.raises(ls.UndoError, match="was replaced by another"), ls.operate(model, "drop 3"):
        model.model.layers = nn.ModuleList(list(model.model.layers))
    assert len(model.model.layers) == DEPTH - 1


def test_a_config_changed_by_other_code(model: Any) -> None:
    with pytest.raises(ls.UndoError, match="config.num_hidden_layers"), ls.operate(model, "drop 3"):
        model.config.num_hidden_layers = 2
    assert model.config.num_hidden_layers == 2


def test_undoing_in_the_wrong_order(model: Any) -> None:
    before = logits_of(model, tokens())
    outer, inner = ls.operate(model, "drop 3"), ls.operate(model, "swap 0 1")
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ls.UndoError, match="reverse order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert len(model.model.layers) == DEPTH - 1
    assert not torch.equal(logits_of(model, tokens()), before)


def test_deeply_nested(model: Any) -> None:
    before = logits_of(model, tokens())
    with ExitStack() as runner:
        for plan in ("swap 0 1", "drop 2", "repeat 1:3", "skip-attention 1", "skip-mlp 1", "reverse 0:4", "repeat 1"):
            runner.enter_context(ls.operate(model, plan))
        logits_of(model, tokens())
    assert torch.equal(logits_of(model, tokens()), before)
    assert numbers(model) == list(range(DEPTH))


@pytest.mark.parametrize("plan", ["drop 1 2", "repeat 1:3", "skip-mlp 1"])
def test_modes_set_inside_hold_for_the_blocks_that_were_out(model: Any, plan: str) -> None:
    model.train()
    with ls.operate(model, plan):
        model.eval()
    assert not any(module.training for module in model.modules())
    model.model.layers[1].train()
    with ls.operate(model, plan):
        pass
    assert [block.training for block in model.model.layers] == [number == 1 for number in range(DEPTH)]


def test_weights_changed_inside_stay_changed(model: Any) -> None:
    with ls.operate(model, "repeat 1:3"), torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.zero_()  # the second visit of block 1
    assert not model.model.layers[1].mlp.up_proj.weight.any()


@pytest.mark.parametrize("asked", ["before", "inside", "never"])
def test_hidden_states_of_every_block(model: Any, asked: str) -> None:
    def count() -> int:
        with torch.no_grad():
            states = model(tokens(), output_hidden_states=True, use_cache=False)
        assert torch.equal(model.lm_head(states.hidden_states[-1]), states.logits)
        return len(states.hidden_states)

    if asked == "before":
        assert count() == DEPTH + 1
    with ls.operate(model, "drop 1; repeat 2:4; skip-attention 5"):
        if asked != "never":
            assert count() == DEPTH - 1 + 2 + 1
    assert count() == DEPTH + 1
    with ls.operate(model, "drop 1; repeat 2:4"):
        assert count() == DEPTH - 1 + 2 + 1
    assert count() == DEPTH + 1


def test_a_static_cache_of_an_earlier_text_is_not_used_again(model: Any) -> None:
    """Some versions of transformers keep it on the model."""
    options = {
        "cache_implementation": "static",
        "disable_compile": True,
        "pad_token_id": 0,
        "max_new_tokens": 4,
        "do_sample": False,
    }
    before = model.generate(tokens(), **options)
    model._cache = StaticCache(config=model.config, max_cache_len=16)
    with ls.operate(model, "repeat 1:3; skip-attention 0"):
        assert not hasattr(model, "_cache")
        assert torch.equal(
            model.generate(tokens(), **options),
            model.generate(tokens(), max_new_tokens=4, pad_token_id=0, do_sample=False),
        )
    assert torch.equal(model.generate(tokens(), **options), before)


def test_forward_hooks_of_the_user_fire_in_repeats(model: Any) -> None:
    seen = []
    handle = model.model.layers[2].register_forward_hook(
        lambda module, args, output: seen.append(module.self_attn.layer_idx)
    )
    with ls.operate(model, "repeat 2"):
        logits_of(model, tokens())
    handle.remove()
    assert seen == [2, 3]


# An ordinary model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["swap 1 2", "repeat 1:4", "skip-attention 0; skip-mlp 3"])
def test_half_precision(model: Any, dtype: torch.dtype, plan: str) -> None:
    model = model.to(dtype)
    before = logits_of(model, tokens())
    with ls.operate(model, plan):
        found = logits_of(model, tokens())
        with torch.no_grad():
            past = model(tokens()[:, :8], use_cache=True).past_key_values
            last = model(tokens()[:, 8:], past_key_values=past).logits
    assert found.dtype == dtype
    torch.testing.assert_close(last, found[:, 8:], rtol=0.05, atol=0.05)
    if "skip" not in plan:
        assert torch.equal(found, logits_along(model, ls.Plan.parse(plan).route(DEPTH), tokens()))
    assert torch.equal(logits_of(model, tokens()), before)


def test_gradients_of_a_repeat_add_up(model: Any) -> None:
    model.train()
    other = copy.deepcopy(model)
    ls.operate_(model, "repeat 1")
    model(tokens(), labels=tokens()).loss.backward()
    twin = copy.deepcopy(other.model.layers[1])
    other.model.layers.insert(2, twin)
    other.config.num_hidden_layers += 1
    other(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, parameter in model.model.layers[1].named_parameters():
        apart = other.model.layers[1].get_parameter(name).grad + twin.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, apart, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_healing_by_fine_tuning(model: Any, checkpointing: bool, tmp_path: Any) -> None:
    ls.operate_(model, "drop 2; repeat 4; skip-mlp 1")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    ls.save(model, tmp_path / "healed")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    torch.testing.assert_close(logits_of(reloaded, tokens()), logits_of(model, tokens()), rtol=0, atol=1e-5)


def test_attentions_and_autocast(model: Any) -> None:
    model.set_attn_implementation("eager")
    with ls.operate(model, "repeat 1:3; skip-attention 0"), torch.no_grad():
        found = model(tokens(), output_attentions=True, use_cache=False)
        assert len(found.attentions) == DEPTH + 2 - 1  # what is not computed has none
        plain = model(tokens(), use_cache=False).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(tokens(), use_cache=False).logits.float(), plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled(model: Any, backend: str) -> None:
    before = logits_of(model, tokens())
    compiled: Any = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits_of(compiled, tokens()), before)
    for plan, target in itertools.product(
        ["swap 1 2", "repeat 1:3", "skip-attention 2; skip-mlp 3"], [model, compiled]
    ):
        with ls.operate(target, plan):
            torch.testing.assert_close(logits_of(compiled, tokens()), logits_of(model, tokens()))
            assert not torch.allclose(logits_of(compiled, tokens()), before)
        torch.testing.assert_close(logits_of(compiled, tokens()), before)


def test_the_edited_model_compiles_in_one_graph(model: Any) -> None:
    ls.operate_(model, "repeat 1:3; skip-attention 0; skip-mlp 5")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, tokens()), logits_of(model, tokens()))


def test_a_block_compiled_by_itself(model: Any) -> None:
    for block in model.model.layers:
        block.compile(backend="eager")
    with ls.operate(model, "repeat 1:3"):
        found = logits_of(model, tokens())
    torch.testing.assert_close(found, logits_along(model, ls.repeat(range(1, 3)).route(DEPTH), tokens()))


def test_an_adapted_model() -> None:
    peft = pytest.importorskip("peft")
    settings_ = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), settings_).eval()
    before = logits_of(model, tokens())
    for plan in ("swap 1 2", "repeat 1:4", "skip-attention 2; skip-mlp 3", "drop 0"):
        with ls.operate(model, plan):
            found = logits_of(model, tokens())
            text = [
                model.generate(input_ids=tokens(), max_new_tokens=4, use_cache=cache, pad_token_id=0)
                for cache in (True, False)
            ]
            assert torch.equal(*text)
            with model.disable_adapter():
                assert not torch.equal(logits_of(model, tokens()), found)
        assert torch.equal(logits_of(model, tokens()), before)
    with pytest.raises(ls.UnsupportedEditError, match=r"PEFT adapter.*merge_and_unload"):
        ls.save(model, "nowhere")
    with pytest.raises(ls.UnsupportedEditError, match=r"once for each visit; merge it first"):
        ls.operate_(model, "repeat 1:3")
    ls.operate_(model, "swap 1 2; skip-mlp 3")
    kept = logits_of(model, tokens())
    torch.testing.assert_close(logits_of(model.merge_and_unload(), tokens()), kept)


@pytest.mark.parametrize(
    "setting",
    [
        {"layers_to_transform": [2, 4]},
        {"layers_to_transform": 2},
        {"rank_pattern": {"layers.2.self_attn.q_proj": 4}},
        {"alpha_pattern": {r"layers\.[2-4]\..*q_proj": 9}},
        {"target_modules": ["model.layers.2.self_attn.q_proj", "layers.4.mlp.up_proj"]},
        {"target_modules": r".*layers\.[24]\.self_attn\.q_proj"},
        {"exclude_modules": ["layers.2.self_attn.q_proj"]},
        {"modules_to_save": ["layers.2.mlp"]},
    ],
)
def test_adapter_settings_that_name_layers(setting: dict[str, Any], tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        settings_ = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **setting}
        return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings_)).eval()

    model = adapted()
    before = logits_of(model, tokens())
    for plan in ("drop 1", "swap 1 2"):
        with pytest.raises(ls.UnsupportedEditError, match=f"PEFT setting {next(iter(setting))} = .* names layers"):
            ls.operate_(model, plan)
        assert torch.equal(logits_of(model, tokens()), before)
    with ls.operate(model, "swap 1 2"):  # no adapter is saved
        pass
    ls.operate_(model, "drop 5; skip-mlp 3")  # these layers keep their numbers
    model.save_pretrained(tmp_path)
    base = ls.operate_(tiny_model("llama"), "drop 5; skip-mlp 3")
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits_of(reloaded, tokens()), logits_of(model, tokens()))


def test_adapter_settings_that_name_modules_only() -> None:
    peft = pytest.importorskip("peft")
    names = [f"layers.{number}.self_attn.q_proj" for number in range(DEPTH)]
    for setting in (
        {"target_modules": names},
        {"target_modules": r".*\d\.self_attn\.q_proj"},
        {"rank_pattern": {"q_proj": 4}},
    ):
        settings_ = {"target_modules": ["q_proj", "v_proj"], **setting}
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings_))
        ls.operate_(model, "drop 1; swap 2 3")


def test_an_adapter_never_names_the_unedited_base(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    settings_ = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)

    def saved_base(adapted: Any) -> str:
        adapted.save_pretrained(tmp_path / "adapter")
        return str(
            json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] or ""
        )

    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), copy.deepcopy(settings_))
    with ls.operate(adapted, "drop 1"):
        pass
    assert saved_base(adapted) == str(tmp_path / "base")
    with pytest.warns(LayerSurgeryWarning, match=r"made for .*base, which is not edited"):
        ls.operate_(adapted, "drop 1")
    assert saved_base(adapted) == ""
    model = ls.operate_(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "drop 1")
    assert saved_base(peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(settings_))) == ""
    ls.save(model, tmp_path / "edited")
    adapted = peft.get_peft_model(model, settings_).eval()
    assert saved_base(adapted) == str(tmp_path / "edited")
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(reloaded, tokens()), logits_of(adapted, tokens()), rtol=0, atol=1e-6)


def test_a_model_in_ddp(model: Any, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        before = logits_of(model, tokens())
        wrapped = nn.parallel.DistributedDataParallel(model)
        with ls.operate(wrapped, "repeat 1:3; skip-mlp 4"):
            assert len(model.model.layers) == DEPTH + 2
            assert not torch.equal(logits_of(wrapped, tokens()), before)
        assert torch.equal(logits_of(wrapped, tokens()), before)
        assert ls.anatomy(wrapped).blocks == "module.model.layers"
        assert ls.compare(wrapped, "drop 2", tokens()) == ls.compare(model, "drop 2", tokens())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
def test_an_exception_at_any_line_leaves_nothing(model: Any, kind: type[BaseException]) -> None:
    """Raise at every line of operate.py and config_edits.py in turn."""
    before, blocks = logits_of(model, tokens()), list(model.model.layers)
    lines = _lines_run(model, None, kind)
    assert lines > 300
    for line in range(0, lines, 7):
        with suppress(kind):
            _lines_run(model, line, kind)
        assert all(one is other for one, other in zip(model.model.layers, blocks, strict=True)), line
        assert (numbers(model), model.config.num_hidden_layers) == (list(range(DEPTH)), DEPTH), line
    assert torch.equal(logits_of(model, tokens()), before)


def _lines_run(model: Any, stop: int | None, kind: type[BaseException]) -> int:
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(("operate.py", "config_edits.py")):
            return None
        # The two lines before undo's own guard is up cannot be guarded.
        if event == "line" and frame.f_code.co_name not in ("operate", "undo", "__init__"):
            count += 1
            if stop is not None and count == stop + 1:
                raise kind
        return trace

    was = sys.gettrace()
    sys.settrace(trace)
    try:
        with ls.operate(model, "repeat 1:3; swap 0 5"):
            pass
    finally:
        sys.settrace(was)
    return count


DEVICES = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    **{f"model.layers.{number}": "disk" if number % 2 else "cpu" for number in range(DEPTH)},
}


@pytest.mark.parametrize(
    "plan",
    ["swap 1 2", "drop 0", "repeat 1:4 x3", "reverse 1:5", "skip-attention 1; skip-mlp 4", "skip-mlp 3; repeat 3"],
)
def test_a_dispatched_model(plan: str, tmp_path: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    dispatched = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", device_map=DEVICES, offload_folder=tmp_path / "offload"
    )
    assert sum(parameter.is_meta for parameter in dispatched.parameters()) > 20
    before = logits_of(plain, tokens())
    with ls.operate(plain, plan), ls.operate(dispatched, plan):
        assert torch.equal(logits_of(dispatched, tokens()), logits_of(plain, tokens()))
        text = [model.generate(tokens(), max_new_tokens=4, pad_token_id=0) for model in (plain, dispatched)]
        assert torch.equal(*text)
    assert dispatched.hf_device_map == DEVICES
    assert torch.equal(logits_of(dispatched, tokens()), before)
    ls.operate_(plain, plan)
    ls.operate_(dispatched, plan)
    kept = logits_of(plain, tokens())
    dispatched.save_pretrained(tmp_path / "plain")
    ls.save(dispatched, tmp_path / "guarded")
    for way in ("plain", "guarded"):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / way)
        torch.testing.assert_close(logits_of(reloaded, tokens()), kept, rtol=0, atol=1e-6)


def test_the_map_of_devices_follows(tmp_path: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", device_map=DEVICES, offload_folder=tmp_path / "offload"
    )
    with ls.operate(model, "drop 0; repeat 4"):
        devices = [model.hf_device_map[f"model.layers.{number}"] for number in range(6)]
        assert devices == ["disk", "cpu", "disk", "cpu", "cpu", "disk"]
        assert model.hf_device_map["lm_head"] == "cpu"


# Keeping


def test_ties_are_kept_and_repeats_are_not(tmp_path: Any) -> None:
    model = tiny_model("llama-tied")
    ls.operate_(model, "repeat 1")
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert reloaded.model.layers[1].mlp.up_proj.weight is not reloaded.model.layers[2].mlp.up_proj.weight
    torch.testing.assert_close(logits_of(reloaded, tokens()), logits_of(model, tokens()), rtol=0, atol=1e-6)


def test_a_kept_edit_can_be_operated_on_again(model: Any, tmp_path: Any) -> None:
    ls.operate_(model, "repeat 1:3")
    ls.operate_(model, "drop 0; skip-attention 4")
    ls.operate_(model, "repeat 2")
    assert numbers(model) == list(range(8))
    ls.save(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(reloaded, tokens()), logits_of(model, tokens()), rtol=0, atol=1e-6)


def test_what_would_not_reload_is_refused_and_the_model_is_as_it_was() -> None:
    model = tiny_model("diffllama")
    before = logits_of(model, tokens())
    with pytest.raises(ls.UnsupportedEditError, match=r"model.layers.1 \(block 2\): self_attn.lambda_init"):
        ls.operate_(model, "swap 1 2")
    assert torch.equal(logits_of(model, tokens()), before)
    assert numbers(model) == list(range(DEPTH))


def test_unverified_it_is_kept_and_save_refuses(tmp_path: Any) -> None:
    model = tiny_model("diffllama")
    ls.operate_(model, "swap 1 2", verify=False)
    assert torch.equal(
        logits_of(model, tokens()), logits_along(tiny_model("diffllama"), ls.swap(1).route(DEPTH), tokens())
    )
    with pytest.raises(ls.UnsupportedEditError, match="model.layers.1.*lambda_init"):
        ls.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_overwrites_only_when_told(model: Any, tmp_path: Any) -> None:
    assert ls.save(model, tmp_path / "out") == tmp_path / "out"
    with pytest.raises(ls.OutputError, match="exists already"):
        ls.save(model, tmp_path / "out")
    ls.save(model, tmp_path / "out", overwrite=True, max_shard_size="40KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_save_refuses_a_constant_changed_by_hand(model: Any, tmp_path: Any) -> None:
    model.model.layers[2].self_attn.scaling *= 2
    with pytest.raises(ls.UnsupportedEditError, match="model.layers.2.*self_attn.scaling"):
        ls.save(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_save_takes_blocks_that_keep_an_old_position(name: str, tmp_path: Any) -> None:
    """Save blocks that keep their old numbers after another was removed by hand: a reload sets them right."""
    model = tiny_model(name)
    path = ls.anatomy(model).blocks
    del model.get_submodule(path)[2]
    model.config.num_hidden_layers -= 1
    with pytest.warns(LayerSurgeryWarning, match=r"layer_idx = 3 of block 2 and \d more .* a reload sets them right"):
        ls.save(model, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(reloaded(tokens(), use_cache=False).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
        | {"original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
)
def test_frequencies_that_a_forward_sets_are_not_compared(rope: dict[str, Any], tmp_path: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6}
    rope_parameters = {"rope_theta": 1e4, **rope}
    config = LlamaConfig(**sizes, vocab_size=128, max_position_embeddings=32, rope_parameters=rope_parameters)
    model = AutoModelForCausalLM.from_config(config).eval()
    long = torch.arange(50)[None] % 100
    model(long)
    ls.save(model, tmp_path / "whole")
    for plan in ("swap 1 2", "swap 0 3"):
        model(long)
        ls.operate_(model, plan)
    model(long)
    ls.save(model, tmp_path / "swapped")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped")
    assert torch.equal(logits_of(reloaded, long), logits_of(model, long))
    model.model.layers[1].self_attn.scaling *= 2
    with pytest.raises(ls.UnsupportedEditError, match=r"self_attn.scaling is [\d.]+ in the source"):
        ls.save(model, tmp_path / "changed")


@pytest.mark.parametrize("plan", ["drop 4", "repeat 4", "swap 3 4"])
def test_attributes_that_no_block_reads_do_not_refuse(plan: str, tmp_path: Any) -> None:
    """Without layers that share keys, Gemma 4 marks the last layer of each kind, and nothing reads what it stores."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 6, "vocab_size": 128, "head_dim": 8, "global_head_dim": 8, "sliding_window": 4}
    sizes |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(Gemma4TextConfig(**sizes, layer_types=kinds)).eval()
    model.save_pretrained(tmp_path / "whole")
    ls.edit_checkpoint(tmp_path / "whole", plan, tmp_path / "edited")
    ls.save(ls.operate_(model, plan), tmp_path / "saved")
    for name in ("edited", "saved"):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits_of(reloaded, tokens()), logits_of(model, tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_resized_embedding_is_saved(name: str, tmp_path: Any) -> None:
    model = tiny_model(name)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    ls.save(ls.operate_(model, "drop 1"), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(reloaded, tokens()), logits_of(model, tokens()), rtol=0, atol=1e-6)
    model.config.get_text_config().vocab_size += 1
    with pytest.raises(ls.UnsupportedEditError, match=r"outside the blocks: .*weight"):
        ls.save(model, tmp_path / "wrong")


@pytest.mark.parametrize("plan", ["drop 2", "repeat 2", "skip-mlp 2"])
def test_weights_that_the_first_forward_unpacks(model: Any, plan: str) -> None:
    """As compressed-tensors does it: a hook of the model unpacks all blocks in it and removes itself."""
    before = logits_of(model, tokens())
    with ls.operate(model, plan):
        edited = logits_of(model, tokens())
    packed = copy.deepcopy(model)
    for block in packed.model.layers:
        block.mlp.packed = block.mlp.up_proj.weight
        del block.mlp.up_proj.weight

    def unpack(model: Any, _: Any) -> None:
        for module in model.modules():
            if hasattr(module, "packed"):
                module.up_proj.weight = module.packed
                del module.packed
        model.ct_decompress_hook.remove()
        del model.ct_decompress_hook

    packed.ct_decompress_hook = packed.register_forward_pre_hook(unpack)
    with ls.operate(packed, plan, verify=False):
        assert torch.equal(logits_of(packed, tokens()), edited)
    assert torch.equal(logits_of(packed, tokens()), before)


def test_a_copy_of_an_edited_model_is_its_own(model: Any) -> None:
    ls.operate_(model, "repeat 1:3; skip-attention 0; skip-mlp 4")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin, tokens()), logits_of(model, tokens()))
        assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
        assert twin.model.layers[1].mlp.up_proj.weight is twin.model.layers[3].mlp.up_proj.weight
        with ls.operate(twin, "swap 0 1"):
            twin.generate(tokens(), max_new_tokens=2, pad_token_id=0)
        assert torch.equal(logits_of(twin, tokens()), logits_of(model, tokens()))


@pytest.mark.parametrize(("order", "skipped"), [("0 1 1-attn 2:6", 2), ("0 1-attn 1 2:6", 1)])
def test_loading_what_was_saved_leaves_shared_weights_whole(model: Any, order: str, skipped: int) -> None:
    ls.operate_(model, Route.parse(order))
    before = logits_of(model, tokens())
    saved = model.state_dict()
    assert not saved[f"model.layers.{skipped}.self_attn.o_proj.weight"].any()
    assert saved[f"model.layers.{3 - skipped}.self_attn.o_proj.weight"].all()
    model.load_state_dict(saved)
    assert torch.equal(logits_of(model, tokens()), before)


def test_a_parameter_of_two_names_is_saved_apart_for_each_visit(model: Any) -> None:
    mlp = model.model.layers[2].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    ls.operate_(model, "repeat 2")
    first, second = (
        {value.data_ptr() for name, value in model.state_dict().items() if name.startswith(f"model.layers.{block}.")}
        for block in (2, 3)
    )
    assert not first & second


# What is refused


def test_a_model_that_is_none_of_transformers() -> None:
    with (
        pytest.raises(ls.UnsupportedEditError, match="has no transformers config"),
        ls.operate(nn.Linear(2, 2), "drop 0"),
    ):
        pass


def test_a_replaced_forward_cannot_be_doubled(model: Any) -> None:
    original = model.model.layers[2].forward
    model.model.layers[2].forward = lambda *args, **kwargs: original(*args, **kwargs)
    with (
        pytest.raises(ls.UnsupportedEditError, match="cannot be bound to a second module"),
        ls.operate(model, "repeat 2"),
    ):
        pass
    with ls.operate(model, "swap 2 3"):
        logits_of(model, tokens())
    assert numbers(model) == list(range(DEPTH))


def test_a_number_that_counts_something_else(model: Any) -> None:
    model.model.layers[4].self_attn.layer_idx = 9
    with (
        pytest.raises(ls.UnsupportedEditError, match=r"layer_idx = 9, and the meaning of this number is unknown"),
        ls.operate(model, "swap 3 4"),
    ):
        pass
    assert numbers(model) == [0, 1, 2, 3, 9, 5]


def test_an_unknown_list_in_the_config(model: Any) -> None:
    model.config.secrets = list("abcdef")
    with (
        pytest.raises(ls.UnsupportedEditError, match="'secrets' is a list of 6 values for 6 layers"),
        ls.operate(model, "swap 3 4"),
    ):
        pass
    with ls.operate(model, "skip-mlp 3"):
        pass
    assert model.config.secrets == list("abcdef")


def test_an_unknown_list_next_to_the_blocks(model: Any) -> None:
    model.model.secrets = [1, 2, 3, 4, 5, 6]
    with (
        pytest.raises(ls.UnsupportedEditError, match="LlamaModel.secrets is a list of 6 values"),
        ls.operate(model, "swap 3 4"),
    ):
        pass
    model.model.secrets = list(range(6))
    with ls.operate(model, "drop 3"):
        assert model.model.secrets == list(range(5))
    assert model.model.secrets == list(range(6))


def test_a_place_that_the_model_keeps_above_its_blocks(model: Any) -> None:
    model.model.first_shared_layer_idx = DEPTH  # as Gemma 4 does where no layer shares
    with ls.operate(model, "repeat 1"):
        assert model.model.first_shared_layer_idx == DEPTH + 1
    assert model.model.first_shared_layer_idx == DEPTH
    model.model.first_shared_layer_idx = 3
    with ls.operate(model, "swap 4 5; drop 3"):
        assert model.model.first_shared_layer_idx == 3
    with (
        pytest.raises(ls.UnsupportedEditError, match=r"LlamaModel.first_shared_layer_idx = 3"),
        ls.operate(model, "drop 2"),
    ):
        pass
    with ls.operate(model, "skip-mlp 2"):
        pass


def test_numbers_of_layers_that_the_model_keeps_above_its_blocks(model: Any) -> None:
    model.model.cross_attention_layers = [1, 4]  # as in Llama 3.2 Vision, whose forward reads them there
    with ls.operate(model, "drop 1; swap 3 4"):
        assert model.model.cross_attention_layers == [2]
    assert model.model.cross_attention_layers == [1, 4]


def test_an_encoder_with_a_decoder() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=4, num_decoder_layers=2, num_heads=4)
    with (
        pytest.raises(ls.UnsupportedEditError, match="an encoder-decoder model"),
        ls.operate(T5ForConditionalGeneration(config), "drop 1"),
    ):
        pass


def test_a_skipped_projection_under_another_name_is_not_saved_as_it_is(model: Any) -> None:
    ls.operate_(model, "skip-attention 2")
    prune.identity(model.model.layers[2].self_attn.o_proj, "weight")  # type: ignore[no-untyped-call] # torch's own
    with pytest.raises(
        ls.UnsupportedEditError, match="self_attn.o_proj.weight of a skipped LlamaAttention does not exist"
    ):
        model.state_dict()


def test_an_edit_upon_one_that_was_not_verified() -> None:
    model = tiny_model("diffllama")
    ls.operate_(model, "swap 1 2", verify=False)
    kept = logits_of(model, tokens())
    with pytest.raises(ls.UnsupportedEditError, match="lambda_init"):
        ls.operate_(model, "drop 5")
    assert torch.equal(logits_of(model, tokens()), kept)


def test_save_looks_outside_the_blocks_too(tmp_path: Any) -> None:
    model = tiny_model("gpt2")
    model.transformer.ln_f.eps = 1.0
    with pytest.raises(ls.UnsupportedEditError, match=r"outside the blocks: transformer.ln_f.eps"):
        ls.save(model, tmp_path / "out")


def test_an_anatomy_of_another_model(model: Any) -> None:
    other = ls.anatomy(tiny_model("qwen3_moe"))
    with (
        pytest.raises(ls.PlanError, match="block 2 differs from the anatomy argument"),
        ls.operate(model, "skip-mlp 2", anatomy=other),
    ):
        pass


def test_layers_that_share_across_positions() -> None:
    model = tiny_model("rwkv", rescale_every=2)
    with (
        pytest.raises(ls.UnsupportedEditError, match="halves the weights of its blocks every 2 positions"),
        ls.operate(model, "swap 1 2"),
    ):
        pass
    with ls.operate(model, "swap 2 3"):
        pass


def test_an_adapter_with_one_module_a_layer() -> None:
    """PEFT keeps the names of what it has wrapped: as many as there are layers, and no facts on layers."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    before = logits_of(model, tokens())
    meant = logits_along(model, ls.swap(1).route(DEPTH), tokens())
    with ls.operate(model, "swap 1 2"):
        assert torch.equal(logits_of(model, tokens()), meant)
    assert torch.equal(logits_of(model, tokens()), before)


# What is not a model or a plan


class Holder:
    """Hold a model, as a pipeline and a trainer do."""

    def __init__(self, model: Any) -> None:
        self.model = model


def test_what_holds_a_model_is_refused_with_the_way_to_it(model: Any) -> None:
    for held in (Holder(model), Loaded(model, None)):
        for call in (
            lambda held=held: ls.operate_(held, "drop 1"),
            lambda held=held: ls.anatomy(held),
            lambda held=held: ls.sweep(held, "drop", tokens()),
            lambda held=held: ls.compare(held, "drop 1", tokens()),
        ):
            with pytest.raises(ls.PlanError, match=r"not (as )?(a )?(Holder|Loaded); give its attribute .model"):
                call()


def test_a_list_of_plans_is_not_a_plan(model: Any) -> None:
    with pytest.raises(ls.PlanError, match='one plan may have several edits: "drop 1; drop 2"'):
        ls.operate_(model, ["drop 1", "drop 2"])  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_reload_check_reads_the_list_that_was_given(
    wrapped: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give every check the path, where a second list is as long as the blocks."""
    build = LlamaModel.__init__

    def build_two_lists(self: Any, config: Any) -> None:
        build(self, config)
        self.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(DEPTH))

    monkeypatch.setattr(LlamaModel, "__init__", build_two_lists)
    model: Any = tiny_model("llama", tie_word_embeddings=False)
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ls.UnsupportedEditError, match="Choose one: blocks="):
        ls.operate_(model, "swap 1 2")
    before = logits_of(model, tokens())
    path = "base_model.model.model.layers" if wrapped else "model.layers"
    ls.operate_(model, "swap 1 2", blocks=path)
    model = model.merge_and_unload() if wrapped else model
    edited = logits_of(model, tokens())
    assert not torch.equal(edited, before)
    with pytest.raises(ls.UnsupportedEditError, match="Choose one: blocks="):
        ls.save(model, tmp_path / "out")
    ls.save(model, tmp_path / "out", blocks="model.layers")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens()), edited)
    # A difference is found in the blocks of that list.
    fields: Any = model.model.layers[0].self_attn
    fields.scaling = 1.0
    with pytest.raises(ls.UnsupportedEditError, match="scaling is 1.0"):
        ls.operate_(model, "swap 1 2", blocks="model.layers")

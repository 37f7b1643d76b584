"""Surgery in memory over the zoo: every law, for every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layersurgery as ls
from layersurgery.plans.plan import Plan
from tests.checkpoints.test_zoo import reload
from tests.support.reference import logits_along, logits_of
from tests.support.unsupported import (
    ALL_UNSUPPORTED,
    BLOCK_EDITS,
    SKIP_EDITS,
    UNSUPPORTED,
    WRONG_WITH_BEAMS,
    WRONG_WITH_CACHE,
)
from tests.support.zoo import DEPTH, ZOO, rotate, slow, tiny_model, tokens

GENERATING = [
    "swap 1 2",
    "drop 0",
    "drop -1",
    "repeat 2:4",
    "reverse 1:5",
    "skip-attention 0",
    "skip-attention -1",
    "skip-mlp 2",
]
KEPT = ["swap 1 2", "drop 0", "repeat 2:4", "repeat 2 x3; skip-attention 2", "skip-mlp 2"]


@pytest.fixture
def model(name: str) -> Any:
    model = tiny_model(name)
    logits_of(model, tokens())  # some note in their modules that they ran
    return model


each_architecture = pytest.mark.parametrize("name", ZOO)


def state(model: Any) -> dict[str, Any]:
    """Everything of a model that surgery may touch: the very modules, their attributes, and the config."""
    modules = {
        name: (id(module), {key: value for key, value in vars(module).items() if _comparable(key, value)})
        for name, module in model.named_modules(remove_duplicate=False)
    }
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {"modules": modules, "parameters": parameters, "config": model.config.to_dict()}


def _comparable(key: str, value: Any) -> bool:
    # Tensors and dictionaries are compared by what they do; the last are notes of generate's about its own last run.
    return not isinstance(value, torch.Tensor | dict) and key not in ("_previous_max_cache_length", "_cache")


def refused(name: str, plan: str) -> str | None:
    """The words of a refusal in memory; plans of the tests below name blocks like those of the table."""
    key = plan if plan in BLOCK_EDITS else "skip-attention 2" if "skip-attention" in plan else "skip-mlp 2"
    return UNSUPPORTED.get((name, key))


def refused_where_it_is(name: str, plan: str) -> str | None:
    """The same for single blocks of nemotron_h, each of which is of one kind only."""
    if name == "nemotron_h":
        return {"skip-attention -1": "has no attention"}.get(plan)
    return refused(name, plan)


def refused_when_kept(name: str, plan: str) -> str | None:
    """The words of a refusal of an edit that is to be saved."""
    single = plan if plan in BLOCK_EDITS else next((skip for skip in SKIP_EDITS if skip in plan), plan)
    words = ALL_UNSUPPORTED.get((name, single))
    return words or (ALL_UNSUPPORTED.get((name, "repeat 2:4")) if "repeat" in plan else None)


def refusals(plans: list[str], words: Callable[[str, str], str | None]) -> list[tuple[str, str]]:
    return [(name, plan) for name in ZOO for plan in plans if words(name, plan)]


@each_architecture
def test_the_identity_changes_nothing(model: Any) -> None:
    before, logits = state(model), logits_of(model, tokens())
    with ls.operate(model, Plan()) as same:
        assert same is model
        assert state(model) == before
        assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize(("name", "plan"), rotate([*BLOCK_EDITS, *SKIP_EDITS], count=2, always=UNSUPPORTED))
def test_an_edit_is_the_reference_and_its_undo_is_exact(model: Any, name: str, plan: str) -> None:
    before, logits = state(model), logits_of(model, tokens())
    if words := refused(name, plan):
        with pytest.raises(ls.UnsupportedEditError, match=words), ls.operate(model, plan):
            pytest.fail("operated")
    else:
        with ls.operate(model, plan):
            found = logits_of(model, tokens())
        if plan in BLOCK_EDITS:
            assert torch.equal(found, logits_along(model, Plan.parse(plan).route(DEPTH), tokens()))
        assert not torch.equal(found[..., -1, :], logits[..., -1, :])
    assert state(model) == before
    assert torch.equal(logits_of(model, tokens()), logits)


@each_architecture
def test_skipping_both_branches_is_dropping(model: Any, name: str) -> None:
    if (name, "drop 0") in UNSUPPORTED and name != "rwkv":
        return
    with ls.operate(model, "drop 2"):
        dropped = logits_of(model, tokens())
    for plan in SKIP_EDITS:
        if refused(name, plan):
            continue
        other = next(skip for skip in SKIP_EDITS if skip != plan)
        with ls.operate(model, plan):
            if refused(name, other):
                continue
            with ls.operate(model, other):
                # One after the other, so the block is still there, and does nothing.
                assert len(model.get_submodule(ls.anatomy(model).blocks)) == DEPTH
                torch.testing.assert_close(logits_of(model, tokens()), dropped, rtol=0, atol=1e-6)


@pytest.mark.slow
@each_architecture
def test_without_attention_no_token_sees_another(model: Any, name: str) -> None:
    blocks = ls.anatomy(model)
    mixing = [number for number in range(DEPTH) if blocks.parts(number).attention_skips]
    if len(mixing) < DEPTH and name != "nemotron_h":
        assert ("skip-attention 2") in [plan for other, plan in UNSUPPORTED if other == name]
        return
    other = tokens()
    other[:, :-1] = tokens().flip(1)[:, :-1]
    with ls.operate(model, ls.skip_attention(*mixing)):
        one, two = logits_of(model, tokens())[:, -1], logits_of(model, other)[:, -1]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def generated(model: Any, *, use_cache: bool, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and logits of greedy text."""
    found = model.generate(
        tokens(2, 9), max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def padded() -> torch.Tensor:
    mask = torch.ones_like(tokens(2, 9))
    mask[0, :3] = 0
    return mask


def caches_agree(model: Any, name: str) -> bool:
    """Return whether text is the same with and without a cache: plain, left-padded, with beams, with a static cache."""
    with_cache, without = generated(model, use_cache=True), generated(model, use_cache=False)
    same = [torch.equal(with_cache[0], without[0]), torch.allclose(with_cache[1], without[1], atol=1e-4)]
    one, other = (generated(model, use_cache=cache, attention_mask=padded())[1] for cache in (True, False))
    same.append(torch.allclose(one, other, atol=1e-4))
    if name not in WRONG_WITH_BEAMS:
        same.append(torch.equal(*(generated(model, use_cache=cache, num_beams=3)[0] for cache in (True, False))))
    # With alibi, transformers' Falcon does not fit a static cache.
    if model._can_compile_fullgraph and name != "falcon-alibi":
        static = model.generate(
            tokens(2, 9),
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        same.append(torch.equal(static, without[0]))
    return all(same)


@pytest.mark.parametrize("name", [name if name in WRONG_WITH_CACHE else slow(name) for name in ZOO])
def test_the_table_of_wrong_caches_is_right(model: Any, name: str) -> None:
    assert caches_agree(model, name) is (name not in WRONG_WITH_CACHE)


@pytest.mark.parametrize(("name", "plan"), rotate(GENERATING, always=refusals(GENERATING, refused_where_it_is)))
def test_text_with_a_cache_is_text_without(model: Any, name: str, plan: str) -> None:
    if name in WRONG_WITH_CACHE:
        pytest.skip(WRONG_WITH_CACHE[name])
    before, logits = state(model), logits_of(model, tokens())
    if words := refused_where_it_is(name, plan):
        with pytest.raises(ls.UnsupportedEditError, match=words), ls.operate(model, plan):
            pass
    else:
        with ls.operate(model, plan):
            assert caches_agree(model, name)
    if name != "recurrent_gemma":  # it keeps the state of the last text in its modules
        assert state(model) == before
    assert torch.equal(logits_of(model, tokens()), logits)


@pytest.mark.parametrize(("name", "plan"), rotate(KEPT, always=refusals(KEPT, refused_when_kept)))
def test_a_kept_edit_saves_and_reloads_and_is_what_the_disk_path_writes(name: str, plan: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "source")
    logits = logits_of(model, tokens())
    before = state(model)
    if words := refused_when_kept(name, plan):
        with pytest.raises(ls.UnsupportedEditError, match=words):
            ls.operate_(model, plan)
        with pytest.raises(ls.UnsupportedEditError, match=words):
            ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "disk")
        assert state(model) == before
        assert torch.equal(logits_of(model, tokens()), logits)
        return
    assert ls.operate_(model, plan) is model
    meant = logits_of(model, tokens())
    model.save_pretrained(tmp_path / "plain")
    ls.save(model, tmp_path / "guarded")
    ls.edit_checkpoint(tmp_path / "source", plan, tmp_path / "disk")
    disk = load_file(tmp_path / "disk" / "model.safetensors")
    for way in ("plain", "guarded"):
        assert torch.equal(logits_of(reload(tmp_path / way), tokens()), meant)
        files = load_file(tmp_path / way / "model.safetensors")
        assert files.keys() == disk.keys()
        assert all(torch.equal(files[key], disk[key]) for key in files)
        assert config_of(model, tmp_path / way) == config_of(model, tmp_path / "disk")


def config_of(model: Any, path: Path) -> Any:
    """The config as its class understands it."""
    fields = type(model.config).from_pretrained(path).to_dict()
    return json.dumps(
        {key: value for key, value in fields.items() if key != "transformers_version"}, sort_keys=True, default=str
    )

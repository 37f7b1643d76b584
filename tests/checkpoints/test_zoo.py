"""Surgery on disk over the zoo: reloaded by plain transformers, every result equals a reference worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import layersurgery as ls
from layersurgery.plans.plan import Plan
from tests.support.reference import logits_along, logits_of
from tests.support.unsupported import ALL_UNSUPPORTED, BLOCK_EDITS, SKIP_EDITS
from tests.support.zoo import DEPTH, ZOO, rotate, tiny_model, tokens


def reload(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    for parameter in model.parameters():
        # Kernels may round differently on memory that is not aligned, such as mapped files.
        parameter.data = parameter.data.clone()
    return model.eval().float()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that saves an architecture's checkpoint once and returns its directory, which no test edits."""

    @cache
    def save(name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "source"
        # Every other model in several files.
        many = {"max_shard_size": "40KB"} if list(ZOO).index(name) % 2 else {}
        tiny_model(name).save_pretrained(path, **many)
        return path

    return save


def refused(name: str, plan: str, path: Path, out: Path) -> bool:
    words = ALL_UNSUPPORTED.get((name, plan))
    if words is None:
        return False
    with pytest.raises(ls.UnsupportedEditError, match=words):
        ls.edit_checkpoint(path, plan, out)
    assert not out.exists()
    return True


@pytest.mark.parametrize(("name", "plan"), rotate(BLOCK_EDITS, always=ALL_UNSUPPORTED))
def test_reload_is_the_model_meant(saved: Callable[[str], Path], name: str, plan: str, tmp_path: Path) -> None:
    model, path = tiny_model(name), saved(name)
    if refused(name, plan, path, tmp_path / "out"):
        return
    route = Plan.parse(plan).route(DEPTH)
    ls.edit_checkpoint(path, plan, tmp_path / "out")
    found = logits_of(reload(tmp_path / "out"), tokens())
    assert torch.equal(found, logits_along(model, route, tokens()))
    assert not torch.equal(found[..., -1, :], logits_of(model, tokens())[..., -1, :])


@pytest.mark.parametrize("name", ZOO)
def test_the_reference_is_the_model_itself_on_the_identity(name: str) -> None:
    model = tiny_model(name)
    assert torch.equal(logits_along(model, Plan().route(DEPTH), tokens()), logits_of(model, tokens()))


@pytest.mark.parametrize(("name", "skip"), rotate(SKIP_EDITS, always=ALL_UNSUPPORTED))
def test_skipping_one_branch_then_the_other_is_dropping(
    saved: Callable[[str], Path], name: str, skip: str, tmp_path: Path
) -> None:
    model, path = tiny_model(name), saved(name)
    if refused(name, skip, path, tmp_path / "one"):
        return
    other = next(edit for edit in SKIP_EDITS if edit != skip)
    ls.edit_checkpoint(path, skip, tmp_path / "one")
    one = logits_of(reload(tmp_path / "one"), tokens())
    dropped = logits_along(model, ls.drop(2).route(DEPTH), tokens())
    assert not torch.equal(one, logits_of(model, tokens()))
    if (name, other) in ALL_UNSUPPORTED:  # it has one branch only
        assert torch.equal(one, dropped)
        return
    assert not torch.equal(one, dropped)
    ls.edit_checkpoint(tmp_path / "one", other, tmp_path / "both")
    both = logits_of(reload(tmp_path / "both"), tokens())
    # With a tolerance, because in some models the zeros of the empty block take part in a sum that rounds.
    torch.testing.assert_close(both, dropped, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_without_attention_no_token_sees_another(saved: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    model, path = tiny_model(name), saved(name)
    if (name, "skip-attention 2") in ALL_UNSUPPORTED:
        return
    ls.edit_checkpoint(path, f"skip-attention 0:{DEPTH}", tmp_path / "out")
    zeroed = reload(tmp_path / "out")
    ids, other = tokens(), tokens()
    other[:, :-1] = tokens().flip(1)[:, :-1]
    torch.testing.assert_close(logits_of(zeroed, ids)[:, -1], logits_of(zeroed, other)[:, -1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(model, ids)[:, -1], logits_of(model, other)[:, -1], rtol=1e-3, atol=1e-3)

"""Surgery on disk over the zoo: reloaded by plain transformers, every result equals a reference worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import layersurgery as ls
from layersurgery.plans.plan import Plan
from tests.support.reference import logits_along, logits_of
from tests.support.unsupported import ALL_UNSUPPORTED, BLOCK_EDITS
from tests.support.zoo import DEPTH, ZOO, tiny_model, tokens


def reload(path: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    for parameter in model.parameters():
        # Kernels may round differently on memory that is not aligned, such as mapped files.
        parameter.data = parameter.data.clone()
    return model.eval().float()


@pytest.fixture(scope="module", params=ZOO)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    model = tiny_model(request.param)
    path = tmp_path_factory.mktemp(request.param) / "source"
    # Every other model in several files.
    many = {"max_shard_size": "40KB"} if list(ZOO).index(request.param) % 2 else {}
    model.save_pretrained(path, **many)
    return request.param, model, path


def refused(name: str, plan: str, path: Path, out: Path) -> bool:
    words = ALL_UNSUPPORTED.get((name, plan))
    if words is None:
        return False
    with pytest.raises(ls.UnsupportedEditError, match=words):
        ls.edit_checkpoint(path, plan, out)
    assert not out.exists()
    return True


@pytest.mark.parametrize("plan", BLOCK_EDITS)
def test_reload_is_the_model_meant(source: tuple[str, Any, Path], plan: str, tmp_path: Path) -> None:
    name, model, path = source
    if refused(name, plan, path, tmp_path / "out"):
        return
    route = Plan.parse(plan).route(DEPTH)
    ls.edit_checkpoint(path, plan, tmp_path / "out")
    found = logits_of(reload(tmp_path / "out"), tokens())
    assert torch.equal(found, logits_along(model, route, tokens()))
    assert not torch.equal(found[..., -1, :], logits_of(model, tokens())[..., -1, :])


def test_the_reference_is_the_model_itself_on_the_identity(source: tuple[str, Any, Path]) -> None:
    _, model, _ = source
    assert torch.equal(logits_along(model, Plan().route(DEPTH), tokens()), logits_of(model, tokens()))


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_skipping_one_branch_then_the_other_is_dropping(
    source: tuple[str, Any, Path], branch: str, tmp_path: Path
) -> None:
    name, model, path = source
    if refused(name, f"skip-{branch} 2", path, tmp_path / "one"):
        return
    other = "mlp" if branch == "attention" else "attention"
    ls.edit_checkpoint(path, f"skip-{branch} 2", tmp_path / "one")
    one = logits_of(reload(tmp_path / "one"), tokens())
    dropped = logits_along(model, ls.drop(2).route(DEPTH), tokens())
    assert not torch.equal(one, logits_of(model, tokens()))
    if (name, f"skip-{other} 2") in ALL_UNSUPPORTED:  # it has one branch only
        assert torch.equal(one, dropped)
        return
    assert not torch.equal(one, dropped)
    ls.edit_checkpoint(tmp_path / "one", f"skip-{other} 2", tmp_path / "both")
    both = logits_of(reload(tmp_path / "both"), tokens())
    # With a tolerance, because in some models the zeros of the empty block take part in a sum that rounds.
    torch.testing.assert_close(both, dropped, rtol=0, atol=1e-6)


def test_without_attention_no_token_sees_another(source: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, model, path = source
    if (name, "skip-attention 2") in ALL_UNSUPPORTED:
        return
    ls.edit_checkpoint(path, f"skip-attention 0:{DEPTH}", tmp_path / "out")
    zeroed = reload(tmp_path / "out")
    ids, other = tokens(), tokens()
    other[:, :-1] = tokens().flip(1)[:, :-1]
    torch.testing.assert_close(logits_of(zeroed, ids)[:, -1], logits_of(zeroed, other)[:, -1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(model, ids)[:, -1], logits_of(model, other)[:, -1], rtol=1e-3, atol=1e-3)

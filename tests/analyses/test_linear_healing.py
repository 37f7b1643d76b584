"""Linear healing: the maps are those of plain least squares, and memory, disk and a model with hooks are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import layersurgery as ls
from layersurgery.analyses.linear_healing import RIDGES
from tests.checkpoints.test_zoo import reload
from tests.support.dense import blocks_of
from tests.support.reference import logits_of
from tests.support.zoo import tiny_model, tokens
from tests.surgery.test_zoo import state

PLAN = "drop 2:4; drop 5"
TEXT = tokens(batch=20, length=16)
MLPS = {"llama": "mlp", "gpt2": "mlp", "gpt_neox": "mlp", "mixtral": "mlp", "opt": "fc2"}


def heal(model: Any, plan: str = PLAN, **options: Any) -> ls.LinearHealing:
    return ls.heal_linear(model, plan, TEXT, **options)


def dense_fit(model: Any, block: int, first: int, target: int) -> tuple[np.ndarray, float, float, float]:
    """Fit the first cut by NumPy's least squares on the rows of all tokens, from hooks on the unedited model."""
    seen: dict[str, torch.Tensor] = {}
    blocks: Any = blocks_of(model)

    def keep(name: str) -> Any:
        return lambda _module, _args, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    handles = [
        blocks[block].mlp.register_forward_hook(keep("added")),
        blocks[first - 1].register_forward_hook(keep("reached")),
        blocks[target - 1].register_forward_hook(keep("target")),
    ]
    with torch.no_grad():
        model(TEXT)
    for handle in handles:
        handle.remove()
    rows = {name: value.double().numpy() for name, value in seen.items()}
    norm = np.linalg.norm(rows["target"], axis=-1, keepdims=True)
    x, y = rows["added"] / norm, (rows["target"] - rows["reached"]) / norm
    choosing = [number for number in range(16) if number % 5 == 4]
    fitted = [number for number in range(16) if number % 5 != 4]
    x_fit, y_fit = (part[fitted].reshape(-1, part.shape[-1]) for part in (x, y))
    x_choose, y_choose = (part[choosing].reshape(-1, part.shape[-1]) for part in (x, y))
    before = float(np.sqrt((y_choose**2).sum(-1).mean()))
    best = (np.inf, 0.0, x)
    for ridge in RIDGES:
        size = np.sqrt(ridge * (x_fit**2).sum(0).mean())
        padded = np.concatenate([x_fit, size * np.eye(x.shape[-1])]), np.concatenate([y_fit, np.zeros_like(x[0, :1])
            .repeat(x.shape[-1], 0)])  # fmt: skip
        delta = np.linalg.lstsq(*padded, rcond=None)[0]
        error = float(np.sqrt(((y_choose - x_choose @ delta) ** 2).sum(-1).mean()))
        best = min(best, (error, ridge, delta), key=lambda item: item[0])
    return best[2], best[1], before, best[0]


def test_the_first_map_is_that_of_least_squares_on_all_rows() -> None:
    model = tiny_model("llama")
    healing = heal(model)
    delta, ridge, before, after = dense_fit(model, block=1, first=2, target=4)
    row = healing.cuts.iloc[0]
    assert (row.block, row.removed, row.ridge) == (1, "2:4", ridge)
    assert [row.error_before, row.error_after] == pytest.approx([before, after], rel=1e-4)
    torch.testing.assert_close(healing.maps[1][0].delta, torch.from_numpy(delta), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MLPS)
def test_memory_is_disk_and_what_a_hook_does(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "source")
    before = state(model)
    healing = heal(tmp_path / "source", output=tmp_path / "out", dtype="float32")
    assert healing.written is not None
    assert set(healing.maps) <= {1, 2}
    assert healing.maps
    with healing.operate(model):
        inside = logits_of(model, TEXT)
    assert state(model) == before
    assert torch.equal(logits_of(reload(tmp_path / "out"), TEXT), inside)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A linear map, fitted by least squares" in card

    with ls.operate(model, PLAN):
        blocks = blocks_of(model)
        handles = []
        for position, maps in healing.maps.items():

            def mapped(_module: Any, _args: Any, output: Any, delta: torch.Tensor = maps[0].delta) -> Any:
                return output + (output.double() @ delta).float()

            handles.append(blocks[position].get_submodule(MLPS[name]).register_forward_hook(mapped))
        meant = logits_of(model, TEXT)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(inside, meant, rtol=0, atol=2e-5)
    healed = healing.operate_(model)
    assert torch.equal(logits_of(healed, TEXT), inside)


def test_costs_are_of_sequences_that_nothing_else_has_seen() -> None:
    model = tiny_model("llama")
    healing = heal(model)
    other = TEXT[16:]
    with healing.operate(model):
        q = logits_of(model, other)
    p = logits_of(model, other)
    log_p, log_q = (logits[:, :-1].double().log_softmax(-1) for logits in (p, q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    row = healing.costs.set_index("model").loc["healed"]
    assert row.kl_nats == pytest.approx(float(kl.mean()), rel=1e-5)
    assert row.kl_nats_sem == pytest.approx(float(kl.mean(-1).std() / len(other) ** 0.5), rel=1e-5)
    assert list(healing.costs.model) == ["unedited", "edited", "healed"]
    assert healing.costs.kl_nats.iloc[0] == 0


def test_a_map_that_helps_nobody_is_not_used() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        removed: Any = list(blocks_of(model))[2:4]
        for block in removed:
            block.mlp.down_proj.weight.zero_()
            block.self_attn.o_proj.weight.zero_()
    healing = heal(model, "drop 2:4")
    assert healing.maps == {}
    assert healing.cuts.ridge.tolist() == [float("inf")]
    assert healing.cuts.error_after.tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "plan", "error", "words"),
    [
        ("gemma2", "drop 2", ls.UnsupportedEditError, "a norm follows its output projection"),
        ("llama", "repeat 2; drop 4", ls.UnsupportedEditError, "must run once and in order"),
        ("llama", "swap 2 3; drop 5", ls.UnsupportedEditError, "must run once and in order"),
        ("llama", "skip-mlp 1; drop 2", ls.UnsupportedEditError, "the MLP of block 1, before a cut, is changed"),
        ("llama", "skip-mlp 1", ls.PlanError, "nothing to heal"),
        ("llama", "drop 0", ls.PlanError, "nothing to heal"),
        ("mamba", "drop 2", ls.UnsupportedEditError, "cannot be healed"),
    ],
)
def test_refused(name: str, plan: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        heal(tiny_model(name), plan)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ls.PlanError, match="at least 10 sequences .* there are 4"):
        ls.heal_linear(tiny_model("llama"), PLAN, TEXT[:4])


def test_a_pruned_model_is_healed_before_it_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")
    pruning = ls.prune(tmp_path / "source", TEXT, remove=2, heal="linear", output=tmp_path / "out", race=False)
    assert pruning.healing is not None
    with pruning.healing.operate(model):
        meant = logits_of(model, TEXT)
    assert torch.equal(logits_of(reload(tmp_path / "out"), TEXT), meant)
    card = (tmp_path / "out" / "README.md").read_text()
    row = pruning.costs[pruning.costs.plan == str(pruning.plan)].iloc[0]
    assert f"| KL from the unedited model | {row.kl_nats:.4g} nats (standard error {row.kl_nats_sem:.2g}) |" in card
    assert f"{row.loss_nats:.4g} nats" in card
    assert "| chosen by | kl |" in card
    assert "healing, on text that the fit has not seen" in card
    in_memory = ls.prune(model, TEXT, remove=2, heal="linear", race=False)
    assert in_memory.plan == pruning.plan
    assert in_memory.healing is not None
    pd.testing.assert_frame_equal(in_memory.healing.cuts, pruning.healing.cuts)
    found = ls.search(tmp_path / "source", TEXT, remove=1, beam=1, heal="linear", output=tmp_path / "found", race=False)
    assert found.healing is not None
    assert "## What was measured" in (tmp_path / "found" / "README.md").read_text()
    with pytest.raises(ls.PlanError, match="`heal` is 'linear' or left out, not 'lora'"):
        ls.prune(model, TEXT, remove=2, heal="lora")


@pytest.mark.weekly
def test_smollm2_is_nearer_to_the_unedited_model_on_text_that_was_not_seen() -> None:
    healing = ls.heal_linear("smollm2-135m", "drop 20:24", "pydoc", tokens=4096, context=128)
    kl = healing.costs.set_index("model").kl_nats
    assert kl["healed"] < 0.75 * kl["edited"]
